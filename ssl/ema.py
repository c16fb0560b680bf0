"""Momentum (teacher) networks: an exponential moving average of the student's parameters."""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from gcssl.badsteps import tracked_norms
from gcssl.models.build import Backbone
from gcssl.models.gcvit import GCViT
from gcssl.optim import cosine
from gcssl.ssl.base import Setup
from gcssl.ssl.views import ViewObjective, check_share, run_views


def momentum_copy(student: nn.Module) -> nn.Module:
    """A teacher that starts equal to `student`: a deep copy without drop path or gradients."""
    teacher = copy.deepcopy(student)
    set_teaching(teacher, True)
    return teacher.requires_grad_(False)


def set_teaching(teacher: nn.Module, mode: bool) -> None:
    """Eval mode, so no drop path. With `mode` its batch norms, if any, normalise by the batch and keep running
    statistics of their own, as published: the student's are those of other weights.
    """
    teacher.eval()
    for norm in tracked_norms(teacher).values():
        norm.train(mode)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, m: float) -> None:
    """teacher <- m * teacher + (1 - m) * student for parameters, matched by name; buffers are copied, but for the
    statistics of batch norms.
    """
    ours, theirs = dict(teacher.named_parameters()), dict(student.named_parameters())
    if ours.keys() != theirs.keys():
        raise ValueError(f"teacher and student differ in parameters: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    torch._foreach_lerp_(list(ours.values()), [theirs[name].detach() for name in ours], 1.0 - m)
    buffers = dict(student.named_buffers())
    own = tracked_norms(teacher)
    for name, buffer in teacher.named_buffers():
        if name.rpartition(".")[0] not in own:
            buffer.copy_(buffers[name])


def momentum_at(step: int, total: int, m0: float) -> float:
    """Cosine from m0 at step 0 to 1 at step `total` (BYOL, arXiv:2006.07733, section 3.1)."""
    return cosine(step, total, m0, 1.0)


class MomentumObjective(ViewObjective):
    """An objective whose teacher follows its student: a copy of the encoder, and of each of `heads` as momentum_*.

    The teachers have no drop path (`set_teaching`) and move once per optimizer step that really happened.
    `cfg.momentum` rises to 1 along a cosine over `total_steps`.
    """

    heads: tuple[str, ...] = ("projector",)
    teacher: nn.Module
    momentum_projector: nn.Module

    def __init__(self, cfg: Any, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        check_share(cfg, "momentum")
        self.cfg, self.encoder, self.total_steps = cfg, encoder, setup.total_steps

    @property
    def follows(self) -> list[tuple[str, str]]:
        """The (teacher, student) pairs of modules."""
        return [("teacher", "encoder"), *((f"momentum_{head}", head) for head in self.heads)]

    def make_teachers(self) -> None:
        """Call it once the student's heads are made."""
        for teacher, student in self.follows:
            setattr(self, teacher, momentum_copy(getattr(self, student)))

    @torch.no_grad()
    def teach(self, batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The teacher's pooled features B C of the first two views, seen whole, and what its projector gives: B d."""
        seen = run_views(self.teacher, batch, range(2))  # B C
        return seen, [self.momentum_projector(h) for h in seen]

    def train(self, mode: bool = True) -> Self:
        """Set the student's mode; of the teachers only the batch norms follow."""
        super().train(mode)
        for teacher, _ in self.follows:
            set_teaching(getattr(self, teacher), mode)
        return self

    def momentum(self, step: int) -> float:
        """The teacher's momentum after optimizer step `step` (counted from 0).

        MoCo v3 moves the teacher at the start of step + 1, before encoding the keys: the same moment.
        """
        return momentum_at(step + 1, self.total_steps, self.cfg.momentum)

    def schedules(self, step: int) -> dict[str, float]:
        return {"momentum": self.momentum(step)}

    def after_step(self, step: int) -> None:
        """Move the teachers after optimizer step `step`, the one that `forward` got."""
        for teacher, student in self.follows:
            ema_update(getattr(self, teacher), getattr(self, student), self.momentum(step))
        if not isinstance(self.teacher, GCViT):
            set_teaching(self.teacher, self.training)  # where timm's LeViT caches its attention biases
