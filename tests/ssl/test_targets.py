import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gcssl.errors import UserError
from gcssl.models.hidden import upsample_mask
from gcssl.ssl.targets import (
    check_target,
    hidden_std,
    hog,
    make_target,
    mse_hidden,
    norm_pixels,
    reconstruction,
    target_loss,
    unit_moments,
)

Make = Callable[..., Any]


def ramp(angle: float, side: int = 16) -> Tensor:
    """1 1 side side: brightness that rises along `angle` degrees (0: to the right, 90: down)."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle)))[None, None]


def test_norm_pixels_by_hand() -> None:
    x = torch.zeros(1, 3, 8, 8)
    x[0, 0, 0, 0] = 48.0  # one of the 48 values of the first 4 x 4 cell: mean 1, unbiased variance 48
    y = norm_pixels(x, 4)
    assert y[0, 0, 0, 0].item() == pytest.approx(47 / 48**0.5)
    assert y[0, 1, 3, 3].item() == pytest.approx(-1 / 48**0.5)
    assert (y[..., 4:] == 0).all() and (y[:, :, 4:] == 0).all()  # constant cells: finite, 0


def test_norm_pixels_equals_a_slow_version_and_is_undone_by_its_moments() -> None:
    x = torch.randn(2, 3, 16, 24)
    y = norm_pixels(x, 8)
    for i in range(2):
        for row in range(2):
            for col in range(3):
                where = (i, slice(None), slice(8 * row, 8 * row + 8), slice(8 * col, 8 * col + 8))
                cell = x[where].flatten()
                want = (x[where] - cell.mean()) / (((cell - cell.mean()) ** 2).sum() / (len(cell) - 1) + 1e-6).sqrt()
                torch.testing.assert_close(y[where], want)
    mean, std = unit_moments(x, 8)
    torch.testing.assert_close(y * std + mean, x)


def slow_hog(x: Tensor, cell: int) -> Tensor:
    """One pixel at a time, in degrees."""
    channels, height, width = x.shape
    out = torch.zeros(channels * 9, height // cell, width // cell)
    at = F.pad(x, (1, 1, 1, 1), mode="reflect")
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                around = at[c, i : i + 3, j : j + 3]
                gx, gy = (smooth @ around @ slope).item(), (slope @ around @ smooth).item()
                k = int(math.degrees(math.atan2(gx, gy)) % 180 // 20)
                out[9 * c + k, i // cell, j // cell] += math.hypot(gx, gy)
    blocks = out.view(channels, 9, height // cell, width // cell)
    return (blocks / blocks.norm(dim=1, keepdim=True)).view_as(out)


@pytest.mark.parametrize("cell", [4, 8])
def test_hog_equals_a_slow_version(cell: int) -> None:
    x = torch.randn(1, 3, 16, 24)
    assert hog(x, cell).shape == (1, 27, 16 // cell, 24 // cell)
    torch.testing.assert_close(hog(x, cell)[0], slow_hog(x[0], cell), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("angle", [0, 20, 60, 100, 160, 180, 260, 340])
def test_hog_of_a_ramp_is_one_bin_whatever_its_sign_and_strength(angle: int) -> None:
    inner = hog(ramp(angle, 24), 8)[0, :, 1, 1]  # 9, away from the border
    assert inner.argmax() == (90 - angle) % 180 // 20 and inner.max().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(hog(-7 * ramp(angle, 24) + 3, 8)[0, :, 1, 1], inner)


def test_hog_of_a_flat_cell_is_zero() -> None:
    assert torch.equal(hog(torch.full((1, 3, 16, 16), 5.0), 8), torch.zeros(1, 27, 2, 2))


@pytest.mark.parametrize("kind, expected", [("pixels", 2.0), ("norm_pixels", 4.0), ("hog", 4.0)])
def test_loss_by_hand_of_a_prediction_that_is_2_off(kind: str, expected: float) -> None:
    x, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 4, 4) < 0.5
    mask[:, 0, 0] = True
    target = make_target(kind, x, 8)
    assert target_loss(kind, target, x, mask, 8)["loss"].item() == 0
    assert target_loss(kind, target - 2, x, mask, 8)["loss"].item() == pytest.approx(expected, rel=1e-4)
    hidden = upsample_mask(mask, *target.shape[-2:])[:, None]
    seen = torch.where(hidden, target, target + 9)
    assert target_loss(kind, seen, x, mask, 8)["loss"].item() == 0  # visible: no matter


def test_one_prediction_for_all_images_shows() -> None:
    """Hidden parts alone count, site by site over the images that hide it; the target's own spread is worth 1."""
    x, mask = torch.randn(8, 3, 32, 32), torch.rand(8, 4, 4) < 0.6
    hidden = upsample_mask(mask, 32, 32)[:, None]
    preds = (torch.where(hidden, x[:1], x), x, 3 - x / 2, torch.where(hidden, x, 100 * torch.randn_like(x)))
    shares = [target_loss("pixels", pred, x, mask, 8)["prediction_std"].item() for pred in preds]
    assert shares == pytest.approx([0.0, 1.0, 0.5, 1.0], abs=1e-6)
    assert "prediction_std" not in target_loss("pixels", x[:1], x[:1], mask[:1], 8)
    flat = target_loss("pixels", x, torch.ones_like(x), mask, 8)["prediction_std"]  # no target differs
    assert flat.isfinite()


