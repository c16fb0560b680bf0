"""GC ViT (arXiv:2206.09959): four stages of window attention; odd blocks ask with one query per image.

Layout: maps are B H W C, tokens inside a stage B W N C (W windows of N tokens, row-major), attention is
B W K N D (K heads). Parameter names and shapes are those of timm's GlobalContextVit, so state dicts load
strictly both ways.

Most forward methods take `hidden`, a mask B h w of units (True = hidden) that take no part in anything: see
forward_visible. None, everywhere else, costs nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gcssl.augment import IMAGENET_MEAN, IMAGENET_STD
from gcssl.errors import UserError
from gcssl.models.functional import attend, conv, drop_path, to_windows
from gcssl.models.hidden import average, blind_keys, hide, hide_tokens, spread
from gcssl.models.visible import visible_map
from gcssl.models.windows import STRIDES, RelPosBias, check_size, pair, query_levels

WINDOW_RATIO = (32, 32, 16, 32)  # a stage's window has side / ratio tokens a side


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], is_global: bool, mode: str) -> None:
        super().__init__()
        self.num_heads, self.is_global = num_heads, is_global
        self.qkv = nn.Linear(dim, dim * (2 if is_global else 3))
        self.rel_pos = RelPosBias(window, num_heads, mode)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, query: Tensor, window: tuple[int, int], blind: Tensor | None = None) -> Tensor:
        """x: B W N C; query: B N C, used by global blocks only; blind: B W N keys left out -> B W N C."""
        b, w, n, c = x.shape
        parts = self.qkv(x).view(b, w, n, -1, self.num_heads, c // self.num_heads).unbind(3)  # B W N K D each
        if self.is_global:
            parts = (query.view(b, 1, n, self.num_heads, -1), *parts)
        q, k, v = (t.transpose(2, 3) for t in parts)  # B W K N D
        out = attend(q, k, v, self.rel_pos(window), blind=blind)
        return self.proj(out.transpose(2, 3).reshape(b, w, n, c))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm attention and MLP, optional layer scale; `is_global` blocks take their query from outside."""

    def __init__(
        self, dim: int, num_heads: int, window: tuple[int, int], is_global: bool, mlp_ratio: float,
        layer_scale: float | None, mode: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rate = 0.0  # drop path rate, set by GCViT
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, window, is_global, mode)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = (nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in "12")

    def forward(
        self, x: Tensor, query: Tensor, window: tuple[int, int], noise: Tensor | None, blind: Tensor | None = None
    ) -> Tensor:
        """x: B W N C, query: B N C, noise: 2 B or None, blind: B W N or None -> B W N C."""
        first, second = (None, None) if noise is None else noise.unbind(0)
        x = x + drop_path(self.ls1(self.attn(self.norm1(x), query, window, blind)), self.rate, first)
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), self.rate, second)


class SqueezeExcite(nn.Module):
    """Channel gates from the map's average. Weights have the shape of timm's 1x1 convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = max(8, int(dim / 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor, sites: Tensor | None = None) -> Tensor:
        """x: B H W C, 0 at the hidden sites B H W 1, of which the average takes none."""
        s = F.gelu(F.linear(average(x, sites), self.fc1.weight.flatten(1)))  # B hidden
        return x * F.linear(s, self.fc2.weight.flatten(1)).sigmoid()[:, None, None]


class ConvBlock(nn.Module):
    """x + PW(SE(GELU(DW3x3(x)))), B H W C: the unit of stem, downsampler and query generator."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.se = SqueezeExcite(dim)
        self.conv_pw = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        sites = spread(hidden, *x.shape[1:3])
        x = hide(x, sites)
        y = hide(F.gelu(conv(x, self.conv_dw)), sites)
        return x + F.linear(self.se(y, sites), self.conv_pw.weight.flatten(1))


class Downsample(nn.Module):
    """LN, conv block, 3x3 stride-2 convolution, LN: B H W C -> B H/2 W/2 C'."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv_block = ConvBlock(dim)
        self.reduction = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.norm2(conv(self.conv_block(self.norm1(x), hidden), self.reduction))


class Stem(nn.Module):
    """Pixels B 3 H W -> tokens B H/4 W/4 C. They overlap: one sees 11 x 11 pixels, and all through SE."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, stride=2, padding=1)
        self.down = Downsample(dim, dim)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        if hidden is not None:
            x = hide(x.permute(0, 2, 3, 1), spread(hidden, *x.shape[2:])).permute(0, 3, 1, 2)
        x = self.conv1(x.contiguous(memory_format=torch.channels_last))
        return self.down(x.permute(0, 2, 3, 1), hidden)


class QueryGenerator(nn.Module):
    """The stage's input pooled to the window's grid, once per image: B H W C -> B N C."""

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.blocks = nn.ModuleDict({f"conv{i + 1}": ConvBlock(dim) for i in range(max(1, levels))})
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        for block in self.blocks.values():
            x = block(x, hidden)
            if self.levels:
                x = conv(hide(x, spread(hidden, *x.shape[1:3]), -math.inf), self.pool)
                x = hide(x, spread(hidden, *x.shape[1:3]))
        return x.flatten(1, 2).contiguous()


