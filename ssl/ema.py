"""Momentum (teacher) networks: an exponential moving average of the student's parameters."""

import copy
import math
from typing import Self

import torch
from torch import nn


def momentum_copy(student: nn.Module) -> nn.Module:
    """A teacher that starts equal to `student`: a deep copy in eval mode (no drop path) without gradients."""
    teacher = copy.deepcopy(student).eval()
    return teacher.requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, m: float) -> None:
    """teacher <- m * teacher + (1 - m) * student for parameters; buffers are copied. Matched by name."""
    ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    if ours.keys() != theirs.keys():
        raise ValueError(f"teacher and student differ in parameters: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    torch._foreach_lerp_(list(ours.values()), [theirs[name].detach() for name in ours], 1.0 - m)
    buffers = dict(student.named_buffers())
    for name, buffer in teacher.named_buffers():
        buffer.copy_(buffers[name])


def momentum_at(step: int, total: int, m0: float) -> float:
    """Cosine from m0 at step 0 to 1 at step `total` (BYOL, arXiv:2006.07733, section 3.1)."""
    done = min(max(step / max(total, 1), 0.0), 1.0)
    return 1.0 - (1.0 - m0) * 0.5 * (1.0 + math.cos(math.pi * done))


class MomentumObjective(nn.Module):
    """An objective whose teacher follows its student: `follows` names (teacher, student) pairs of modules.

    The teachers stay in eval mode (no drop path) and move once per optimizer step that really happened.
    `start_momentum` rises to 1 along a cosine over `total_steps`.
    """

    follows: tuple[tuple[str, str], ...] = (("teacher", "encoder"), ("momentum_projector", "projector"))
    start_momentum: float
    total_steps: int

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; the teachers stay in eval mode."""
        super().train(mode)
        for teacher, _ in self.follows:
            getattr(self, teacher).eval()
        return self

    def momentum(self, step: int) -> float:
        """The teacher's momentum after optimizer step `step` (counted from 0).

        MoCo v3 moves the teacher at the start of step + 1, before encoding the keys: the same moment.
        """
        return momentum_at(step + 1, self.total_steps, self.start_momentum)

    def after_step(self, step: int) -> None:
        """Move the teachers after optimizer step `step`, the one that `forward` got."""
        for teacher, student in self.follows:
            ema_update(getattr(self, teacher), getattr(self, student), self.momentum(step))
            getattr(self, teacher).eval()  # timm's LeViT and others cache their attention biases there
