import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gcssl.ssl.vicreg import covariance_loss, variance_loss

Make = Callable[..., Any]


def test_variance_loss_closed_forms() -> None:
    assert variance_loss(torch.ones(8, 4)).item() == pytest.approx(1 - 1e-2)  # collapsed: 1 - sqrt(1e-4)
    assert variance_loss(10 * torch.randn(64, 4)) == 0.0  # wide enough
    z = torch.tensor([[0.0], [1.0]])  # unbiased variance 1/2
    assert variance_loss(z).item() == pytest.approx(1 - math.sqrt(0.5 + 1e-4), rel=1e-5)


def test_covariance_loss_equals_a_slow_version() -> None:
    z = torch.randn(7, 4)
    mean = [sum(float(row[i]) for row in z) / 7 for i in range(4)]
    total = 0.0
    for i in range(4):
        for j in range(4):
            cov = sum((float(row[i]) - mean[i]) * (float(row[j]) - mean[j]) for row in z) / 6
            total += cov**2 if i != j else 0.0
    assert covariance_loss(z).item() == pytest.approx(total / 4, rel=1e-4)
    assert covariance_loss(torch.randn(100_000, 1)) == 0.0


def test_loss_is_the_weighted_sum(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("vicreg", covariance=3.0), make_batch(6, views=2)
    with torch.no_grad():
        a, b = (objective.projector(objective.encoder(x)) for x in batch["views"])
        out = objective(batch, 0)
    expected = 25 * (a - b).square().mean() + 25 * (variance_loss(a) + variance_loss(b)) / 2
    torch.testing.assert_close(out["loss"], expected + 3 * (covariance_loss(a) + covariance_loss(b)))
    assert {"loss/invariance", "loss/variance", "loss/covariance"} <= set(out)


def test_terms_are_fp32_under_autocast(make_objective: Make, make_batch: Make) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = make_objective("vicreg")(make_batch(4, views=2), 0)
    assert all(out[key].dtype == torch.float32 for key in ("loss", "loss/variance", "loss/covariance"))
