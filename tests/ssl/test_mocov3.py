import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gcssl.errors import UserError
from gcssl.models.heads import BatchNorm, mlp
from gcssl.ssl.ema import ema_update, momentum_at, momentum_copy
from gcssl.ssl.mocov3 import feature_rank, feature_std, info_nce

Make = Callable[..., Any]


def slow_info_nce(q: Tensor, keys: Tensor, first: int, t: float) -> float:
    """2T * mean over queries of -log(exp(sim to own key / T) / sum over keys)."""
    total = 0.0
    for i in range(len(q)):
        sims = [float(q[i].double() @ k.double() / (q[i].double().norm() * k.double().norm())) for k in keys]
        total -= math.log(math.exp(sims[first + i] / t) / sum(math.exp(s / t) for s in sims))
    return 2 * t * total / len(q)


@pytest.mark.parametrize("first", [0, 3, 6])
def test_info_nce_equals_the_slow_version(first: int) -> None:
    q, keys = torch.randn(4, 8), torch.randn(10, 8)
    loss, _ = info_nce(q, keys, first, 0.2)
    assert loss.item() == pytest.approx(slow_info_nce(q, keys, first, 0.2), rel=1e-5)


def test_info_nce_closed_forms() -> None:
    t, n = 0.2, 6
    same, _ = info_nce(torch.ones(n, 8), torch.ones(n, 8), 0, t)
    assert same.item() == pytest.approx(2 * t * math.log(n), rel=1e-5)  # the collapse value
    aligned, accuracy = info_nce(3 * torch.eye(n), torch.eye(n), 0, t)
    assert aligned.item() == pytest.approx(2 * t * (-1 / t + math.log(math.exp(1 / t) + n - 1)), rel=1e-4)
    assert accuracy.item() == 1.0


def test_info_nce_positive_is_offset_by_the_rank() -> None:
    """Process 1 of 2 holds samples 4..7: with keys equal to queries it finds them, and only there."""
    z = torch.randn(8, 16)
    assert info_nce(z[4:], z, 4, 0.2)[1] == 1.0
    assert info_nce(z[4:], z, 0, 0.2)[1] == 0.0
    halves = [info_nce(z[i : i + 4], z, i, 0.2)[0] for i in (0, 4)]
    torch.testing.assert_close(torch.stack(halves).mean(), info_nce(z, z, 0, 0.2)[0])


def test_info_nce_is_finite_in_low_precision_and_at_extreme_logits() -> None:
    q = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = info_nce(q, torch.randn(4, 8), 0, 1e-4)  # similarities of +-1 become logits of +-1e4
    assert loss.dtype == torch.float32 and loss.isfinite()
    (grad,) = torch.autograd.grad(loss, q)
    assert grad.isfinite().all()


def test_info_nce_similarities_are_fp32_under_autocast() -> None:
    q, keys = torch.randn(4, 8), torch.randn(10, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = info_nce(q, keys, 0, 0.2)
    assert torch.equal(loss, info_nce(q, keys, 0, 0.2)[0])


def test_feature_std_of_spread_and_collapsed_features() -> None:
    assert feature_std(torch.randn(4096, 64)).item() == pytest.approx(1.0, abs=0.02)
    assert feature_std(torch.randn(1, 64).expand(100, 64) * torch.rand(100, 1)).item() == pytest.approx(0, abs=1e-5)


def test_feature_rank_counts_directions() -> None:
    directions = torch.linalg.qr(torch.randn(32, 3)).Q.T  # 3 orthonormal rows
    assert feature_rank(torch.randn(4096, 3) @ directions + 7).item() == pytest.approx(3.0, abs=0.05)
    assert feature_rank(torch.randn(4096, 1) @ directions[:1]).item() == pytest.approx(1.0, abs=1e-3)
    assert feature_rank(torch.ones(5, 4)).isfinite()


def test_collapse_shows_in_the_monitors(make_objective: Make, make_batch: Make) -> None:
    """A teacher whose features are all but constant: its batch norm hides that, the monitor must not."""
    objective, batch = make_objective("mocov3"), make_batch(8, views=2)
    healthy = objective(batch, 0)["feature_std"]
    with torch.no_grad():
        objective.teacher.stages[3].norm.weight.fill_(1e-3)
        objective.teacher.stages[3].norm.bias.fill_(1.0)
    assert objective(batch, 0)["feature_std"] < 0.02 * healthy


def test_batch_norm_equals_torchs_and_keeps_no_state() -> None:
    ours, theirs = BatchNorm(5, lambda: None), nn.BatchNorm1d(5, track_running_stats=False)
    x = torch.randn(7, 5) * 3 + 10
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs(x))
    assert set(ours.state_dict()) == {"weight", "bias"}
    assert not BatchNorm(5, lambda: None, affine=False).state_dict()


