"""What holds for every view objective, and the signs of a collapse."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gcssl.augment import BYOL_1, BYOL_2, SIMCLR
from gcssl.errors import UserError
from gcssl.ssl.ema import momentum_at
from gcssl.ssl.joint import VIEW
from gcssl.ssl.views import feature_rank, feature_std

Make = Callable[..., Any]
WITH_TEACHER = ["byol", "dino", "esvit", "moby", "mocov3", "simdino"]
MULTI_CROP = ["dino", "esvit", "simdino"]


def first(head: nn.Module) -> nn.Linear:
    return next(m for m in head.modules() if isinstance(m, nn.Linear))


every = pytest.mark.parametrize("name", VIEW)
QUICK = ("simclr", "dino")  # where every objective would take long
taught = pytest.mark.parametrize("name", WITH_TEACHER)


def test_those_with_a_teacher_are_named_here(make_objective: Make) -> None:
    assert sorted(name for name in VIEW if hasattr(make_objective(name), "teacher")) == WITH_TEACHER


@every
def test_loss_is_symmetric_in_the_views(name: str, make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective(name), make_batch(4, views=2)
    if hasattr(objective, "queue"):
        objective.queue[1] = objective.queue[0]
    swapped = batch | {"views": batch["views"][::-1]}
    torch.testing.assert_close(objective(batch, 0)["loss"], objective(swapped, 0)["loss"])


@every
def test_gradient_reaches_the_student_and_not_the_teacher(name: str, make_objective: Make, make_batch: Make) -> None:
    objective = make_objective(name)
    out = objective(make_batch(4, views=2), 0)
    out["loss"].backward()
    for key, p in objective.named_parameters():
        teacher = key.startswith(("teacher.", "momentum_"))
        still = teacher or key.endswith("last.gain")
        assert (p.grad is None and not p.requires_grad) if still else p.grad.isfinite().all(), key
    assert objective.encoder.stem.conv1.weight.grad.abs().sum() > 0
    assert not [key for key in set(out) - {"loss"} if out[key].requires_grad]


@every
def test_forward_changes_no_state(name: str, make_objective: Make, make_batch: Make) -> None:
    objective = make_objective(name)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    objective(make_batch(4, views=2), 0)["loss"].backward()
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


@taught
def test_teacher_starts_equal_and_follows_after_the_step(name: str, make_objective: Make, make_batch: Make) -> None:
    objective = make_objective(name, total_steps=10)
    objective(make_batch(4, views=2), 0)
    student, teacher = objective.encoder.stem.conv1.weight, objective.teacher.stem.conv1.weight
    assert torch.equal(student, teacher) and student.data_ptr() != teacher.data_ptr()
    start, head = teacher.clone(), first(objective.momentum_projector).weight.clone()
    with torch.no_grad():
        student.add_(1.0)
        first(objective.projector).weight.add_(1.0)
    objective.after_step(0)
    m = objective.momentum(0)
    assert m == momentum_at(1, 10, 0.996 if name in MULTI_CROP else 0.99)
    torch.testing.assert_close(teacher, start + 1 - m)
    torch.testing.assert_close(first(objective.momentum_projector).weight, head + 1 - m)
    objective.after_step(9)  # the last step, momentum 1: the teacher rests
    torch.testing.assert_close(teacher, start + 1 - m)


@taught
def test_teacher_drops_no_path_in_training(name: str, make_objective: Make, make_encoder: Make) -> None:
    objective = make_objective(name, make_encoder(drop_path=0.5)).train()
    x = torch.randn(4, 3, 64, 64)
    assert objective.encoder.training and not objective.teacher.training and not objective.momentum_projector.training
    assert torch.equal(objective.teacher(x), objective.teacher(x))
    assert not torch.equal(objective.encoder(x), objective.encoder(x))


@every
def test_noise_of_each_view_reaches_the_student(
    name: str, make_objective: Make, make_encoder: Make, make_batch: Make
) -> None:
    objective, batch = make_objective(name, make_encoder(drop_path=0.5)).train(), make_batch(4, views=2)
    batch["noise"] = [torch.rand(objective.encoder.n_noise, 4) for _ in range(2)]
    loss = objective(batch, 0)["loss"]
    assert torch.equal(loss, objective(batch, 0)["loss"])
    for v in range(2):
        other = [torch.rand_like(n) if i == v else n for i, n in enumerate(batch["noise"])]
        assert not torch.equal(loss, objective(batch | {"noise": other}, 0)["loss"])


@every
def test_draw_gives_the_published_pair_and_pickles(name: str, make_objective: Make) -> None:
    draw = pickle.loads(pickle.dumps(make_objective(name).draw))
    views, masks = draw(np.random.default_rng(0), (64, 96))
    assert masks == [None, None]
    published = (SIMCLR, SIMCLR) if name == "simclr" else (BYOL_1, BYOL_2)
    if name in MULTI_CROP:
        published = tuple(replace(spec, scale=(0.4, 1.0)) for spec in published)
    for (spec, _), expected in zip(views, published, strict=True):
        assert spec.size == (64, 96)
        assert (spec.scale, spec.jitter, spec.gray_p) == (expected.scale, expected.jitter, expected.gray_p)
        assert (spec.blur_p, spec.solarize_p) == (expected.blur_p, expected.solarize_p)


BAD: dict[str, list[dict[str, Any]]] = {
    "byol": [{"momentum": 1.5}, {"hidden_dim": 0}],
    "moby": [{"queue": 0}, {"temperature": -1.0}, {"momentum": -0.1}],
    "dino": [
        {"out_dim": 1},
        {"student_temp": 0.0},
        {"center_momentum": 2.0},
        {"local_crops": -1},
        {"momentum": 2.0},
        {"local_scale": [0.5, 0.1], "local_crops": 2},
        {"local_scale": [0.5], "local_crops": 2},
        {"local_size": 33, "local_crops": 2},
        {"local_size": 96, "local_crops": 2},
    ],
    "esvit": [{"teacher_temp": -1.0}, {"freeze_last_layer_epochs": -1.0}, {"bottleneck_dim": 0}],
    "simdino": [{"eps": 0.0}, {"coeff": -1.0}],
    "mocov3": [{"temperature": 0.0}, {"momentum": 1.5}, {"hidden_dim": 0}, {"out_dim": -1}, {"predictor_layers": -1}],
    "simclr": [{"temperature": 0.0}, {"projector_layers": 0}],
    "vicreg": [{"covariance": -1.0}, {"out_dim": 0}],
}


@pytest.mark.parametrize(("name", "cfg"), [(name, cfg) for name, cfgs in BAD.items() for cfg in cfgs])
def test_bad_values_are_refused(name: str, cfg: dict[str, Any], make_objective: Make) -> None:
    with pytest.raises(UserError, match=rf"objective.{next(iter(cfg))}="):
        make_objective(name, **cfg)


@pytest.mark.parametrize(
    "name", [n if n in ("simclr", "dino") else pytest.param(n, marks=pytest.mark.slow) for n in VIEW]
)
def test_a_few_steps_bring_the_views_of_an_image_together(name: str, make_objective: Make, make_batch: Make) -> None:
    """After training on 16 images each view's features lie nearest to those of its partner, and spread out."""
    objective, batch = make_objective(name, total_steps=40), make_batch(16)
    x = batch["views"][0]
    batch["views"] = [x, x + 0.3 * torch.randn_like(x)]
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-3)
    first = objective(batch, 0)["loss"]
    for step in range(40):
        out = objective(batch, step)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        objective.after_step(step)
    assert out["loss"] < first and out["feature_rank"] > 3
    with torch.no_grad():
        a, b = (torch.nn.functional.normalize(objective.encoder(v), dim=1) for v in batch["views"])
    assert ((a @ b.T).argmax(1) == torch.arange(16)).float().mean() > 0.9


