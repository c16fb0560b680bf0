"""SimDINO (arXiv:2502.10385): DINO without prototypes, centre, temperatures or frozen layers. The student's unit
embeddings of every crop point where the teacher's of the large crops do, and a coding rate keeps them spread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcssl.models.build import Backbone
from gcssl.models.heads import DINOHead
from gcssl.ssl.base import Setup
from gcssl.ssl.ema import MomentumObjective
from gcssl.ssl.gather import all_reduce_sum_with_grad, gather_together, world_size
from gcssl.ssl.views import MultiCropConfig, check_above_zero, multi_crop_draw, signs


@dataclass
class SimDINOConfig(MultiCropConfig):
    name: str = "simdino"
    coeff: float = 1.0  # weight of the agreement
    eps: float = 0.05  # of the coding rate: as published for ImageNet (the code's default: 0.5)


def agreement(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Mean cosine similarity of each teacher crop with every other crop of the student's; B d each."""
    total = torch.stack(list(teacher)).sum(0)
    wanted = [total - teacher[v] if v < len(teacher) else total for v in range(len(student))]
    similar = [(w * s).sum(1).mean() for w, s in zip(wanted, student, strict=True)]
    return torch.stack(similar).sum() / (len(teacher) * (len(student) - 1))


def coding_rate(covariance: Tensor, count: int, eps: float) -> Tensor:
    """1/2 logdet(I + p / (N eps) Z^T Z) x (p + N) / (p N), of Z^T Z (p p, sum over N = count unit rows).

    The balancing factor is that of the published code. Largest when the rows fill all
    directions alike.
    """
    p = covariance.shape[0]
    grown = torch.eye(p, dtype=covariance.dtype, device=covariance.device) + covariance * (p / (count * eps))
    half_logdet = torch.linalg.cholesky_ex(grown)[0].diagonal().log().sum()
    return half_logdet * (p + count) / (p * count)


class SimDINO(MomentumObjective):
    """Student: encoder and projector. Teacher: momentum copies of both."""

    default_encoder = "teacher"
    couples_batch = True  # the covariance is that of the global batch

    def __init__(self, cfg: SimDINOConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__(cfg, encoder, setup)
        check_above_zero(cfg, "coeff", "eps")
        self.n_views = 2 + cfg.local_crops
        self.draw = multi_crop_draw(cfg, encoder, setup.augment)
        self.projector = DINOHead(encoder.num_features, cfg.hidden_dim, cfg.bottleneck_dim, count=0)
        self.make_teachers()

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Loss from the student's pooled features B C of all crops; the teacher sees the two large ones.

        The coding rate is that of the mean of student's and teacher's embedding of each large crop.
        """
        seen, teacher = self.teach(batch)  # B C, B p
        student = self.projector(torch.cat(features)).chunk(len(features))
        with torch.autocast(student[0].device.type, enabled=False):
            agree = agreement(teacher, student)
            both = torch.stack([(s + t) / 2 for s, t in zip(student[:2], teacher, strict=True)])  # 2 B p
            covariance = all_reduce_sum_with_grad(both.transpose(1, 2) @ both)  # 2 p p
            count = both.shape[1] * world_size()
            rate = torch.stack([coding_rate(c, count, self.cfg.eps) for c in covariance]).mean()
            loss = -self.cfg.coeff * agree - rate
        joined = gather_together(seen)  # N C
        terms = {"loss/agreement": agree.detach(), "loss/coding_rate": rate.detach()}
        return {"loss": loss, **terms, **signs(joined, joined)}
