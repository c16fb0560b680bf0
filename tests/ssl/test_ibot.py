import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gcssl.errors import UserError
from gcssl.ssl.ibot import masked_loss

Make = Callable[..., Any]


@pytest.fixture
def batch(make_batch: Make) -> dict[str, Any]:
    return make_batch(4, views=2, grid=(2, 2))


def test_masked_loss_equals_the_slow_version() -> None:
    log_q, student = torch.randn(3, 4, 6).log_softmax(-1), torch.randn(3, 4, 6)
    mask = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    samples = []
    for b in range(3):
        hidden = [-(log_q[b, i].exp() * (student[b, i] / 0.1).log_softmax(0)).sum() for i in range(4) if mask[b, i]]
        samples.append(torch.stack(hidden).mean() if hidden else torch.tensor(0.0))
    torch.testing.assert_close(masked_loss(log_q, student, mask, 0.1), torch.stack(samples).mean())


def test_nothing_hidden_is_no_loss_and_no_nan(make_objective: Make, batch: dict[str, Any]) -> None:
    objective = make_objective("ibot")
    batch["masks"] = [torch.zeros_like(m) for m in batch["masks"]]
    out = objective(batch, 0)
    out["loss"].backward()
    assert out["loss/patch"] == 0.0
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)


def test_loss_equals_the_slow_version(make_midway: Make, make_batch: Make) -> None:
    """One image at a time; views and regions have a centre and a temperature each."""
    own = {"local_crops": 1, "local_size": 32, "teacher_temp": 0.05, "teacher_patch_temp": 0.09, "student_temp": 0.2}
    objective, batch = make_midway("ibot", **own), make_batch(3, views=2, small=1, grid=(2, 2))
    batch["masks"][1][2] = False  # one view that hides nothing
    out = objective(batch, 0)

    def assigned(x: torch.Tensor, center: torch.Tensor, temperature: float) -> torch.Tensor:
        return ((objective.momentum_projector(x) - center) / temperature).softmax(-1)

    view, patch = [], []
    with torch.no_grad():
        for b in range(3):
            x, masks = [v[b, None] for v in batch["views"]], [m[b, None] for m in batch["masks"]]
            hidden = [m.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None] for m in masks]
            maps = [objective.encoder.forward_features(x[v].masked_fill(hidden[v], 0), masks[v], objective.mask_token)
                    for v in range(2)] + [objective.encoder.forward_features(x[2])]  # fmt: skip
            regions = [m[0].flatten(1).T for m in maps]  # n C
            taught = [objective.teacher.forward_features(x[v])[0].flatten(1).T for v in range(2)]
            for v in range(3):
                student = (objective.projector(regions[v].mean(0)) / 0.2).log_softmax(0)
                view += [-(assigned(taught[t].mean(0), objective.center.mean, 0.05) * student).sum()
                         for t in range(2) if t != v]  # fmt: skip
            for v in range(2):
                student = (objective.projector(regions[v]) / 0.2).log_softmax(1)
                each = -(assigned(taught[v], objective.patch_center.mean, 0.09) * student).sum(1)
                each = each[masks[v].flatten()]
                patch.append(each.mean() if len(each) else torch.tensor(0.0))
    torch.testing.assert_close(out["loss/view"], torch.stack(view).mean())
    torch.testing.assert_close(out["loss/patch"], torch.stack(patch).mean())
    torch.testing.assert_close(out["loss"].detach(), out["loss/view"] + out["loss/patch"])


