"""The heads' layers and the momentum teacher's average."""

import pytest
import torch
from torch import nn

from gcssl.models.heads import BatchNorm, Reduce, mlp
from gcssl.ssl.ema import ema_update, momentum_at, momentum_copy, set_teaching


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


@pytest.mark.parametrize("reduce", [None, lambda t: t], ids=["one process", "reducing"])
def test_batch_norm_computes_in_fp32_under_autocast(reduce: Reduce | None) -> None:
    norm, x = BatchNorm(3, lambda: reduce), torch.randn(16, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, norm(x.float()))


@pytest.mark.parametrize("reduce", [None, lambda t: t], ids=["one process", "reducing"])
def test_batch_norm_with_a_scale_alone(reduce: Reduce | None) -> None:
    norm, x = BatchNorm(3, lambda: reduce, affine=False, scale=True), torch.randn(16, 3) + 2
    assert set(norm.state_dict()) == {"weight"}
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    plain = nn.BatchNorm1d(3, affine=False, track_running_stats=False)(x)
    torch.testing.assert_close(norm(x), plain * norm.weight)


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
    student.register_buffer("scale", torch.zeros(1))
    teacher = momentum_copy(student)
    start = teacher[0].weight.clone()
    with torch.no_grad():
        student[0].weight.add_(1.0)
        student.scale.add_(2.0)
    for _ in range(3):
        ema_update(teacher, student, 0.9)
    torch.testing.assert_close(teacher[0].weight, start * 0.9**3 + (start + 1) * (1 - 0.9**3))
    assert teacher.scale.item() == 2.0
    with pytest.raises(ValueError, match="differ in parameters"):
        ema_update(teacher, nn.Linear(3, 3), 0.9)


def test_a_teacher_of_batch_norms_has_statistics_of_its_own() -> None:
    """Those of the student belong to other weights: what is evaluated is the teacher with its own."""
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.9))
    teacher, x = momentum_copy(student), 5 + torch.randn(512, 3)
    with torch.no_grad():
        student[0].weight.mul_(3.0)
        for _ in range(50):
            student(x)
            y = teacher(x)  # normalised by the batch; no dropout
            torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
            ema_update(teacher, student, 1.0)
        inside = teacher[0](x)
        torch.testing.assert_close(teacher[1].running_mean, inside.mean(0), rtol=0.02, atol=0.02)
        assert not torch.allclose(teacher[1].running_mean, student[1].running_mean, rtol=0.1)
        set_teaching(teacher, False)
        before = teacher[1].running_mean.clone()
        torch.testing.assert_close(teacher(x), y, rtol=0.05, atol=0.05)
        assert torch.equal(teacher[1].running_mean, before)


def test_momentum_runs_from_its_start_to_one() -> None:
    assert momentum_at(0, 100, 0.99) == pytest.approx(0.99)
    assert momentum_at(50, 100, 0.99) == pytest.approx(0.995)
    assert momentum_at(100, 100, 0.99) == momentum_at(101, 100, 0.99) == 1.0
