import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.ssl.targets import TARGETS, hog, l1_hidden, mse_hidden, norm_pixels

Make = Callable[..., Any]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(one, other) for one, other in zip(a, b, strict=True)]


def test_mask_leak_none_from_hidden_pixels_in_any_stage(make_objective: Make, make_batch: Make, scramble: Make) -> None:
    objective, batch = make_objective("localmim").eval(), make_batch(2)
    mask, token = batch["masks"][0], objective.mask_token
    with torch.no_grad():
        assert all(equal(objective.features(batch), objective.features(scramble(batch))))
        unhidden = (objective.encoder.forward_pyramid(b["views"][0], mask, token) for b in (batch, scramble(batch)))
        assert not any(equal(*unhidden))  # control: tokens alone hidden, after the stem
        moved = batch | {"views": [batch["views"][0].roll(1, 0)]}
        assert not any(equal(objective.features(batch), objective.features(moved)))
        first = objective.features(batch)
        objective.mask_token.add_(1.0)
        assert not any(equal(first, objective.features(batch)))


def test_the_last_map_is_simmims(make_objective: Make, make_batch: Make) -> None:
    localmim, simmim, batch = make_objective("localmim"), make_objective("simmim"), make_batch(2)
    simmim.load_state_dict({k: v for k, v in localmim.state_dict().items() if not k.startswith("heads.")}, strict=False)
    assert torch.equal(localmim.features(batch)[-1], simmim.features(batch))


@pytest.mark.parametrize("target", TARGETS)
def test_loss_is_the_mean_of_the_stages_each_at_its_own_scale(
    make_objective: Make, make_batch: Make, target: str
) -> None:
    objective, batch = make_objective("localmim", target=target, mask_unit=16), make_batch(2)
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(np.stack([objective.draw(rng, (64, 64))[1][0] for _ in range(2)]))
    batch, x = batch | {"masks": [mask]}, batch["views"][0]
    out, slow = objective(batch, 0), []
    for head, fmap, cell in zip(objective.heads, objective.features(batch), (4, 8, 16, 16), strict=True):
        pred = head(fmap)
        if target == "pixels":
            slow.append(l1_hidden(pred, x, mask))
        elif target == "norm_pixels":
            slow.append(mse_hidden(pred, norm_pixels(x, cell), mask))
        else:
            assert pred.shape == (2, 27, 64 // cell, 64 // cell)
            slow.append(mse_hidden(pred, hog(x, cell), mask))
    torch.testing.assert_close(out["loss"], torch.stack(slow).mean())
    torch.testing.assert_close([out[f"loss/stage{i}"] for i in (1, 2, 3, 4)], [loss.detach() for loss in slow])
    assert not out["loss/stage1"].requires_grad


def test_cells_are_the_stages_own_when_the_unit_is_32(make_objective: Make) -> None:
    assert make_objective("localmim", mask_unit=32).cells == [4, 8, 16, 32]
    assert make_objective("localmim", mask_unit=8).cells == [4, 8, 8, 8]


def test_a_stages_loss_reaches_no_later_stage(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("localmim"), make_batch(2)
    objective.heads[0](objective.features(batch)[0]).sum().backward()
    assert objective.encoder.stem.conv1.weight.grad.any()
    assert all(p.grad is None for p in objective.encoder.stages[1:].parameters())


@pytest.mark.parametrize("target", TARGETS)
def test_gradient_reaches_every_parameter(make_objective: Make, make_batch: Make, target: str) -> None:
    objective = make_objective("localmim", target=target)
    objective(make_batch(2), 0)["loss"].backward()
    assert not [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]


def test_two_samples_are_the_mean_of_each_alone(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("localmim"), make_batch(2)
    halves = [objective({k: [v[i : i + 1] for v in batch[k]] for k in ("views", "masks")}, 0)["loss"] for i in (0, 1)]
    torch.testing.assert_close(objective(batch, 0)["loss"], torch.stack(halves).mean())


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext", "swin_tiny_patch4_window7_224"])
def test_wrapped_backbones_of_several_strides(
    make_objective: Make, make_batch: Make, scramble: Make, name: str
) -> None:
    objective, batch = make_objective("localmim", build_backbone(name, img_size=64)), make_batch(2)
    assert objective.mask_token is None and len(objective.heads) == 4
    loss = objective(batch, 0)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert not [n for n, p in objective.named_parameters() if (p.grad is None) == p.requires_grad]
    objective.eval()
    with torch.no_grad():
        assert all(equal(objective.features(batch), objective.features(scramble(batch))))


def test_what_does_not_fit_is_refused(make_objective: Make) -> None:
    with pytest.raises(UserError, match="localmim: vit_tiny_patch16_224 has one stride only"):
        make_objective("localmim", build_backbone("vit_tiny_patch16_224", 64))
    for cfg in ({"mask_unit": 12}, {"mask_ratio": 1.0}, {"mask_unit": 4, "target": "hog"}):
        with pytest.raises(UserError, match="objective.mask_"):
            make_objective("localmim", **cfg)


def test_draw_pickles_and_hides_three_quarters(make_objective: Make) -> None:
    draw = pickle.loads(pickle.dumps(make_objective("localmim").draw))
    views, masks = draw(np.random.default_rng(0), (64, 64))
    assert len(views) == len(masks) == 1 and masks[0].shape == (8, 8) and masks[0].sum() == 48
    assert views[0][0].scale == (0.2, 1.0) and views[0][0].interpolation == "bicubic"


@pytest.mark.parametrize("target", TARGETS)
def test_pictures_are_the_last_stages(make_objective: Make, make_batch: Make, target: str) -> None:
    objective = make_objective("localmim", target=target).eval()
    shown = objective.pictures(make_batch(objective.n_pictures))
    assert ("reconstructed" in shown) == (target != "hog")
    assert all(p.shape == (8, 3, 64, 64) and 0 <= p.min() and p.max() <= 1 for p in shown.values())


@pytest.mark.slow
def test_overfits_a_few_images(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("localmim"), make_batch(16)
    optimizer = torch.optim.AdamW(objective.parameters(), 5e-3)
    losses = []
    for step in range(60):
        loss = objective(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * min(1.0, losses[0]), losses[::10]  # 1: that of predicting nothing
