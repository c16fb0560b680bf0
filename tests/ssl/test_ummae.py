import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.models.hidden import upsample_mask
from gcssl.ssl.masking import hide_pixels, keep_units

Make = Callable[..., Any]
SIZE = (128, 128)


@pytest.fixture
def ummae(make_objective: Make) -> Any:
    return make_objective("ummae", size=SIZE, decoder_dim=32)


def in_place(second: Tensor, mask: Tensor) -> Tensor:
    """B h w: the kept units that the secondary mask hides."""
    return upsample_mask(second, *mask.shape[1:]) & ~mask


# ---- masks


def test_draw_keeps_one_of_each_block_and_hides_a_quarter_of_those(ummae: Any) -> None:
    draw = pickle.loads(pickle.dumps(ummae.draw))
    kept = torch.zeros(8, 12)
    for seed in range(400):
        views, (mask, second) = draw(np.random.default_rng(seed), (128, 192))
        blocks = mask.reshape(4, 2, 6, 2)
        assert mask.shape == (8, 12) and ((~blocks).sum((1, 3)) == 1).all()
        assert second.shape == (4, 6) and second.sum() == 6 and second.dtype == mask.dtype == bool
        kept += torch.from_numpy(~mask)
    assert len(views) == 1 and views[0][0].size == (128, 192) and views[0][0].scale == (0.2, 1.0)
    assert abs(kept / 400 - 0.25).max() < 0.1  # 4.6 standard deviations


