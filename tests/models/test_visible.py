"""The encoder that computes visible units only, against the dense reference: outputs, gradients, nothing hidden."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gcssl.models.gcvit import GCViT
from gcssl.models.hidden import spread
from gcssl.models.visible import count_visible, cut, find_units, halo, paste, reach
from gcssl.plan import saved_mib

WIDE, NARROW = (32, 32, 16, 32), (16, 16, 16, 32)


def encoder_of(img_size: Any, window_ratio: tuple[int, ...], **more: Any) -> GCViT:
    """Every parameter drawn, in float64: only a wrong formula makes the two forms differ."""
    model = GCViT(16, (2, 2, 2, 2), (1, 1, 2, 2), img_size=img_size, window_ratio=window_ratio, **more).double()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.data = 0.5 * noise + 1 if p.ndim == 1 else noise / max(1, p[0].numel()) ** 0.5
    return model


def mask_of(size: tuple[int, int], visible: int, n: int = 2) -> Tensor:
    """n h w of units of 32 px, all but `visible` hidden, in each image others."""
    h, w = size[0] // 32, size[1] // 32
    order = torch.rand(n, h * w, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return (order >= visible).view(n, h, w)


def images(size: tuple[int, int], n: int = 2) -> Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def both(encoder: GCViT, size: tuple[int, int], visible: int, noise: Tensor | None = None) -> list[dict[str, Tensor]]:
    """Output and gradients of the dense and of the fast form."""
    x, mask, found = images(size), mask_of(size, visible), []
    for dense in (True, False):
        encoder.zero_grad()
        out = encoder.forward_visible(x, mask, noise, dense=dense)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)).sum().backward()
        grads = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        found.append({"out": out.detach(), **grads})
    return found


CASES = {
    "224, windows cut across units": ((224, 224), WIDE, {}),
    "128": ((128, 128), WIDE, {}),
    "128, windows of two units": ((128, 128), NARROW, {}),
    "64 by 160": ((64, 160), WIDE, {}),
    "192, tables of another size": ((192, 192), WIDE, {"img_size": 224}),
    "layer scale": ((128, 128), WIDE, {"layer_scale": 0.5}),
    "tables cropped": ((96, 128), WIDE, {"img_size": 224, "bias_resize": "crop"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.999])
def test_equals_the_dense_reference(case: str, ratio: float) -> None:
    """0.999: one unit is left."""
    size, window_ratio, more = CASES[case]
    encoder = encoder_of(**{"img_size": size, "window_ratio": window_ratio, **more}).eval()
    dense, fast = both(encoder, size, max(1, round((1 - ratio) * size[0] * size[1] / 32**2)))
    assert dense.keys() == fast.keys() and dense["out"].std() > 0.01
    for name, want in dense.items():
        torch.testing.assert_close(fast[name], want, rtol=1e-9, atol=1e-9 * float(want.abs().max()), msg=name)


def test_drop_path_and_gradient_checkpointing() -> None:
    size = (128, 128)
    noise = torch.rand(16, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    encoder = encoder_of(size, WIDE, drop_path=0.5).train()
    plain, fast = both(encoder, size, 5, noise)
    encoder.set_grad_checkpointing()
    _, kept = both(encoder, size, 5, noise)
    _, undropped = both(encoder.eval(), size, 5)
    for name, want in plain.items():
        torch.testing.assert_close(fast[name], want, rtol=1e-9, atol=1e-9 * float(want.abs().max()), msg=name)
        torch.testing.assert_close(kept[name], fast[name], rtol=1e-12, atol=1e-12, msg=name)
    assert not torch.allclose(fast["out"], undropped["out"])
    x, mask = images(size), mask_of(size, 5)
    little = saved_mib(lambda: encoder.train().forward_visible(x, mask), encoder.parameters())
    encoder.set_grad_checkpointing(False)
    assert little < 0.6 * saved_mib(lambda: encoder.forward_visible(x, mask), encoder.parameters())


def test_nothing_hidden_is_the_plain_encoder() -> None:
    encoder, x = encoder_of((128, 160), WIDE).eval(), images((128, 160))
    with torch.no_grad():
        out = encoder.forward_visible(x, torch.zeros(2, 4, 5, dtype=torch.bool))
        torch.testing.assert_close(out, encoder.forward_features(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window_ratio", [WIDE, NARROW])
def test_hidden_pixels_and_other_images_do_not_matter(window_ratio: tuple[int, ...]) -> None:
    encoder, x, mask = encoder_of(128, window_ratio).eval(), images((128, 128)), mask_of((128, 128), 5)
    broken = x.masked_fill(spread(mask, 128, 128).movedim(-1, 1), math.nan)  # type: ignore[union-attr]
    for grad in (False, True):  # both bodies of attention
        with torch.set_grad_enabled(grad):
            want = encoder.forward_visible(x, mask)
            assert torch.equal(want, encoder.forward_visible(broken, mask)) and want.isfinite().all()
            assert (want.movedim(1, -1)[mask] == 0).all() and (want.movedim(1, -1)[~mask] != 0).all()
            other = encoder.forward_visible(torch.stack([x[0], -x[1]]), torch.stack([mask[0], mask[1].flip(0)]))
            torch.testing.assert_close(other[0], want[0], rtol=1e-12, atol=1e-12)


def test_masks_that_leave_unequal_counts_are_refused() -> None:
    mask = mask_of((128, 128), 5)
    assert count_visible(mask) == 5
    mask[0] = True
    with pytest.raises(ValueError, match=r"leave \[0, 5\] units visible: expected equally many"):
        count_visible(mask)
    with pytest.raises(ValueError, match="does not tile"):
        encoder_of(128, WIDE).forward_visible(images((128, 128)), torch.zeros(2, 8, 8, dtype=torch.bool))


def test_autocast_runs_and_stays_near() -> None:
    encoder, x, mask = encoder_of(128, WIDE).float().eval(), images((128, 128)).float(), mask_of((128, 128), 5)
    with torch.no_grad():
        want = encoder.forward_visible(x, mask)
        with torch.autocast("cpu", torch.bfloat16):
            out = encoder.forward_visible(x, mask)
    assert (out - want).norm() < 0.1 * want.norm()


def test_units_go_out_and_back_and_see_their_neighbours() -> None:
    mask = mask_of((96, 128), 6)
    units = find_units(mask)
    x = torch.arange(2 * 12 * 16, dtype=torch.float64).view(2, 12, 16, 1) + 1  # 3 x 4 units of 4 x 4
    sites = spread(mask, 12, 16)
    assert sites is not None
    whole = x.masked_fill(sites, 0.0)
    cuts = cut(x.movedim(-1, 1), units)
    assert cuts.shape == (2, 6, 4, 4, 1) and torch.equal(paste(cuts, units), whole)
    around = halo(cuts, units, 1, fill=0.0)  # 12 1 6 6
    padded = torch.nn.functional.pad(whole[..., 0], (1, 1, 1, 1))
    for i, place in enumerate(units.at.flatten().tolist()):
        row, col = divmod(place, 4)
        window = padded[i // 6, 4 * row : 4 * row + 6, 4 * col : 4 * col + 6]
        assert torch.equal(around[i, 0], window)


def test_reach_counts_windows_that_a_unit_touches() -> None:
    assert (reach(7, 8, 7), reach(7, 4, 7), reach(4, 8, 8), reach(4, 2, 8)) == (2, 2, 1, 1)