def test_mask_leak_of_the_student_and_not_of_the_teacher(make_objective: Make, batch: dict[str, Any]) -> None:
    """Hidden pixels reach the loss through the teacher's targets alone."""
    objective = make_objective("ibot")
    seen: list[torch.Tensor] = []
    objective.projector.register_forward_hook(lambda _m, args, _out: seen.append(args[0].detach()))
    objective(batch, 0)
    first = [x.clone() for x in seen]
    seen.clear()
    hidden = [m.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None] for m in batch["masks"]]
    noisy = [torch.where(m, 100 * torch.randn_like(x), x) for x, m in zip(batch["views"], hidden, strict=True)]
    other = objective(batch | {"views": noisy}, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
    assert not torch.equal(other["teacher_entropy"], objective(batch, 0)["teacher_entropy"])
    objective.encoder.forward_features = lambda x, *_: type(objective.encoder).forward_features(objective.encoder, x)
    seen.clear()  # negative control: pixels hidden, tokens not; the mask's place shows in the tokens then
    objective(batch, 0)
    assert not torch.equal(first[0], seen[0])


def test_prediction_starts_when_it_is_told_to(make_objective: Make, batch: dict[str, Any]) -> None:
    objective = make_objective("ibot", pred_start_epoch=2)  # of 10 steps
    early, late = objective(batch, 19), objective(batch, 20)
    assert early["loss/patch"] == 0.0 and late["loss/patch"] > 0.0
    assert [step for step in range(50) if objective.loss_changes(step)] == [20]
    assert not any(make_objective("ibot").loss_changes(step) for step in range(50))  # hides from the first step on
    early["loss"].backward()
    assert objective.mask_token.grad is not None  # DistributedDataParallel waits for it


def test_two_centres_and_temperatures(make_objective: Make, batch: dict[str, Any]) -> None:
    objective = make_objective("ibot", warmup_teacher_temp_epochs=2, teacher_temp=0.06)
    assert (objective.patch_temp(0), objective.patch_temp(20)) == (0.04, pytest.approx(0.07))
    assert objective.teacher_temp(20) == pytest.approx(0.06)
    objective(batch, 0)
    objective.after_step(0)
    assert not torch.equal(objective.center.mean, objective.patch_center.mean)
    assert objective.patch_center.mean.abs().sum() > 0


def test_centres_move_to_what_the_teacher_says_of_both_crops(make_objective: Make, batch: dict[str, Any]) -> None:
    """It sees them whole."""
    objective = make_objective("ibot")
    with torch.no_grad():
        taught = torch.cat([objective.teacher.forward_features(x) for x in batch["views"]]).flatten(2).mT  # 2B n C
        outputs, patches = (objective.momentum_projector(x) for x in (taught.mean(1), taught.flatten(0, 1)))
    objective(batch, 0)
    objective.after_step(0)
    torch.testing.assert_close(objective.center.mean, 0.1 * outputs.mean(0))
    torch.testing.assert_close(objective.patch_center.mean, 0.1 * patches.mean(0))


def test_draw_masks_half_of_the_large_crops(make_objective: Make) -> None:
    draw = pickle.loads(pickle.dumps(make_objective("ibot", local_crops=2, local_size=32).draw))
    counts = []
    for seed in range(200):
        views, masks = draw(np.random.default_rng(seed), (256, 256))
        assert len(views) == 4 and masks[2:] == [None, None] and masks[0].shape == (8, 8)
        counts += [int(m.sum()) for m in masks[:2]]
    hidden = [c for c in counts if c]
    assert 0.4 < len(hidden) / len(counts) < 0.6
    assert min(hidden) >= round(0.1 * 64) and max(hidden) <= round(0.5 * 64)
    assert 0.27 < np.mean(hidden) / 64 < 0.33


def test_student_and_not_teacher_learns(make_objective: Make, batch: dict[str, Any]) -> None:
    objective = make_objective("ibot")
    objective(batch, 0)["loss"].backward()
    for key, p in objective.named_parameters():
        assert (p.grad is None) == key.startswith(("teacher.", "momentum_")), key
    assert objective.projector.last.gain.requires_grad  # norm_last_layer is false in iBOT


@pytest.mark.parametrize(
    "cfg",
    [
        {"mask_ratio": 0.1},
        {"mask_ratio": 0.9},
        {"mask_ratio": 0.5, "mask_ratio_var": 0.5},
        {"mask_prob": 1.5},
        {"teacher_patch_temp": 0.0},
    ],
)
def test_bad_values_are_refused(make_objective: Make, cfg: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"objective.{next(iter(cfg))}="):
        make_objective("ibot", **cfg)


def test_a_masked_crop_hides_one_region_at_least(make_objective: Make) -> None:
    draw = make_objective("ibot", mask_prob=1.0, mask_ratio=0.11, mask_ratio_var=0.1).draw
    for seed in range(20):
        _, masks = draw(np.random.default_rng(seed), (64, 64))  # 2 x 2 regions: 0.04 to 0.84 of one
        assert all(m is None or m.any() for m in masks) and masks[0].any()