def test_kept_units_are_stitched_in_order() -> None:
    x = torch.arange(3 * 16 * 24.0).view(1, 3, 16, 24).repeat(2, 1, 1, 1)
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    want = torch.zeros(2, 3, 8, 12)
    for i in range(2):
        for row in range(2):
            for col in range(3):
                dy, dx = torch.randint(2, (2,), generator=generator).tolist()
                mask[i, 2 * row + dy, 2 * col + dx] = False
                top, left = 4 * (2 * row + dy), 4 * (2 * col + dx)
                want[i, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = x[i, :, top : top + 4, left : left + 4]
    assert torch.equal(keep_units(x, mask), want)


# ---- leaks


def test_nothing_of_dropped_or_secondarily_hidden_units_is_seen(ummae: Any, draw_batch: Make, scramble: Make) -> None:
    ummae.eval()
    batch = draw_batch(ummae, 2, SIZE)
    mask, second = batch["masks"]
    with torch.no_grad():
        want = ummae.predict(batch)
        assert torch.equal(want, ummae.predict(scramble(batch)))
        assert torch.equal(want, ummae.predict(scramble(batch, in_place(second, mask))))
        visible = ~mask & ~in_place(second, mask)
        assert not torch.equal(want, ummae.predict(scramble(batch, visible)))


def test_control_hiding_only_tokens_or_too_few_units_leaks(ummae: Any, draw_batch: Make, scramble: Make) -> None:
    ummae.eval()
    batch = draw_batch(ummae, 2, SIZE)
    mask, second = batch["masks"]
    with torch.no_grad():
        other = scramble(batch, in_place(second, mask))
        kept = [keep_units(b["views"][0], mask) for b in (batch, other)]
        assert not torch.equal(*(ummae.encoder.forward_features(x, second, ummae.mask_token) for x in kept))
        none = batch | {"masks": [mask, torch.zeros_like(second)]}
        assert not torch.equal(ummae.predict(none), ummae.predict(none | {"views": other["views"]}))


def test_secondarily_hidden_tokens_hold_the_mask_token(ummae: Any, draw_batch: Make) -> None:
    batch = draw_batch(ummae.eval(), 2, SIZE)
    with torch.no_grad():
        before = ummae.predict(batch)
        ummae.mask_token.add_(1.0)
        assert not torch.equal(before, ummae.predict(batch))


# ---- loss


def test_loss_equals_a_slow_version_over_dropped_units(ummae: Any, draw_batch: Make) -> None:
    batch = draw_batch(ummae, 2, SIZE)
    x, mask = batch["views"][0], batch["masks"][0]
    pred, errors = ummae.predict(batch), []
    for i, row, col in mask.nonzero().tolist():
        where = (i, slice(None), slice(16 * row, 16 * row + 16), slice(16 * col, 16 * col + 16))
        unit = x[where]
        target = (unit - unit.mean()) / (unit.var() + 1e-6).sqrt()
        errors.append((pred[where] - target).square().mean())
    assert len(errors) == 2 * 48
    torch.testing.assert_close(ummae(batch, 0)["loss"], torch.stack(errors).mean())


def test_two_samples_are_the_mean_of_each_alone(ummae: Any, draw_batch: Make) -> None:
    batch = draw_batch(ummae, 2, SIZE)
    halves = [ummae({k: [v[i : i + 1] for v in batch[k]] for k in ("views", "masks")}, 0)["loss"] for i in (0, 1)]
    torch.testing.assert_close(ummae(batch, 0)["loss"], torch.stack(halves).mean())


@pytest.mark.parametrize("unit", [8, 16, 32])
def test_gradient_reaches_every_parameter(make_objective: Make, draw_batch: Make, unit: int) -> None:
    ummae = make_objective("ummae", size=SIZE, decoder_dim=32, mask_unit=unit)
    ummae(draw_batch(ummae, 2, SIZE), 0)["loss"].backward()
    assert not [n for n, p in ummae.named_parameters() if p.grad is None or not p.grad.any()]


def test_bf16_run_has_an_fp32_loss(ummae: Any, draw_batch: Make) -> None:
    batch = draw_batch(ummae, 2, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ummae(batch, 0)["loss"]
    assert loss.dtype == torch.float32 and loss.isfinite()
    torch.testing.assert_close(loss, ummae(batch, 0)["loss"], rtol=0.02, atol=0)


# ---- the rest


@pytest.mark.parametrize("side, unit", [(64, 8), (128, 16), (256, 16)])
def test_units_are_16_px_at_most(side: int, unit: int, make_objective: Make) -> None:
    assert make_objective("ummae", size=(side, side), decoder_dim=32).unit == unit


@pytest.mark.parametrize(
    "size, cfg, told",
    [
        ((96, 96), {}, "img_size=96x96: ummae halves it, so both sides must be multiples of 64"),
        ((128, 64), {"mask_unit": 24}, r"mask_unit=24: ummae needs a divisor of the stride 32: \[4, 8, 16, 32\]"),
        ((128, 128), {"mask_unit": 64}, "mask_unit=64"),
        ((128, 128), {"secondary_ratio": 1.0}, "secondary_ratio=1.0 must lie in"),
        ((128, 128), {"secondary_ratio": -0.1}, "secondary_ratio=-0.1"),
        ((64, 64), {"mask_unit": 16, "secondary_ratio": 0.9}, "leave one of 4 kept units"),
        ((64, 64), {"mask_unit": 32}, "mask_unit=32: of 64x64 px ummae keeps 1 unit"),
        ((128, 128), {"decoder_dim": 40}, "decoder_dim=40.* multiple of 32"),
        ((128, 128), {"decoder_depth": 0}, "decoder_depth=0.* at least one"),
    ],
)
def test_bad_values_are_refused_in_one_line(
    make_objective: Make, size: tuple[int, int], cfg: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told) as error:
        make_objective("ummae", size=size, **cfg)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, size, told",
    [
        ("eva02_tiny_patch14_224", 112, "has tokens of 14 px, which no mask unit of 4, 8, ... px divides; take simmim"),
        ("convit_tiny", 64, "half the size, 32x32, which convit_tiny built for 64x64 does not take; take simmim"),
    ],
)
def test_timm_models_that_do_not_fit_are_refused_before_the_run(
    make_objective: Make, name: str, size: int, told: str
) -> None:
    with pytest.raises(UserError, match=told) as error:
        make_objective("ummae", build_backbone(name, size), size=(size, size))
    assert "\n" not in str(error.value)


def test_joint_cannot_share_a_view_of_which_most_is_dropped(make_objective: Make) -> None:
    with pytest.raises(UserError, match="share=true: ummae drops what it hides; one of localmim, simmim can"):
        make_objective("joint", masked="ummae", share=True)


def test_joint_has_its_own_crop_and_both_masks(make_objective: Make) -> None:
    joint = make_objective("joint", size=SIZE, masked="ummae", decoder_dim=32)
    views, masks = joint.draw(np.random.default_rng(0), SIZE)
    assert len(views) == 3 and [None if m is None else m.shape for m in masks] == [None, None, (8, 8), (4, 4)]
    batch = {"views": [torch.randn(2, 3, *SIZE) for _ in views]}
    batch["masks"] = [None if m is None else torch.from_numpy(m).expand(2, *m.shape) for m in masks]
    out = joint(batch, 0)
    own = {"views": batch["views"][2:], "masks": batch["masks"][2:]}
    torch.testing.assert_close(out["loss/ummae"], joint.masked(own, 0)["loss"].detach())
    assert set(joint.eval().pictures(batch)) == {"original", "hidden", "reconstructed"}


@pytest.mark.parametrize("name", ["test_convnext", "vit_tiny_patch16_224"])
def test_a_wrapped_backbone(make_objective: Make, draw_batch: Make, name: str) -> None:
    ummae = make_objective("ummae", build_backbone(name, img_size=64), size=SIZE, decoder_dim=32)
    batch = draw_batch(ummae, 2, SIZE)
    ummae(batch, 0)["loss"].backward()
    assert ummae.mask_token is None
    assert not [n for n, p in ummae.named_parameters() if (p.grad is None) == p.requires_grad]


def test_pictures(ummae: Any, draw_batch: Make) -> None:
    batch = draw_batch(ummae.eval(), ummae.n_pictures, SIZE)
    shown = ummae.pictures(batch)
    assert set(shown) == {"original", "hidden", "reconstructed"}
    assert all(p.shape == (8, 3, *SIZE) and 0 <= p.min() and p.max() <= 1 for p in shown.values())
    mask, second = batch["masks"]
    dropped = upsample_mask(mask, *SIZE)[:, None].expand_as(shown["original"])
    assert torch.equal(shown["original"][~dropped], shown["reconstructed"][~dropped])
    # stitched again, it is what the encoder sees
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ummae.encoder.mean, ummae.encoder.std))
    seen = hide_pixels(keep_units(batch["views"][0], mask), second) * std + mean
    torch.testing.assert_close(keep_units(shown["hidden"], mask), seen.clamp(0, 1))


@pytest.mark.slow
def test_overfits_a_few_images(make_objective: Make, draw_batch: Make) -> None:
    ummae = make_objective("ummae", mask_unit=8, decoder_dim=64)
    batch = draw_batch(ummae, 16)
    optimizer = torch.optim.AdamW(ummae.parameters(), 3e-3)
    losses = []
    for step in range(100):
        loss = ummae(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * min(1.0, losses[0]), losses[::10]  # 1: that of predicting nothing
