"""Self-distillation to prototypes: what DINO (arXiv:2104.14294), EsViT and iBOT share.

The student's prototype assignments match the teacher's, which are centred and sharpened.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.models.build import Backbone
from gcssl.models.functional import at_least_fp32
from gcssl.models.heads import DINOHead
from gcssl.ssl.base import Setup
from gcssl.ssl.ema import MomentumObjective
from gcssl.ssl.gather import all_gather_with_grad, all_reduce_mean, gather_together
from gcssl.ssl.views import MultiCropConfig, check_above_zero, check_at_least, check_share, multi_crop_draw, signs


@dataclass
class PrototypeConfig(MultiCropConfig):
    """What DINO, EsViT and iBOT share."""

    out_dim: int = 65536  # prototypes
    norm_last_layer: bool = True  # false: each prototype has a learned gain
    student_temp: float = 0.1
    warmup_teacher_temp: float = 0.04
    teacher_temp: float = 0.04  # after the warm-up
    warmup_teacher_temp_epochs: float = 0.0
    freeze_last_layer_epochs: float = 1.0
    center_momentum: float = 0.9
    koleo_weight: float = 0.0  # of `koleo`; DINOv2's is 0.2 (what it does to short runs: docs/results/learning)


class Center(nn.Module):
    """The moving mean of the teacher's outputs over the global batch (section 3.1, equation 4): K.

    `note` may be called once a micro-batch; `commit` moves the mean once an optimizer step, so that
    accumulation changes nothing.
    """

    mean: Tensor

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.momentum = momentum
        self.noted: list[Tensor] = []  # mean outputs of the micro-batches of `step`
        self.step = -1

    def note(self, outputs: Tensor, step: int) -> None:
        """The teacher's outputs ... K of one micro-batch of step `step`."""
        if step != self.step:
            self.noted, self.step = [], step
        self.noted.append(at_least_fp32(outputs).flatten(0, -2).mean(0))

    @torch.no_grad()
    def commit(self) -> None:
        now = all_reduce_mean(torch.stack(self.noted).mean(0)).to(self.mean.dtype)
        self.mean.lerp_(now, 1.0 - self.momentum)

    def forward(self, outputs: Tensor, temperature: float) -> Tensor:
        """log softmax((outputs - mean) / temperature), ... K, in fp32."""
        return ((at_least_fp32(outputs) - self.mean) / temperature).log_softmax(-1)


def cross_entropy(q: Tensor, student: Tensor, temperature: float) -> Tensor:
    """-sum q log softmax(student / temperature) over the last dimension: ... K -> ..., in fp32."""
    return -(q * (at_least_fp32(student) / temperature).log_softmax(-1)).sum(-1)


