from collections.abc import Callable
from typing import Any

import pytest
import torch

from gcssl.ssl.byol import regression_loss

Make = Callable[..., Any]


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 0.0), (0.0, 2.0), (-1.0, 4.0)])
def test_regression_loss_of_equal_orthogonal_and_opposite_vectors(sign: float, expected: float) -> None:
    p = torch.eye(4)
    t = sign * p if sign else p.roll(1, 1)
    assert regression_loss(5 * p, t).item() == pytest.approx(expected, abs=1e-5)


def test_regression_loss_is_the_squared_distance_of_unit_vectors() -> None:
    p, t = torch.randn(6, 8), torch.randn(6, 8)
    slow = sum(float((a / a.norm() - b / b.norm()).square().sum()) for a, b in zip(p, t, strict=True)) / 6
    assert regression_loss(p, t).item() == pytest.approx(slow, rel=1e-5)
    p, t = p.bfloat16(), t.bfloat16()
    assert torch.equal(regression_loss(p, t), regression_loss(p.float(), t.float()))


def test_loss_crosses_the_views(make_midway: Make, make_batch: Make) -> None:
    """Student on view 1 against teacher on view 2 and the other way; the predictor is the student's alone."""
    objective, batch = make_midway("byol"), make_batch(6, views=2)
    with torch.no_grad():
        p1, p2 = (objective.predictor(objective.projector(objective.encoder(x))) for x in batch["views"])
        t1, t2 = (objective.momentum_projector(objective.teacher(x)) for x in batch["views"])
        out = objective(batch, 0)
    torch.testing.assert_close(out["loss"], regression_loss(p1, t2) + regression_loss(p2, t1))
    assert set(out) == {"loss", "feature_std", "feature_rank"}


def test_heads_end_without_a_norm(make_objective: Make) -> None:
    objective = make_objective("byol")
    for head in (objective.projector, objective.predictor):
        assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm", "ReLU", "Linear"]