def test_batch_norm_over_processes_is_sound_far_from_zero() -> None:
    """The reducing body alone (a sum over one process is the identity), on data whose squares drown its
    variance.
    """
    reducing, plain = BatchNorm(3, lambda: lambda t: t), BatchNorm(3, lambda: None)
    x = torch.randn(64, 3, dtype=torch.float64) + 1e4
    exact = plain.double()(x)
    torch.testing.assert_close(reducing(x), exact)
    torch.testing.assert_close(reducing(x.float()).double(), exact, atol=5e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert reducing(x.bfloat16()).dtype == torch.float32


def test_mlp_layers() -> None:
    layers = mlp([8, 32, 32, 4], lambda dim, affine: BatchNorm(dim, lambda: None, affine))
    kinds = [type(m).__name__ for m in layers]
    assert kinds == ["Linear", "BatchNorm", "ReLU"] * 2 + ["Linear", "BatchNorm"]
    assert all(m.bias is None for m in layers if isinstance(m, nn.Linear))
    assert layers[-1].weight is None and layers[1].weight is not None
    y = layers(torch.randn(64, 8))
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-5, rtol=0)


def test_ema_equals_its_closed_form_and_copies_buffers() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = momentum_copy(student)
    start = teacher[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1.0)
    student(torch.randn(8, 3))
    for _ in range(3):
        ema_update(teacher, student, 0.9)
    torch.testing.assert_close(teacher[0].weight, start * 0.9**3 + (start + 1) * (1 - 0.9**3))
    assert torch.equal(teacher[1].running_mean, student[1].running_mean)
    assert teacher[1].num_batches_tracked == 1
    with pytest.raises(ValueError, match="differ in parameters"):
        ema_update(teacher, nn.Linear(3, 3), 0.9)


def test_momentum_runs_from_its_start_to_one() -> None:
    assert momentum_at(0, 100, 0.99) == pytest.approx(0.99)
    assert momentum_at(50, 100, 0.99) == pytest.approx(0.995)
    assert momentum_at(100, 100, 0.99) == momentum_at(101, 100, 0.99) == 1.0


