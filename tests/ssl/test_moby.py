import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gcssl.ssl.moby import queue_loss

Make = Callable[..., Any]


def test_queue_loss_equals_the_slow_version_and_closed_form() -> None:
    q, key, queue, t = torch.randn(3, 8), torch.randn(3, 8), F.normalize(torch.randn(5, 8), dim=1), 0.2
    total = 0.0
    for a, k in zip(q.double(), key.double(), strict=True):
        a, k = a / a.norm(), k / k.norm()
        others = [math.exp(float(a @ other) / t) for other in queue.double()]
        total -= math.log(math.exp(float(a @ k) / t) / (math.exp(float(a @ k) / t) + sum(others)))
    assert queue_loss(q, key, queue, t)[0].item() == pytest.approx(total / 3, rel=1e-5)
    ones = torch.ones(4, 8)
    same, _ = queue_loss(ones, ones, F.normalize(torch.ones(7, 8), dim=1), t)
    assert same.item() == pytest.approx(math.log(8), rel=1e-5)  # the collapse value: ln(K + 1)


def test_each_view_is_told_from_the_other_views_queue(make_midway: Make, make_batch: Make) -> None:
    objective, batch = make_midway("moby", queue=6), make_batch(4, views=2)
    with torch.no_grad():
        q1, q2 = (objective.predictor(objective.projector(objective.encoder(x))) for x in batch["views"])
        k1, k2 = (objective.momentum_projector(objective.teacher(x)) for x in batch["views"])
        queues = objective.queue.clone()
        out = objective(batch, 0)
    expected = queue_loss(q1, k2, queues[1], 0.2)[0] + queue_loss(q2, k1, queues[0], 0.2)[0]
    torch.testing.assert_close(out["loss"], expected)


def test_heads_end_without_a_norm(make_objective: Make) -> None:
    objective = make_objective("moby")
    for head in (objective.projector, objective.predictor):
        assert [type(m).__name__ for m in head] == ["Linear", "BatchNorm", "ReLU", "Linear"]


@pytest.mark.parametrize("size", [3, 10, 12])
def test_queue_holds_the_newest_keys_in_order(size: int, make_objective: Make, make_batch: Make) -> None:
    """Batches of 4 into queues shorter than a batch, no multiple of one, and a multiple of one."""
    objective = make_objective("moby", queue=size)
    start, seen = objective.queue.clone(), []
    for step in range(4):
        batch = make_batch(4, views=2, seed=step)
        with torch.no_grad():
            keys = [F.normalize(objective.momentum_projector(objective.teacher(x)), dim=1) for x in batch["views"]]
        objective(batch, step)
        assert torch.equal(objective.queue, start) if step == 0 else True  # committed after the step only
        objective.after_step(step)
        seen.insert(0, torch.stack(keys))
        expected = torch.cat([*seen, start], 1)[:, :size]
        torch.testing.assert_close(objective.queue, expected)
    assert not objective.queue.requires_grad and "queue" in objective.state_dict()