class Stage(nn.Module):
    def __init__(self, downsample: nn.Module, levels: int, blocks: list[Block], norm: nn.Module, dim: int) -> None:
        super().__init__()
        self.downsample = downsample
        self.global_block = QueryGenerator(dim, levels)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.grad_checkpointing = False

    def forward(
        self, x: Tensor, window: tuple[int, int], noise: Tensor | None, blocks: list[Tensor] | None,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x: B H W C, noise: 2*depth B -> B H' W' C'. Each block's token average (B C) goes to `blocks`."""
        if isinstance(self.downsample, Downsample):
            x = self.downsample(x, hidden)
        query = self.global_block(x, hidden)
        b, h, w, c = x.shape
        (wh, ww), rows, cols = window, h // window[0], w // window[1]
        x, sites = to_windows(x, window), spread(hidden, h, w)
        sites = None if sites is None else to_windows(sites, window)  # B W N 1
        blind = blind_keys(sites)
        for i, block in enumerate(self.blocks):
            args = (x, query, window, None if noise is None else noise[2 * i : 2 * i + 2], blind)
            keep = self.grad_checkpointing and self.training and torch.is_grad_enabled()
            x = checkpoint(block, *args, use_reentrant=False) if keep else block(*args)
            if blocks is not None:
                blocks.append(average(hide(x, sites), sites))
        x = x.view(b, rows, cols, wh, ww, c).transpose(2, 3).reshape(b, h, w, c)
        return self.norm(x)


class Head(nn.Module):
    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def init_weights(module: nn.Module) -> None:
    """Linears (squeeze-excite too) and tables trunc-normal 0.02, biases 0, norms 1/0; convolutions torch's own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SqueezeExcite):
        nn.init.trunc_normal_(module.fc1.weight, std=0.02)
        nn.init.trunc_normal_(module.fc2.weight, std=0.02)
    elif isinstance(module, RelPosBias):
        nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
    elif isinstance(module, LayerScale):
        nn.init.constant_(module.gamma, module.value)


class GCViT(nn.Module):
    """The backbone. `img_size` is where the bias tables live; it takes any sides that are multiples of 32."""

    stride, strides = 32, STRIDES
    interpolation = "bicubic"

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 19, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        img_size: int | Sequence[int] = 224,
        window_ratio: Sequence[int] = WINDOW_RATIO,
        bias_resize: str = "bicubic",
        drop_path: float = 0.0,
        num_classes: int = 0,
        in_chans: int = 3,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if bias_resize not in ("bicubic", "crop"):
            raise UserError(f"bias_resize {bias_resize!r}: expected bicubic or crop")
        if not 0.0 <= drop_path < 1.0:
            raise UserError(f"drop_path {drop_path}: expected a rate in [0, 1)")
        self.name = "gcvit"
        self.model_args: dict[str, Any] = {
            "embed_dim": embed_dim, "depths": list(depths), "num_heads": list(num_heads),
            "mlp_ratio": mlp_ratio, "layer_scale": layer_scale, "img_size": list(pair(img_size)),
            "window_ratio": list(window_ratio), "bias_resize": bias_resize, "drop_path": drop_path,
            "num_classes": num_classes, "in_chans": in_chans, "grad_checkpointing": grad_checkpointing,
        }  # fmt: skip
        self.img_size, self.depths, self.window_ratio = pair(img_size), tuple(depths), tuple(window_ratio)
        self.channels = tuple(embed_dim * 2**i for i in range(4))
        self.num_features, self.num_classes, self.n_noise = self.channels[-1], num_classes, 2 * sum(depths)
        self.mean, self.std = (IMAGENET_MEAN, IMAGENET_STD) if in_chans == 3 else ((0.5,) * in_chans,) * 2
        self.crop_pct = 0.875 if min(self.img_size) >= 160 else 1.0  # small images have no border to spare
        levels = query_levels(window_ratio)
        self.windows = self.windows_at(self.img_size)
        self._visible_map = visible_map  # which compile() replaces
        self.stem = Stem(in_chans, embed_dim)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(self.channels):
            blocks = [
                Block(dim, num_heads[i], self.windows[i], k % 2 == 1, mlp_ratio, layer_scale, bias_resize)
                for k in range(depths[i])
            ]
            down = Downsample(dim // 2, dim) if i else nn.Identity()
            norm = nn.LayerNorm(dim) if i == 3 else nn.Identity()
            self.stages.append(Stage(down, levels[i], blocks, norm, dim))
        self.head = Head(self.num_features, num_classes)
        self.apply(init_weights)
        self.set_drop_path(drop_path)
        self.set_grad_checkpointing(grad_checkpointing)

    def windows_at(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Each stage's window (height, width) in tokens for images of `size` pixels; UserError if illegal."""
        check_size(size, max(self.stride, *self.window_ratio))
        return [(size[0] // r, size[1] // r) for r in self.window_ratio]

    def set_drop_path(self, rate: float) -> None:
        """Drop path rates rise linearly from 0 (first block) to `rate` (last block)."""
        self.drop_path = self.model_args["drop_path"] = rate
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        for k, block in enumerate(blocks):
            block.rate = rate * k / max(1, len(blocks) - 1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model_args["grad_checkpointing"] = enable
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of what all forward passes share."""
        self._maps = torch.compile(self._maps, *args, **kwargs)  # type: ignore[method-assign]
        self._visible_map = torch.compile(self._visible_map, *args, **kwargs)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head; 0 classes: none, forward then returns the pooled features."""
        like = self.stem.conv1.weight
        self.num_classes = self.model_args["num_classes"] = num_classes
        self.head = Head(self.num_features, num_classes).to(like.device, like.dtype)
        self.head.apply(init_weights)

    def _noise(self, x: Tensor, noise: Tensor | None) -> list[Tensor] | list[None]:
        """Each stage's uniforms for drop path, 2*depth B: given, or drawn where needed; None without drop path."""
        if not self.training or self.drop_path == 0.0:
            return [None] * 4
        if noise is None:
            noise = torch.rand(self.n_noise, x.shape[0], device=x.device)
        return list(noise.split([2 * depth for depth in self.depths]))

    def _maps(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        noise: Tensor | None = None,
        blocks: list[Tensor] | None = None,
        hidden: Tensor | None = None,
    ) -> list[Tensor]:
        """B 3 H W -> the stages' four maps B h w C, the last one normed; block averages go to `blocks`."""
        windows = self.windows_at((x.shape[-2], x.shape[-1]))
        x = self.stem(x, hidden)
        if mask is not None and mask_token is not None:
            x = hide_tokens(x, mask, mask_token)
        maps = []
        for stage, window, uniforms in zip(self.stages, windows, self._noise(x, noise), strict=True):
            x = stage(x, window, uniforms, blocks, hidden)
            maps.append(x)
        return maps

    def forward_features(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """B 3 H W -> B C H/32 W/32, normed.

        mask: B h w, True = hidden, any unit that divides the stride-4 grid; mask_token: C, written over
        hidden tokens. noise: n_noise B, uniforms for drop path (rows 2k and 2k+1: block k's attention and
        MLP); drawn from torch's generator when absent.
        """
        return self._maps(x, mask, mask_token, noise)[-1].permute(0, 3, 1, 2)

    def forward_visible(
        self, x: Tensor, mask: Tensor, noise: Tensor | None = None, dense: bool = False, n_visible: int | None = None
    ) -> Tensor:
        """B 3 H W -> B C H/32 W/32, normed, as if what mask (B h w, True = hidden) covers did not exist.

        Hidden sites are 0 for every convolution, left out of every average and pooling and no key of attention;
        0 in the result too. A query of the global blocks at a hidden place is 0. The units are multiples of 32 px
        and of the window ratios, so that every token and query is hidden as a whole. Computed is what is visible,
        n_visible units of each image (counted when absent), or with `dense` everything: the slow reference.
        """
        if dense:
            last = self._maps(x, noise=noise, hidden=mask)[-1]
            return hide(last, spread(mask, *last.shape[1:3])).permute(0, 3, 1, 2)
        return self._visible_map(self, x, mask, n_visible, self._noise(x, noise)).permute(0, 3, 1, 2)

    def forward_pyramid(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> list[Tensor]:
        """B 3 H W -> four maps B C h w at strides 4, 8, 16, 32; the last one is normed. See forward_features."""
        return [m.permute(0, 3, 1, 2) for m in self._maps(x, mask, mask_token, noise)]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """B 3 H W -> logits, or the average-pooled features B C when there is no head."""
        return self.head.fc(self._maps(x, noise=noise)[-1].mean((1, 2)))

    def pooled(self, x: Tensor) -> dict[str, Tensor]:
        """Average-pooled probe features: last B C, last4 B (C of 4 blocks), stages34 B (C3 + C4), stage1..3."""
        blocks: list[Tensor] = []
        maps = [m.mean((1, 2)) for m in self._maps(x, blocks=blocks)]
        joined = {"last4": torch.cat([*blocks[-4:-1], maps[3]], 1), "stages34": torch.cat(maps[2:], 1)}
        return {"last": maps[3], **joined, **{f"stage{i}": mean for i, mean in enumerate(maps[:3], 1)}}

    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if n.endswith("relative_position_bias_table")}

    def layer_ids(self) -> dict[str, int]:
        """Each parameter's depth: stem 0, blocks from 1, head last; downsamplers go with the block before."""
        return {n: self._layer_id(n.split(".")) for n, _ in self.named_parameters()}

    def _layer_id(self, path: list[str]) -> int:
        if path[0] != "stages":
            return 0 if path[0] == "stem" else sum(self.depths) + 1
        before = sum(self.depths[: int(path[1])])
        if path[2] == "blocks":
            return before + int(path[3]) + 1
        return before + {"downsample": 0, "global_block": 1, "norm": self.depths[-1]}[path[2]]
