import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gcssl.augment import SIMCLR
from gcssl.ssl.simclr import nt_xent

Make = Callable[..., Any]


def slow_nt_xent(z1: Tensor, z2: Tensor, t: float) -> float:
    """Anchor by anchor: -log(exp(sim to partner / t) / sum over the other 2N - 1 views); a mean a view, added."""
    n, views = len(z1), [v.double() / v.double().norm() for v in (*z1, *z2)]
    losses = []
    for i, anchor in enumerate(views):
        others = {j: math.exp(float(anchor @ view) / t) for j, view in enumerate(views) if j != i}
        losses.append(-math.log(others[(i + n) % (2 * n)] / sum(others.values())))
    return sum(losses[:n]) / n + sum(losses[n:]) / n


def test_nt_xent_equals_the_slow_version() -> None:
    z1, z2 = torch.randn(5, 8), torch.randn(5, 8)
    loss, _ = nt_xent((z1, z2), (z1, z2), 0, 0.2)
    assert loss.item() == pytest.approx(slow_nt_xent(z1, z2, 0.2), rel=1e-5)


def test_nt_xent_closed_forms() -> None:
    n, t = 6, 0.5
    ones = torch.ones(n, 8)
    assert nt_xent((ones, ones), (ones, ones), 0, t)[0].item() == pytest.approx(2 * math.log(2 * n - 1), rel=1e-5)
    z = 3 * torch.eye(n)  # partners equal, all others orthogonal
    loss, accuracy = nt_xent((z, z), (z, z), 0, t)
    assert loss.item() == pytest.approx(2 * (-1 / t + math.log(math.exp(1 / t) + 2 * n - 2)), rel=1e-5)
    assert accuracy == 1.0


def test_nt_xent_of_parts_is_that_of_the_whole() -> None:
    """Process 1 of 2 holds samples 4..7: partners are offset by its place, and it is none of its own candidates."""
    z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
    whole = nt_xent((z1, z2), (z1, z2), 0, 0.1)
    parts = [nt_xent((z1[i : i + 4], z2[i : i + 4]), (z1, z2), i, 0.1) for i in (0, 4)]
    for k in (0, 1):
        torch.testing.assert_close(torch.stack([part[k] for part in parts]).mean(), whole[k])
    misplaced = nt_xent((z1[4:], z1[4:]), (z1, z1), 0, 0.1)
    assert misplaced[1] == 0.0


def test_nt_xent_is_fp32_and_finite_under_autocast() -> None:
    z = torch.randn(4, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = nt_xent(z, z, 0, 0.1)
        extreme, _ = nt_xent(z, z, 0, 1e-4)
    assert torch.equal(loss, nt_xent(z, z, 0, 0.1)[0]) and extreme.isfinite()


def test_loss_is_that_of_the_projected_views(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("simclr"), make_batch(6, views=2)
    with torch.no_grad():
        z = [objective.projector(objective.encoder(x)) for x in batch["views"]]
        out = objective(batch, 0)
    assert out["loss"].item() == pytest.approx(slow_nt_xent(*z, 0.1), rel=1e-4)
    assert set(out) == {"loss", "accuracy", "feature_std", "feature_rank"}


def test_head_is_the_published_one(make_objective: Make) -> None:
    layers = make_objective("simclr").projector
    assert [type(m).__name__ for m in layers] == ["Linear", "BatchNorm", "ReLU"] * 2 + ["Linear", "BatchNorm"]
    assert layers[-1].weight is not None and layers[-1].bias is None  # a scale, no shift
    assert layers[1].weight is not None and layers[1].bias is not None


def test_crops_are_resized_as_published() -> None:
    assert SIMCLR.interpolation == "bicubic"
