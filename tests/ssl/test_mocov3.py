import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gcssl.models.heads import BatchNorm
from gcssl.ssl.mocov3 import info_nce

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


def test_loss_equals_a_slow_version_of_the_algorithm(make_midway: Make, make_batch: Make) -> None:
    objective, batch = make_midway("mocov3"), make_batch(6, views=2)
    with torch.no_grad():
        q = [objective.predictor(objective.projector(objective.encoder(x))) for x in batch["views"]]
        k = [objective.momentum_projector(objective.teacher(x)) for x in batch["views"]]
        expected = slow_info_nce(q[0], k[1], 0, 0.2) + slow_info_nce(q[1], k[0], 0, 0.2)
        out = objective(batch, 0)
    assert out["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert set(out) == {"loss", "accuracy", "feature_std", "feature_rank"}


def test_heads_end_in_a_norm_without_scale_and_shift(make_objective: Make) -> None:
    objective = make_objective("mocov3")
    for head in (objective.projector, objective.predictor):
        assert isinstance(head[-1], BatchNorm) and not list(head[-1].parameters())
