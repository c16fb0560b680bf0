"""The momentum teacher's average and what it keeps to itself."""

import pytest
import torch
from torch import nn

from gcssl.ssl.ema import ema_update, momentum_at, momentum_copy, set_teaching


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
