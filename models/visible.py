"""GCViT.forward_visible at the cost of what is visible: hidden units are not computed, in no layer.

A unit is a square of the mask. Maps are B V u w C: the V visible units of each image, each of u x w tokens (8, 4, 2
and 1 a side in the four stages where a unit has 32 pixels). The functions below lead such maps through GCViT's own
modules. To linears, norms and MLPs a token is a token wherever it lies. A convolution or pooling takes every unit
with a halo of the tokens around it, which are gathered from the neighbouring units. Attention over a whole map takes
the visible tokens as they come; over smaller windows, which cut across units (at 224 pixels 7 tokens a side against
8), tokens are put at their places in the windows and the empty places are left out of the softmax.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gcssl.models.functional import attend, drop_path
from gcssl.models.hidden import spread
from gcssl.models.windows import RelPosBias, resize_table

if TYPE_CHECKING:
    from gcssl.models.gcvit import Attention, Block, ConvBlock, Downsample, GCViT, QueryGenerator, Stem


def visible_map(
    encoder: "GCViT", x: Tensor, mask: Tensor, n_visible: int | None, noise: Sequence[Tensor | None]
) -> Tensor:
    """B 3 H W -> B H/32 W/32 C, normed, 0 at hidden places; noise: each stage's, 2*depth B or None."""
    h, w = x.shape[2:]
    windows, whole = encoder.windows_at((h, w)), max(encoder.stride, *encoder.window_ratio)
    spread(mask, h // whole, w // whole)  # refuses units that split a token or a query
    units = find_units(mask, n_visible)
    x = stem_units(encoder.stem, x, units)
    stages: Any = encoder.stages
    for stage, window, uniforms in zip(stages, windows, noise, strict=True):
        x = run_stage(stage, x, units, window, uniforms)
    return paste(x, units)


# ---- units


class Units(NamedTuple):
    """The visible units of a batch of masks."""

    at: Tensor  # B V: their places in the mask's grid, row by row, in rising order
    near: Tensor  # B V 3 3: each one's neighbours as rows of B*V; B*V stands for a hidden one, or none
    grid: tuple[int, int]


def find_units(mask: Tensor, n_visible: int | None = None) -> Units:
    """The units that a mask B h w (True = hidden) leaves, n_visible of each image (else counted, by the host)."""
    b, h, w = mask.shape
    n = count_visible(mask) if n_visible is None else n_visible
    index = mask.flatten(1).byte().argsort(dim=1, stable=True)[:, :n]  # B V
    rows = torch.arange(b * n, device=mask.device).view(b, n)
    rows = torch.full_like(mask, b * n, dtype=torch.long).flatten(1).scatter(1, index, rows)  # B h*w
    rows = F.pad(rows.view(b, h, w), (1, 1, 1, 1), value=b * n)
    near = rows.unfold(1, 3, 1).unfold(2, 3, 1).reshape(b, h * w, 9)
    near = near.gather(1, index[..., None].expand(-1, -1, 9)).view(b, n, 3, 3)
    return Units(index, near, (h, w))


def count_visible(mask: Tensor) -> int:
    """How many units of each image a mask B h w leaves; ValueError unless they are equally many, and some."""
    counts = sorted({int(n) for n in (~mask).flatten(1).sum(1)})
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(f"masks leave {counts} units visible: expected equally many of each image, and at least one")
    return counts[0]


def cut(x: Tensor, units: Units) -> Tensor:
    """The visible units of a map: B C H W -> B V u w C."""
    b, c, h, w = x.shape
    rows, cols = units.grid
    row, col = units.at // cols, units.at % cols  # B V
    x = x.view(b, c, rows, h // rows, cols, w // cols)
    image = torch.arange(b, device=x.device)[:, None]
    return x[image, :, row, :, col].permute(0, 1, 3, 4, 2)


def paste(x: Tensor, units: Units) -> Tensor:
    """The map of which x are the visible units, 0 elsewhere: B V u w C -> B H W C."""
    b, v, u, w, c = x.shape
    rows, cols = units.grid
    index = units.at + torch.arange(b, device=x.device)[:, None] * rows * cols
    x = x.new_zeros(b * rows * cols, u, w, c).index_copy(0, index.flatten(), x.flatten(0, 1))
    return x.view(b, rows, cols, u, w, c).transpose(2, 3).reshape(b, rows * u, cols * w, c)


# ---- convolutions


def halo(x: Tensor, units: Units, after: int = 1, fill: float = 0.0) -> Tensor:
    """Each unit with one token more before and `after` more behind, `fill` where hidden or outside the image.

    B V u w C -> B*V C 1+u+after 1+w+after, channels last.
    """
    b, v, u, w, c = x.shape
    row, col = (torch.arange(n - 1, 2 * n + after, device=x.device) for n in (u, w))  # in 3 x 3 units
    inner = (row % u)[:, None] * w + col % w  # 1+u+after 1+w+after
    outer = units.near[:, :, row // u][..., col // w]  # B V 1+u+after 1+w+after
    index = (outer * (u * w) + inner).clamp(max=b * v * u * w)
    tokens = torch.cat([x.reshape(-1, c), x.new_full((1, c), fill)])
    return tokens.index_select(0, index.flatten()).view(b * v, *index.shape[2:], c).permute(0, 3, 1, 2)


def conv(x: Tensor, layer: nn.Conv2d, units: Units) -> Tensor:
    """A 3x3 convolution padded by 1, of stride 1 or 2, on B V u w C."""
    stride = layer.stride[0]
    y = halo(x, units, 2 - stride)
    if y.shape[2:] == (3, 3) and layer.groups == 1:  # one token comes of each unit: faster as what it then is
        y = F.linear(y.flatten(1), layer.weight.flatten(1), layer.bias)[..., None, None]
    else:
        y = F.conv2d(y, layer.weight, layer.bias, stride, groups=layer.groups)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def conv_block(block: "ConvBlock", x: Tensor, units: Units) -> Tensor:
    y = F.gelu(conv(x, block.conv_dw, units))
    y = block.se(y.flatten(2, 3)).view_as(x)  # its average is over V and u*w
    return x + F.linear(y, block.conv_pw.weight.flatten(1))


def downsample(down: "Downsample", x: Tensor, units: Units) -> Tensor:
    x = conv_block(down.conv_block, down.norm1(x), units)
    return down.norm2(conv(x, down.reduction, units))


def stem_units(stem: "Stem", x: Tensor, units: Units) -> Tensor:
    """B 3 H W -> B V u w C at stride 4."""
    return downsample(stem.down, conv(cut(x, units), stem.conv1, units), units)


def queries(generator: "QueryGenerator", x: Tensor, units: Units) -> Tensor:
    """B V u w C -> B V u' w' C: the visible queries of the global blocks."""
    blocks: Any = generator.blocks
    for block in blocks.values():
        x = conv_block(block, x, units)
        if generator.levels:
            pooled = F.max_pool2d(halo(x, units, 0, -math.inf), 3, stride=2)
            x = pooled.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
    return x


# ---- attention


class Windows(NamedTuple):
    """Where a stage's tokens, n = V*u*w of each image, meet. One window: pairs; several: slots and blind."""

    size: tuple[int, int]
    pairs: Tensor | None = None  # B n n: the bias table's row for each pair of tokens
    slots: Tensor | None = None  # B*n: each token's place in B*W*N, W windows of N places
    blind: Tensor | None = None  # B W N: places of no token (none in a window that has no token at all)


def find_windows(units: Units, u: int, w: int, size: tuple[int, int]) -> Windows:
    """Of maps B V u w C and windows of size[0] x size[1] tokens."""
    rows, cols = units.grid
    device = units.at.device
    y = (units.at // cols * u)[..., None, None] + torch.arange(u, device=device)[:, None]  # B V u 1
    x = (units.at % cols * w)[..., None, None] + torch.arange(w, device=device)  # B V 1 w
    if (rows * u, cols * w) == size:
        y, x = (at.expand(-1, -1, u, w).flatten(1) for at in (y, x))  # B n
        rise, run = (at[:, :, None] - at[:, None] + side - 1 for at, side in zip((y, x), size, strict=True))  # B n n
        return Windows(size, pairs=rise * (2 * size[1] - 1) + run)
    across, down = cols * w // size[1], rows * u // size[0]
    window = (y // size[0] * across + x // size[1]).flatten(1)  # B n
    place = (y % size[0] * size[1] + x % size[1]).flatten(1)
    # windows that hold tokens come first, and only as many are kept as V units can reach
    empty = torch.ones(len(y), down * across, dtype=torch.bool, device=device).scatter(1, window, False)
    rank = empty.byte().argsort(dim=1, stable=True).argsort(dim=1)  # B down*across
    n_kept = min(down * across, y.shape[1] * reach(rows, u, size[0]) * reach(cols, w, size[1]))
    image = torch.arange(len(y), device=device)[:, None]
    slots = (image * n_kept + rank.gather(1, window)) * size[0] * size[1] + place
    blind = torch.ones(len(y) * n_kept * size[0] * size[1], dtype=torch.bool, device=device)
    blind = blind.index_fill(0, slots.flatten(), False).view(len(y), n_kept, -1)
    return Windows(size, slots=slots.flatten(), blind=blind & ~blind.all(2, keepdim=True))


def reach(n_units: int, unit: int, window: int) -> int:
    """How many windows of an axis a unit may touch; sides in tokens."""
    return max((i * unit + unit - 1) // window - i * unit // window + 1 for i in range(n_units))


def pair_bias(rel_pos: RelPosBias, windows: Windows) -> Tensor:
    """B 1 K n n, or K N N."""
    if windows.pairs is None:
        return rel_pos(windows.size)
    table = resize_table(rel_pos.relative_position_bias_table, rel_pos.window, windows.size, rel_pos.mode)
    return table.t().index_select(1, windows.pairs.flatten()).view(-1, *windows.pairs.shape).transpose(0, 1)[:, None]


def attention(attn: "Attention", x: Tensor, query: Tensor, windows: Windows) -> Tensor:
    """x: B n C; query: B n C for one window, B N C for several -> B n C."""
    b, n, c = x.shape
    qkv = attn.qkv(x)[:, None]  # B 1 n 3C, or 2C
    if windows.slots is not None and windows.blind is not None:
        places = qkv.new_zeros(windows.blind.numel(), qkv.shape[-1])
        qkv = places.index_copy(0, windows.slots, qkv.flatten(0, 2)).view(*windows.blind.shape, -1)  # B W N 3C
    parts = qkv.unflatten(-1, (-1, attn.num_heads, c // attn.num_heads)).unbind(3)  # B W N K D each
    if attn.is_global:
        parts = (query.view(b, 1, *query.shape[1:2], attn.num_heads, -1), *parts)
    q, k, v = (t.transpose(2, 3) for t in parts)  # B W K N D
    out = attend(q, k, v, pair_bias(attn.rel_pos, windows), blind=windows.blind).transpose(2, 3)  # B W N K D
    if windows.slots is not None:
        out = out.reshape(-1, c).index_select(0, windows.slots)
    return attn.proj(out.reshape(b, n, c))


def run_block(block: "Block", x: Tensor, query: Tensor, windows: Windows, noise: Tensor | None) -> Tensor:
    """x: B n C, noise: 2 B or None -> B n C."""
    first, second = (None, None) if noise is None else noise.unbind(0)
    x = x + drop_path(block.ls1(attention(block.attn, block.norm1(x), query, windows)), block.rate, first)
    return x + drop_path(block.ls2(block.mlp(block.norm2(x))), block.rate, second)


def run_stage(stage: Any, x: Tensor, units: Units, size: tuple[int, int], noise: Tensor | None) -> Tensor:
    """x: B V u w C, noise: 2*depth B or None -> B V u' w' C', u' = u / 2 but in the first stage."""
    if not isinstance(stage.downsample, nn.Identity):
        x = downsample(stage.downsample, x, units)
    shape = x.shape
    windows = find_windows(units, shape[2], shape[3], size)
    query = queries(stage.global_block, x, units)
    query = query.flatten(1, 3) if windows.slots is None else paste(query, units).flatten(1, 2)  # B n C or B N C
    x = x.flatten(1, 3)  # B n C
    for i, block in enumerate(stage.blocks):
        args = (block, x, query, windows, None if noise is None else noise[2 * i : 2 * i + 2])
        keep = stage.grad_checkpointing and stage.training and torch.is_grad_enabled()
        x = checkpoint(run_block, *args, use_reentrant=False) if keep else run_block(*args)
    return stage.norm(x).view(shape)
