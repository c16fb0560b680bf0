"""GC ViT with hidden units that take no part: bit-equal whatever they hold, and equal to slow versions without them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.models.gcvit import Attention, ConvBlock, Downsample, GCViT, QueryGenerator, Stage, Stem, attend, to_windows
from gcssl.models.hidden import average, blind_keys, spread

SIZE = 128


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter drawn, so that no term is hidden by a zero bias or a unit norm."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.data = 0.5 * noise + 1 if p.ndim == 1 else noise / max(1, p[0].numel()) ** 0.5
    return model.eval()


@pytest.fixture(params=[(32, 32, 16, 32), (16, 16, 16, 32)], ids=["ratio32", "ratio16"])
def encoder(request: pytest.FixtureRequest) -> GCViT:
    model = GCViT(16, (2, 2, 2, 2), (1, 1, 2, 2), img_size=SIZE, window_ratio=request.param)
    return randomise(model)  # type: ignore[return-value]


def mask_of(n: int = 2, hidden: int = 11, side: int = 4) -> Tensor:
    """n side side: `hidden` units of side * side at random."""
    order = torch.rand(n, side * side, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return (order < hidden).view(n, side, side)


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def at_visible(x: Tensor, mask: Tensor) -> Tensor:
    """The visible sites of B C h w, as rows."""
    sites = spread(mask, *x.shape[2:])
    assert sites is not None
    return x.movedim(1, -1)[~sites[..., 0]]


# ---- the whole encoder


def test_hidden_pixels_change_nothing(encoder: GCViT) -> None:
    x, mask = images(), mask_of()
    pixels = spread(mask, SIZE, SIZE).movedim(-1, 1)
    loud = torch.where(pixels, 100 * torch.randn_like(x), x)
    broken = x.masked_fill(pixels, math.nan)
    for grad in (False, True):  # both bodies of attention
        with torch.set_grad_enabled(grad):
            want = encoder.forward_visible(x, mask, dense=True)
            assert want.isfinite().all() and at_visible(want, mask).std() > 0.1
            assert (at_visible(want, ~mask) == 0).all()
            assert torch.equal(want, encoder.forward_visible(loud, mask, dense=True))
            assert torch.equal(want, encoder.forward_visible(broken, mask, dense=True))
    with torch.no_grad():  # controls: they reach a plain forward, and visible pixels this one
        assert not torch.equal(encoder.forward_features(x), encoder.forward_features(loud))
        assert not torch.equal(
            want, encoder.forward_visible(torch.where(pixels, x, 100 * torch.randn_like(x)), mask, dense=True)
        )


NOISY = (Stem, Stage, Downsample, Attention)  # a convolution block promises 0 to the convolution behind it


def add_noise(encoder: GCViT, mask: Tensor, kinds: tuple[type, ...]) -> GCViT:
    """A copy of which every module of `kinds` ends in noise at hidden sites, inside windows too."""
    noisy = copy.deepcopy(encoder)
    windows: dict[nn.Module, tuple[int, int]] = {}

    def on_map(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:  # noqa: ARG001
        sites = spread(mask, *out.shape[1:3])
        return torch.where(sites, 10 * torch.randn_like(out), out)

    def on_windows(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        side = windows[module]
        sites = to_windows(spread(mask, side[0], side[1]), args[2])  # type: ignore[arg-type]
        return torch.where(sites, 10 * torch.randn_like(out), out)

    for module in noisy.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(on_windows if isinstance(module, Attention) else on_map)
    for i, stage in enumerate(noisy.stages):
        windows |= {block.attn: (SIZE // (4 << i), SIZE // (4 << i)) for block in stage.blocks}
    return noisy


@pytest.mark.parametrize("kind", NOISY)
def test_values_of_hidden_tokens_change_nothing(encoder: GCViT, kind: type) -> None:
    x, mask = images(), mask_of()
    with torch.no_grad():
        want = encoder.forward_visible(x, mask, dense=True)
        assert torch.equal(want, add_noise(encoder, mask, (kind,)).forward_visible(x, mask, dense=True))
        noisy = add_noise(encoder, ~mask, (kind,))  # control: visible ones do
        assert not torch.equal(want, noisy.forward_visible(x, mask, dense=True))


def test_nothing_hidden_is_the_plain_forward_bit_for_bit(encoder: GCViT) -> None:
    none = torch.zeros(2, 4, 4, dtype=torch.bool)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(encoder.forward_visible(images(), none, dense=True), encoder.forward_features(images()))


def test_each_sample_has_its_own_mask_and_batch_mates_do_not_matter(encoder: GCViT) -> None:
    x, mask = images(), mask_of()
    assert not torch.equal(mask[0], mask[1])
    with torch.no_grad():
        both = encoder.forward_visible(x, mask, dense=True)
        for i in range(2):
            torch.testing.assert_close(
                both[i : i + 1], encoder.forward_visible(x[i : i + 1], mask[i : i + 1], dense=True)
            )


def test_gradients_are_finite_and_hidden_pixels_get_none(encoder: GCViT) -> None:
    x, mask = images().requires_grad_(), mask_of()
    encoder.train()
    at_visible(encoder.forward_visible(x, mask, dense=True), mask).square().sum().backward()
    pixels = spread(mask, SIZE, SIZE).movedim(-1, 1).expand_as(x)
    assert (x.grad[pixels] == 0).all() and x.grad[~pixels].any()
    assert not [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_checkpointing_and_bf16(encoder: GCViT) -> None:
    x, mask = images(), mask_of()
    want = encoder.train().forward_visible(x, mask, dense=True)
    encoder.set_grad_checkpointing()
    assert torch.equal(encoder.forward_visible(x, mask, dense=True), want)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder.forward_visible(x, mask, dense=True)
    assert half.isfinite().all()
    assert F.cosine_similarity(at_visible(half.float(), mask), at_visible(want, mask)).min() > 0.99


def test_units_that_split_a_token_are_refused(encoder: GCViT) -> None:
    with pytest.raises(ValueError, match="does not tile 4x4"):
        encoder.forward_visible(images(), mask_of(side=8), dense=True)


def test_block_averages_are_over_visible_tokens(encoder: GCViT) -> None:
    mask, blocks = mask_of(), []
    encoder.stages[3].norm = nn.Identity()
    with torch.no_grad():
        last = encoder._maps(images(), blocks=blocks, hidden=mask)[-1]  # B h w C
    want = torch.stack([last[i][~mask[i]].mean(0) for i in range(2)])
    assert len(blocks) == 8
    torch.testing.assert_close(blocks[-1], want)


# ---- its parts, against slow versions that never see a hidden site


def slow_attention(attn: Attention, x: Tensor, query: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    """Attention of n visible tokens x (n C) of one window, one head at a time; keep: their places in the window."""
    n, c = x.shape
    parts = attn.qkv(x).view(n, -1, attn.num_heads, c // attn.num_heads)  # n parts K D
    out = torch.empty(n, attn.num_heads, c // attn.num_heads)
    for head in range(attn.num_heads):
        k, v = parts[:, -2, head], parts[:, -1, head]
        q = query.view(len(query), attn.num_heads, -1)[keep, head] if attn.is_global else parts[:, 0, head]
        scores = q @ k.T / k.shape[1] ** 0.5 + bias[head][keep][:, keep]
        out[:, head] = scores.softmax(-1) @ v
    return attn.proj(out.reshape(n, c))


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_stage_equals_one_that_has_the_visible_tokens_only(encoder: GCViT, level: int) -> None:
    stage, side = encoder.stages[level], SIZE // (4 << level)
    window = encoder.windows[level]
    mask = mask_of(hidden=10)
    stage.downsample, stage.norm = nn.Identity(), nn.Identity()
    x = torch.randn(2, side, side, encoder.channels[level])
    with torch.no_grad():
        got = stage(x, window, None, None, mask)
        query = stage.global_block(x, mask)  # B N C
        sites = to_windows(spread(mask, side, side), window)[..., 0]  # B W N
        for b in range(2):
            for w, tokens in enumerate(to_windows(x, window)[b]):
                keep = (~sites[b, w]).nonzero()[:, 0]
                if not len(keep):
                    continue
                y = tokens[keep]
                for block in stage.blocks:
                    bias = block.attn.rel_pos(window)
                    y = y + slow_attention(block.attn, block.norm1(y), query[b], bias, keep)
                    y = y + block.mlp(block.norm2(y))
                torch.testing.assert_close(to_windows(got, window)[b, w][keep], y, rtol=1e-4, atol=1e-4)
    if window[0] < side:
        assert sites.all(-1).any()  # some windows are hidden as a whole


def slow_conv_block(block: ConvBlock, x: Tensor, seen: Tensor) -> Tensor:
    """One image h w C, one visible site at a time: neighbours that are hidden or outside add nothing."""
    h, w, c = x.shape
    weight, y = block.conv_dw.weight[:, 0], {}  # C 3 3
    for i, j in seen.nonzero().tolist():
        total = torch.zeros(c)
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                if 0 <= i + di < h and 0 <= j + dj < w and seen[i + di, j + dj]:
                    total += weight[:, di + 1, dj + 1] * x[i + di, j + dj]
        y[i, j] = F.gelu(total)
    mean = torch.stack(list(y.values())).mean(0)
    gate = (block.se.fc2.weight[:, :, 0, 0] @ F.gelu(block.se.fc1.weight[:, :, 0, 0] @ mean)).sigmoid()
    out = torch.zeros_like(x)
    for (i, j), value in y.items():
        out[i, j] = x[i, j] + block.conv_pw.weight[:, :, 0, 0] @ (value * gate)
    return out


def test_conv_block_equals_a_slow_one_over_visible_sites() -> None:
    torch.manual_seed(0)
    block, x, mask = randomise(ConvBlock(8)), torch.randn(2, 8, 8, 8), mask_of(hidden=9)
    seen = ~spread(mask, 8, 8)[..., 0]
    with torch.no_grad():
        want = torch.stack([slow_conv_block(block, x[i], seen[i]) for i in range(2)])
        torch.testing.assert_close(block(x, mask), want)


@pytest.mark.parametrize("levels", [1, 3])
def test_query_generator_pools_visible_sites_only(levels: int) -> None:
    torch.manual_seed(0)
    generator, mask = randomise(QueryGenerator(8, levels)), mask_of(hidden=9)
    side = 4 << levels
    x = torch.randn(2, side, side, 8) - 20.0  # below 0, so that a hidden site's 0 would win every maximum
    with torch.no_grad():
        got = generator(x, mask).view(2, 4, 4, 8)
        for i in range(2):
            y, seen = x[i], ~spread(mask, side, side)[i, ..., 0]
            for block in generator.blocks.values():
                y, half = slow_conv_block(block, y, seen), len(y) // 2
                pooled, visible = torch.zeros(half, half, 8), torch.zeros(half, half, dtype=torch.bool)
                for a in range(half):
                    for b in range(half):
                        rows, cols = slice(max(0, 2 * a - 1), 2 * a + 2), slice(max(0, 2 * b - 1), 2 * b + 2)
                        visible[a, b] = seen[2 * a, 2 * b]
                        if visible[a, b]:
                            pooled[a, b] = y[rows, cols][seen[rows, cols]].max(0).values
                y, seen = pooled, visible
            torch.testing.assert_close(got[i], y, rtol=1e-4, atol=1e-4)


def test_attention_leaves_blind_keys_out_and_spares_wholly_hidden_windows() -> None:
    q, k, v = torch.randn(3, 1, 2, 1, 4, 8).unbind()
    bias = torch.randn(1, 4, 4)
    sites = torch.tensor([[[True, False, True, False], [True] * 4]])[..., None]  # B W N 1
    blind = blind_keys(sites)
    assert blind.tolist() == [[[True, False, True, False], [False] * 4]]
    for body in ("matmul", "sdpa"):
        out = attend(q, k, v, bias, body, blind)
        few = [t[:, :1, :, [1, 3]] for t in (k, v)]
        want = ((q[:, :1] @ few[0].transpose(-2, -1)) / 8**0.5 + bias[:, :, [1, 3]]).softmax(-1) @ few[1]
        torch.testing.assert_close(out[:, :1], want)
        torch.testing.assert_close(out[:, 1:], attend(q[:, 1:], k[:, 1:], v[:, 1:], bias, body))


def test_average_by_hand_of_samples_that_hide_different_counts() -> None:
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[1.0, 3.0], [5.0, 7.0]]])[..., None]  # B m n C
    sites = torch.tensor([[[False, True], [False, True]], [[False, False], [False, False]]])[..., None]
    assert average(x, sites).tolist() == [[2.0], [4.0]] and average(x, None).tolist() == [[1.0], [4.0]]
    assert average(x.half(), sites).dtype == torch.float16 and average(x.double(), sites).dtype == torch.float64


def test_an_average_in_bf16_divides_by_the_share_itself() -> None:
    x, sites = torch.rand(1, 1, 7, 64), torch.zeros(1, 1, 7, 1, dtype=torch.bool)
    sites[..., 3:, :] = True
    x = x.masked_fill(sites, 0.0).bfloat16()
    wanted = (x.mean((1, 2)).float() / (3 / 7)).bfloat16()
    assert torch.equal(average(x, sites), wanted)
    assert not torch.equal(x.mean((1, 2)) / torch.tensor(3 / 7).bfloat16(), wanted)  # control