def test_hidden_std_equals_a_slow_version() -> None:
    x, mask = torch.randn(5, 2, 8, 8), torch.rand(5, 2, 2) < 0.6
    squares, count = 0.0, 0
    for y in range(8):
        for column in range(8):
            there = x[mask[:, y // 4, column // 4], :, y, column]  # n 2
            if len(there):
                squares, count = squares + (there - there.mean(0)).square().sum().item(), count + there.numel()
    assert hidden_std(x, mask).item() == pytest.approx((squares / count) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("size, steps", [((64, 256), (4, 16)), ((256, 64), (16, 4)), ((31, 32), (1, 2))])
def test_hidden_std_looks_at_16_to_31_sites_an_axis(size: tuple[int, int], steps: tuple[int, int]) -> None:
    x, mask = torch.randn(4, 3, *size), torch.ones(4, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(hidden_std(x, mask), hidden_std(x[..., :: steps[0], :: steps[1]], mask))


@pytest.mark.parametrize(
    "name, last", [("simmim", "head"), ("localmim", "heads.3"), ("mae", "decoder.pred"), ("ummae", "decoder.pred")]
)
def test_a_head_that_has_died_shows_in_each_masked_objective(
    name: str, last: str, make_objective: Make, draw_batch: Make
) -> None:
    size = {"mae": (96, 96), "ummae": (128, 128)}.get(name, (64, 64))
    objective = make_objective(name, size=size, **({"decoder_dim": 32} if "mae" in name else {}))
    batch = draw_batch(objective, 4, size)
    assert objective(batch, 0)["prediction_std"] > 0.01
    if name == "localmim":
        torch.nn.init.zeros_(objective.heads[0].proj.weight)
        assert objective(batch, 0)["prediction_std"] > 0.01  # that of the last stage
    for parameter in objective.get_submodule(last).parameters():
        torch.nn.init.zeros_(parameter)
    assert objective(batch, 0)["prediction_std"] == 0


def test_squared_error_is_a_mean_per_sample() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = mask[1] = True
    pred, x = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    alone = [mse_hidden(pred[i : i + 1], x[i : i + 1], mask[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(mse_hidden(pred, x, mask), torch.stack(alone).mean())
    assert alone[0].item() == pytest.approx((pred - x)[0, :, :8, :8].square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["norm_pixels", "hog"])
def test_targets_and_losses_stay_in_fp32_under_autocast(kind: str) -> None:
    x, mask = torch.randn(2, 3, 32, 32), torch.ones(2, 4, 4, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        target = make_target(kind, x, 8)
        loss = target_loss(kind, target.bfloat16(), x, mask, 8)["loss"]
    assert target.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(target, make_target(kind, x, 8))


def test_what_hog_cannot_do_is_refused() -> None:
    check_target("hog", 16, 32)
    with pytest.raises(UserError, match="mask_unit=12: .*hog needs a multiple of 8"):
        check_target("hog", 12, 32)
    with pytest.raises(UserError, match="stride is a multiple of 8, given 4"):
        check_target("hog", 16, 4)
    with pytest.raises(UserError, match="target=rgb is unknown; one of pixels, norm_pixels, hog"):
        check_target("rgb", 16, 32)


def test_a_perfect_prediction_of_normalised_pixels_shows_the_image(make_encoder: Make) -> None:
    encoder, x = make_encoder(), torch.rand(2, 3, 64, 64) * 0.5
    mask = torch.rand(2, 8, 8) < 0.5
    shown = reconstruction(encoder, x, mask, x, norm_pixels(x, 8), "norm_pixels", 8)
    torch.testing.assert_close(shown["reconstructed"], shown["original"])