# ---- signs of a collapse


def test_feature_std_of_spread_and_collapsed_features() -> None:
    assert feature_std(torch.randn(4096, 64)).item() == pytest.approx(1.0, abs=0.02)
    assert feature_std(torch.randn(1, 64).expand(100, 64) * torch.rand(100, 1)).item() == pytest.approx(0, abs=1e-5)


def test_feature_rank_counts_directions() -> None:
    directions = torch.linalg.qr(torch.randn(32, 3)).Q.T  # 3 orthonormal rows
    assert feature_rank(torch.randn(4096, 3) @ directions + 7).item() == pytest.approx(3.0, abs=0.05)
    assert feature_rank(torch.randn(4096, 1) @ directions[:1]).item() == pytest.approx(1.0, abs=1e-3)
    few = torch.randn(20, 64).cumsum(1)  # fewer images than dimensions
    values = torch.linalg.eigvalsh(few.T.cov())
    assert feature_rank(few).item() == pytest.approx((values.sum() ** 2 / values.square().sum()).item(), rel=1e-4)
    assert feature_rank(torch.ones(5, 4)).isfinite()


@pytest.mark.parametrize("sign", [feature_std, feature_rank])
def test_signs_are_computed_in_fp32(sign: Callable[[torch.Tensor], torch.Tensor]) -> None:
    z = 1 + 0.05 * torch.randn(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        under = sign(z)
    assert torch.equal(under, sign(z))
    half = z.bfloat16()
    assert torch.equal(sign(half), sign(half.float()))


@every
def test_collapse_shows_in_the_monitors(name: str, make_objective: Make, make_batch: Make) -> None:
    """Features that are all but constant: a batch norm hides that, the monitor must not."""
    objective, batch = make_objective(name), make_batch(8, views=2)
    healthy = objective(batch, 0)["feature_std"]
    with torch.no_grad():
        norm = getattr(objective, "teacher", objective.encoder).stages[3].norm
        norm.weight.fill_(1e-3)
        norm.bias.fill_(1.0)
    assert objective(batch, 0)["feature_std"] < 0.02 * healthy
    assert objective(batch, 0)["loss"].isfinite()


@every
def test_of_few_images_no_sign_is_made(name: str, make_objective: Make, make_batch: Make) -> None:
    """One has no spread and two have rank 1, in the healthiest run: micro-batches may be that small."""
    out = make_objective(name)(make_batch(3, views=2), 0)
    assert "feature_std" not in out and "feature_rank" not in out and out["loss"].isfinite()