def crops_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean over samples, and over the pairs of a teacher's crop and another crop of the student's, of their
    cross-entropy.

    teacher: log-probabilities B K of the first crops; student: outputs B K of all crops. ln K where either is
    uniform. As the cross-entropy is linear in the teacher, each student crop is compared with a sum.
    """
    q = [t.exp() for t in teacher]
    total = torch.stack(q).sum(0)
    wanted = [total - q[v] if v < len(q) else total for v in range(len(student))]
    losses = [cross_entropy(w, s, temperature).mean() for w, s in zip(wanted, student, strict=True)]
    return torch.stack(losses).sum() / (len(q) * (len(student) - 1))


def koleo(features: Sequence[Tensor]) -> Tensor:
    """Minus the mean log distance of an image's l2-normalised features to the nearest ones of another image in the
    global batch: a mean over crops B C (KoLeo, arXiv:1806.03198; DINOv2, arXiv:2304.07193, sums over its two crops).
    """
    losses = []
    for x in features:
        with torch.autocast(x.device.type, enabled=False):
            z = F.normalize(all_gather_with_grad(at_least_fp32(x)), dim=1)  # N C
            nearest = (z @ z.T).detach().fill_diagonal_(-2.0).argmax(1)
            losses.append(-((z - z[nearest]).norm(dim=1) + 1e-8).log().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def entropy(log_q: Sequence[Tensor]) -> Tensor:
    """Mean entropy of log-probabilities ... K, in nats: ln K for a teacher that prefers nothing, 0 for one-hot."""
    return torch.stack([-(x.exp() * x).sum(-1).mean() for x in log_q]).mean()


def teacher_signs(view_loss: Tensor, teacher: Sequence[Tensor], seen: Sequence[Tensor]) -> dict[str, Tensor]:
    """What tells a collapse: entropy of the teacher's log-probabilities B K, what of the loss is above it, and the
    spread of its pooled features B C over all processes.
    """
    uncertain, joined = entropy(teacher), gather_together(seen)
    return {"teacher_entropy": uncertain, "kl": view_loss.detach() - uncertain, **signs(joined, joined)}


def warmed_up(step: int, steps_per_epoch: int, start: float, end: float, epochs: float) -> float:
    """Linear from `start` at step 0 to `end` after `epochs` epochs, then `end`."""
    share = min(step / (epochs * steps_per_epoch), 1.0) if epochs else 1.0
    return start + (end - start) * share


class PrototypeObjective(MomentumObjective):
    """What DINO, EsViT and iBOT do alike: crops, heads with their prototypes in `last`, teachers, centres of what these
    say, temperatures.
    """

    default_encoder = "teacher"
    projector: DINOHead
    centers: tuple[str, ...] = ("center",)
    center: Center

    def __init__(self, cfg: Any, encoder: Backbone, setup: Setup) -> None:
        super().__init__(cfg, encoder, setup)
        check_at_least(cfg, out_dim=2, warmup_teacher_temp_epochs=0, freeze_last_layer_epochs=0, koleo_weight=0)
        check_above_zero(cfg, "student_temp", "teacher_temp", "warmup_teacher_temp")
        check_share(cfg, "center_momentum")
        self.steps_per_epoch, self.n_views = setup.steps_per_epoch, 2 + cfg.local_crops
        self.draw = multi_crop_draw(cfg, encoder, setup.augment)
        size = (encoder.num_features, cfg.hidden_dim, cfg.bottleneck_dim, cfg.out_dim, not cfg.norm_last_layer)
        for head in self.heads:
            setattr(self, head, DINOHead(*size))
        self.make_teachers()
        for center in self.centers:
            setattr(self, center, Center(cfg.out_dim, cfg.center_momentum))

    @property
    def couples_batch(self) -> bool:
        """Centres are committed once a step, so only KoLeo looks from one image to another."""
        return self.cfg.koleo_weight > 0

    def teacher_temp(self, step: int) -> float:
        c = self.cfg
        epochs = c.warmup_teacher_temp_epochs
        return warmed_up(step, self.steps_per_epoch, c.warmup_teacher_temp, c.teacher_temp, epochs)

    def losses(self, loss: Tensor, view: Tensor, large: Sequence[Tensor]) -> dict[str, Tensor]:
        """The whole loss, from what the prototypes give and the student's pooled large crops B C; and its parts."""
        parts = {"loss": loss, "loss/view": view.detach()}
        if self.cfg.koleo_weight:
            spread = koleo(large)
            parts |= {"loss": loss + self.cfg.koleo_weight * spread, "loss/koleo": spread.detach()}
        return parts

    def chance(self, global_batch: int) -> dict[str, float]:
        """The loss of embeddings that say nothing, for the collapse watch."""
        return {"loss/view": math.log(self.cfg.out_dim)}

    def freeze(self, step: int) -> None:
        """Drop the prototypes' gradients in the first epochs (appendix C): call it before clipping."""
        if step < self.cfg.freeze_last_layer_epochs * self.steps_per_epoch:
            for head in self.heads:
                for parameter in getattr(self, head).last.parameters():
                    parameter.grad = None

    def after_step(self, step: int) -> None:
        """Move teacher and centres after optimizer step `step`, the one that `forward` got."""
        super().after_step(step)
        for center in self.centers:
            getattr(self, center).commit()
