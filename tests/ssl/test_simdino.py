from collections.abc import Callable
from typing import Any

import pytest
import torch

from gcssl.ssl.simdino import agreement, coding_rate

Make = Callable[..., Any]


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def test_agreement_equals_the_slow_version() -> None:
    teacher, student = [unit(3, 4) for _ in range(2)], [unit(3, 4) for _ in range(5)]
    pairs = [
        torch.stack([torch.dot(a, b) for a, b in zip(t, s, strict=True)]).mean()
        for i, t in enumerate(teacher)
        for j, s in enumerate(student)
        if i != j
    ]
    assert len(pairs) == 8
    torch.testing.assert_close(agreement(teacher, student), torch.stack(pairs).mean())


def test_coding_rate_closed_forms() -> None:
    p, n, eps = 6, 24, 0.05
    same = torch.zeros(n, p)
    same[:, 0] = 1  # one direction: covariance has one eigenvalue n
    one = coding_rate(same.T @ same, n, eps)
    assert one.item() == pytest.approx(0.5 * torch.log(torch.tensor(1 + p / eps)).item() * (p + n) / (p * n), rel=1e-5)
    spread = torch.eye(p).repeat(n // p, 1)  # all directions alike: p eigenvalues n / p
    full = coding_rate(spread.T @ spread, n, eps)
    assert full.item() == pytest.approx(
        p * 0.5 * torch.log(torch.tensor(1 + 1 / eps)).item() * (p + n) / (p * n), rel=1e-5
    )
    z = unit(n, p)
    assert full > coding_rate(z.T @ z, n, eps) > one


def test_coding_rate_equals_logdet() -> None:
    z = unit(10, 4).double()
    expected = 0.5 * torch.logdet(torch.eye(4).double() + 4 / (10 * 0.5) * z.T @ z) * 14 / 40
    torch.testing.assert_close(coding_rate(z.T @ z, 10, 0.5), expected)


def test_loss_is_made_of_both_terms(make_midway: Make, make_batch: Make) -> None:
    objective = make_midway("simdino", local_crops=2, local_size=32, coeff=2.0, eps=0.5)
    batch = make_batch(4, views=2, small=2)
    with torch.no_grad():
        student = [objective.projector(objective.encoder(x)) for x in batch["views"]]
        teacher = [objective.momentum_projector(objective.teacher(x)) for x in batch["views"][:2]]
        both = [(s + t) / 2 for s, t in zip(student[:2], teacher, strict=True)]
        rate = sum(coding_rate(z.T @ z, 4, 0.5) for z in both) / 2
        out = objective(batch, 0)
    torch.testing.assert_close(out["loss"], -2.0 * agreement(teacher, student) - rate, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["loss/coding_rate"], rate, rtol=1e-4, atol=1e-5)


def test_finite_under_autocast_and_when_all_collapse(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("simdino"), make_batch(4, views=2)
    with torch.no_grad():
        objective.projector.mlp[-1].weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(batch, 0)
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32 and out["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)