def test_loss_equals_a_slow_version_of_the_algorithm(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("mocov3"), make_batch(6, views=2)
    with torch.no_grad():
        for p in objective.teacher.parameters():  # a teacher that differs from the student
            p.add_(0.01 * torch.randn_like(p))
        q = [objective.predictor(objective.projector(objective.encoder(x))) for x in batch["views"]]
        k = [objective.momentum_projector(objective.teacher(x)) for x in batch["views"]]
        expected = slow_info_nce(q[0], k[1], 0, 0.2) + slow_info_nce(q[1], k[0], 0, 0.2)
        out = objective(batch, 0)
    assert out["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert set(out) == {"loss", "accuracy", "feature_std", "feature_rank"}


def test_loss_is_symmetric_in_the_views(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("mocov3"), make_batch(4, views=2)
    swapped = batch | {"views": batch["views"][::-1]}
    torch.testing.assert_close(objective(batch, 0)["loss"], objective(swapped, 0)["loss"])


def test_gradient_reaches_the_student_and_not_the_teacher(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective("mocov3")
    out = objective(make_batch(4, views=2), 0)
    out["loss"].backward()
    teacher = ("teacher.", "momentum_projector.")
    for name, p in objective.named_parameters():
        assert (p.grad is None and not p.requires_grad) if name.startswith(teacher) else p.grad.isfinite().all(), name
    assert objective.encoder.stem.conv1.weight.grad.abs().sum() > 0
    assert not [key for key in set(out) - {"loss"} if out[key].requires_grad]


def test_forward_changes_no_state(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective("mocov3")
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    objective(make_batch(4, views=2), 0)["loss"].backward()
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


def test_teacher_starts_equal_and_follows_after_the_step(make_objective: Make) -> None:
    objective = make_objective("mocov3", total_steps=10)
    student, teacher = objective.encoder.stem.conv1.weight, objective.teacher.stem.conv1.weight
    assert torch.equal(student, teacher) and student.data_ptr() != teacher.data_ptr()
    start, head = teacher.clone(), objective.momentum_projector[0].weight.clone()
    with torch.no_grad():
        student.add_(1.0)
        objective.projector[0].weight.add_(1.0)
    objective.after_step(0)
    m = objective.momentum(0)
    assert m == momentum_at(1, 10, 0.99)
    torch.testing.assert_close(teacher, start + 1 - m)
    torch.testing.assert_close(objective.momentum_projector[0].weight, head + 1 - m)
    objective.after_step(9)  # the last step, momentum 1: the teacher rests
    torch.testing.assert_close(teacher, start + 1 - m)


def test_teacher_drops_no_path_in_training(make_objective: Make, make_encoder: Make) -> None:
    objective = make_objective("mocov3", make_encoder(drop_path=0.5)).train()
    x = torch.randn(4, 3, 64, 64)
    assert objective.encoder.training and not objective.teacher.training
    assert torch.equal(objective.teacher(x), objective.teacher(x))
    assert not torch.equal(objective.encoder(x), objective.encoder(x))


def test_noise_of_each_view_reaches_the_student(make_objective: Make, make_encoder: Make, make_batch: Make) -> None:
    objective, batch = make_objective("mocov3", make_encoder(drop_path=0.5)).train(), make_batch(4, views=2)
    batch["noise"] = [torch.rand(objective.encoder.n_noise, 4) for _ in range(2)]
    loss = objective(batch, 0)["loss"]
    assert torch.equal(loss, objective(batch, 0)["loss"])
    for v in range(2):
        other = [torch.rand_like(n) if i == v else n for i, n in enumerate(batch["noise"])]
        assert not torch.equal(loss, objective(batch | {"noise": other}, 0)["loss"])


def test_draw_gives_the_published_pair_and_pickles(make_objective: Make) -> None:
    draw = pickle.loads(pickle.dumps(make_objective("mocov3").draw))
    views, masks = draw(np.random.default_rng(0), (64, 64))
    assert masks == [None, None]
    assert [(s.size, s.blur_p, s.solarize_p) for s, _ in views] == [
        ((64, 64), 1.0, 0.0),
        ((64, 64), 0.1, 0.2),
    ]


@pytest.mark.parametrize("cfg", [{"temperature": 0.0}, {"momentum": 1.5}, {"hidden_dim": 0}, {"out_dim": -1}])
def test_bad_values_are_refused(make_objective: Make, cfg: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"objective.{next(iter(cfg))}="):
        make_objective("mocov3", **cfg)


def test_overfits_a_few_images(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("mocov3", total_steps=40), make_batch(16)
    x = batch["views"][0]
    batch["views"] = [x, x + 0.3 * torch.randn_like(x)]
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-3)
    for step in range(40):
        out = objective(batch, step)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        objective.after_step(step)
    assert out["accuracy"] == 1.0 and out["feature_rank"] > 4
