"""Our losses beside lightly's on the same tensors. Optional: make test-peers (1.6 was tried)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gcssl.ssl.byol import regression_loss
from gcssl.ssl.ibot import masked_loss
from gcssl.ssl.moby import queue_loss
from gcssl.ssl.prototypes import Center, crops_loss
from gcssl.ssl.simclr import nt_xent

lightly_loss = pytest.importorskip("lightly.loss", reason="lightly is not installed: make test-peers")

Make = Callable[..., Any]


def test_nt_xent() -> None:
    z = torch.randn(8, 16), torch.randn(8, 16)
    theirs = lightly_loss.NTXentLoss(temperature=0.1)(*z)  # a mean over all anchors; ours adds those of two views
    torch.testing.assert_close(nt_xent(z, z, 0, 0.1)[0], 2 * theirs)


def test_queue() -> None:
    """Theirs contrasts with a memory bank too."""
    q, key = torch.randn(4, 16), torch.randn(4, 16)
    theirs = lightly_loss.NTXentLoss(temperature=0.2, memory_bank_size=(10, 16))
    bank = F.normalize(theirs.memory_bank.bank.clone(), dim=1)  # 10 16
    torch.testing.assert_close(queue_loss(q, key, bank, 0.2)[0], theirs(q, key))


def test_dino() -> None:
    teacher, student = [torch.randn(5, 32) for _ in range(2)], [torch.randn(5, 32) for _ in range(6)]
    theirs = lightly_loss.DINOLoss(output_dim=32, center_momentum=0.9)
    center = Center(32, 0.9)
    for step in range(3):  # the centre moves
        ours = crops_loss([center(x, 0.05) for x in teacher], student, 0.1)
        torch.testing.assert_close(ours, theirs(teacher, student, teacher_temp=0.05))
        center.note(torch.cat(teacher), step)
        center.commit()


def test_ibot_patches() -> None:
    teacher, student = torch.randn(3, 4, 16), torch.randn(3, 4, 16)
    mask = torch.tensor([[[1, 0], [1, 1]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]]).bool()
    flat = mask.flatten(1)
    theirs = lightly_loss.IBOTPatchLoss(output_dim=16, teacher_temp=0.05)(teacher[flat], student[flat], mask)
    torch.testing.assert_close(masked_loss((teacher / 0.05).log_softmax(-1), student, flat, 0.1), theirs)


def test_vicreg(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("vicreg"), make_batch(6, views=2)
    z = [objective.projector(objective.encoder(x)) for x in batch["views"]]
    torch.testing.assert_close(objective(batch, 0)["loss"], lightly_loss.VICRegLoss()(*z))


def test_byol() -> None:
    p, t = torch.randn(7, 16), torch.randn(7, 16)
    torch.testing.assert_close(regression_loss(p, t), 2 + 2 * lightly_loss.NegativeCosineSimilarity()(p, t))
