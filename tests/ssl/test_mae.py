import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.models.gcvit import GCViT
from gcssl.models.hidden import upsample_mask
from gcssl.ssl.targets import hog

Make = Callable[..., Any]
SIZE = (128, 128)


@pytest.fixture
def mae(make_objective: Make) -> Any:
    return make_objective("mae", size=SIZE, decoder_dim=32, decoder_depth=2)


def test_mask_leak_none_from_hidden_pixels(mae: Any, draw_batch: Make, scramble: Make) -> None:
    batch = draw_batch(mae.eval(), 2, SIZE)
    mask = batch["masks"][0]
    with torch.no_grad():
        want = mae.predict(batch)
        assert torch.equal(want, mae.predict(scramble(batch)))
        assert not torch.equal(want, mae.predict(scramble(batch, ~mask)))
        plain = [mae.encoder.forward_features(b["views"][0], mask) for b in (batch, scramble(batch))]
        assert not torch.equal(*plain)  # control


@pytest.mark.parametrize("target, side", [("norm_pixels", 32), ("norm_pixels", 64), ("pixels", 32), ("hog", 64)])
def test_loss_equals_a_slow_version_over_hidden_units(
    make_objective: Make, draw_batch: Make, target: str, side: int
) -> None:
    mae = make_objective("mae", size=SIZE, mask_unit=side, decoder_dim=32, decoder_depth=1, target=target)
    batch = draw_batch(mae, 2, SIZE)
    x, mask = batch["views"][0], batch["masks"][0]
    pred, errors = mae.predict(batch), []
    wanted, cells = (hog(x, 8), side // 8) if target == "hog" else (x, side)  # a unit's side in the prediction
    for i, row, col in mask.nonzero().tolist():
        rows, cols = (slice(cells * at, cells * at + cells) for at in (row, col))
        unit, given = wanted[i, :, rows, cols], pred[i, :, rows, cols]
        if target == "norm_pixels":
            unit = (unit - unit.mean()) / (unit.var() + 1e-6).sqrt()
        errors.append((given - unit).abs().mean() if target == "pixels" else (given - unit).square().mean())
    assert len(errors) == 2 * {32: 12, 64: 3}[side]
    torch.testing.assert_close(mae(batch, 0)["loss"], torch.stack(errors).mean())


def test_two_samples_are_the_mean_of_each_alone(mae: Any, draw_batch: Make) -> None:
    batch = draw_batch(mae, 2, SIZE)
    halves = [mae({k: [v[i : i + 1] for v in batch[k]] for k in ("views", "masks")}, 0)["loss"] for i in (0, 1)]
    torch.testing.assert_close(mae(batch, 0)["loss"], torch.stack(halves).mean())


@pytest.mark.parametrize("unit", [32, 64])
def test_gradient_reaches_every_parameter(make_objective: Make, draw_batch: Make, unit: int) -> None:
    mae = make_objective("mae", size=SIZE, decoder_dim=32, decoder_depth=1, mask_unit=unit, mask_ratio=0.5)
    mae(draw_batch(mae, 2, SIZE), 0)["loss"].backward()
    assert not [n for n, p in mae.named_parameters() if p.grad is None or not p.grad.any()]


def test_bf16_run_has_an_fp32_loss(mae: Any, draw_batch: Make) -> None:
    batch = draw_batch(mae, 2, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mae(batch, 0)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mae(batch, 0)["loss"], rtol=0.02, atol=0)


def test_draw_pickles_and_hides_three_quarters(mae: Any) -> None:
    views, masks = pickle.loads(pickle.dumps(mae.draw))(np.random.default_rng(0), (128, 160))
    assert masks[0].shape == (4, 5) and masks[0].sum() == 15 and views[0][0].scale == (0.2, 1.0)


@pytest.mark.parametrize(
    "cfg, told",
    [
        ({"mask_unit": 16}, "mask_unit=16: mae hides whole tokens and queries, so multiples of 32"),
        ({"mask_unit": 96}, "mask_unit=96 does not fit"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"decoder_dim": 16}, "decoder_dim=16"),
        ({"target": "rgb"}, "target=rgb is unknown; one of pixels, norm_pixels, hog"),
    ],
)
def test_bad_values_are_refused_in_one_line(make_objective: Make, cfg: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        make_objective("mae", size=SIZE, **{"decoder_dim": 32, **cfg})
    assert "\n" not in str(error.value)


def test_other_backbones_and_windows_that_split_units_are_refused(make_objective: Make) -> None:
    with pytest.raises(UserError, match="mae: needs GC ViT, .*given resnet10t"):
        make_objective("mae", build_backbone("resnet10t", 64))
    wide = GCViT(16, (1, 1, 1, 1), (1, 1, 2, 2), img_size=128, window_ratio=(64, 32, 16, 32))
    with pytest.raises(UserError, match="mask_unit=32: .* multiples of 64"):
        make_objective("mae", wide, size=SIZE)
    with pytest.raises(UserError, match="share=true: mae drops what it hides"):
        make_objective("joint", masked="mae", share=True)


def test_pictures_undo_the_units_moments(mae: Any, draw_batch: Make) -> None:
    batch = draw_batch(mae.eval(), mae.n_pictures, SIZE)
    shown = mae.pictures(batch)
    assert set(shown) == {"original", "hidden", "reconstructed"}
    assert all(p.shape == (8, 3, *SIZE) and 0 <= p.min() and p.max() <= 1 for p in shown.values())
    hidden = upsample_mask(batch["masks"][0], *SIZE)[:, None].expand_as(shown["original"])
    assert torch.equal(shown["original"][~hidden], shown["reconstructed"][~hidden])
    assert not torch.equal(shown["original"][hidden], shown["reconstructed"][hidden])


def test_overfits_a_few_images(make_objective: Make, draw_batch: Make) -> None:
    mae = make_objective("mae", decoder_dim=64, decoder_depth=1)
    batch = draw_batch(mae, 16)
    optimizer = torch.optim.AdamW(mae.parameters(), 3e-3)
    losses = []
    for step in range(60):
        loss = mae(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * min(1.0, losses[0]), losses[::10]  # 1: that of predicting nothing
