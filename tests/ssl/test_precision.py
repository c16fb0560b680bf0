"""Losses under autocast are those of fp32: what they compare is computed whole, not in half precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.ssl.moby import queue_loss
from gcssl.ssl.prototypes import Center, cross_entropy, koleo

Make = Callable[..., Any]


def rows(n: int, seed: int) -> Tensor:
    """n rows near each other, so that half precision would confuse them."""
    return 1 + 0.05 * torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))


def simdino(make_objective: Make, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    objective = make_objective("simdino")
    objective.projector = objective.momentum_projector = nn.Identity()
    monkeypatch.setattr("gcssl.ssl.ema.run_views", lambda *_: [rows(32, 1), rows(32, 2)])
    return objective.loss([rows(32, 3), rows(32, 4)], {}, 0)["loss"]


@pytest.mark.parametrize("name", ["koleo", "queue_loss", "cross_entropy", "simdino"])
def test_a_loss_is_the_same_under_autocast(name: str, make_objective: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {
        "koleo": lambda: koleo([rows(256, 0)]),
        "queue_loss": lambda: queue_loss(rows(32, 0), rows(32, 1), F.normalize(rows(64, 2), dim=1), 0.05)[0],
        "cross_entropy": lambda: cross_entropy(rows(8, 0).softmax(1), rows(8, 1), 0.1).sum(),
        "simdino": lambda: simdino(make_objective, monkeypatch),
    }
    want = losses[name]()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses[name](), want)


def test_half_precision_outputs_are_widened_before_they_are_divided_or_averaged() -> None:
    outputs = (1e4 * torch.randn(64, 9)).half()
    q = torch.full((64, 9), 1 / 9)
    torch.testing.assert_close(cross_entropy(q, outputs, 0.1), cross_entropy(q, outputs.float(), 0.1))
    center = Center(9, 0.9)
    center.note(outputs, 0)
    assert center.noted[0].dtype == torch.float32
    torch.testing.assert_close(center.noted[0], outputs.float().mean(0))


def test_equal_images_do_not_make_koleo_infinite() -> None:
    """Two rows of a batch may be of one image: log 0 (facebookresearch/dinov2 issue 314)."""
    x = rows(8, 0)
    x[3] = x[5]
    x.requires_grad_(True)
    loss = koleo([x])
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
