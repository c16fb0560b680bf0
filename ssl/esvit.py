"""EsViT (arXiv:2106.09785): DINO's task on whole views, and on regions: each region of a student's crop matches
the teacher's region that looks most alike.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.models.build import Backbone
from gcssl.models.functional import at_least_fp32
from gcssl.models.heads import DINOHead
from gcssl.ssl.base import Setup
from gcssl.ssl.prototypes import Center, PrototypeConfig, PrototypeObjective, crops_loss, cross_entropy, teacher_signs
from gcssl.ssl.views import run_maps, use_maps_alone


@dataclass
class EsViTConfig(PrototypeConfig):
    name: str = "esvit"


def matched_regions(student: Tensor, teacher: Tensor) -> Tensor:
    """For each student region the index of the teacher's most similar one: B n C, B m C -> B n, by cosine."""
    with torch.autocast(student.device.type, enabled=False):  # neighbours differ by less than bf16 tells apart
        student, teacher = (F.normalize(at_least_fp32(x), dim=-1) for x in (student, teacher))
        return (student @ teacher.transpose(1, 2)).argmax(-1)


def region_loss(
    teacher: list[Tensor],
    student: list[Tensor],
    teacher_features: list[Tensor],
    student_features: list[Tensor],
    temperature: float,
) -> Tensor:
    """Mean over pairs of a teacher's crop and another crop of the student's, samples and student regions
    (equation 3).

    teacher: log-probabilities B m K; student: outputs B n K; *_features: the backbone's B m C and B n C. As in
    crops_loss each student crop is compared with a sum.
    """
    every, losses, pairs = [log_q.exp() for log_q in teacher], [], 0  # B m K
    for v, outputs in enumerate(student):
        total = torch.zeros((), device=outputs.device)
        for t, q in enumerate(every):
            if t != v:
                best = matched_regions(student_features[v], teacher_features[t])  # B n
                total = total + q.gather(1, best[..., None].expand(-1, -1, q.shape[-1]))  # B n K
                pairs += 1
        losses.append(cross_entropy(total, outputs, temperature).mean())
    return torch.stack(losses).sum() / pairs


class EsViT(PrototypeObjective):
    """DINO's parts and a second head, centre and momentum copy for regions. Views are the mean of their regions."""

    heads = ("projector", "region_projector")
    centers = ("center", "region_center")
    region_projector: DINOHead
    momentum_region_projector: nn.Module
    region_center: Center

    def __init__(self, cfg: EsViTConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__(cfg, encoder, setup)
        use_maps_alone(encoder, cfg.name)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        t, temperature = self.teacher_temp(step), self.cfg.student_temp
        with torch.no_grad():
            taught = [m.flatten(2).transpose(1, 2) for m in run_maps(self.teacher, batch, range(2))]  # B m C
            seen = [r.mean(1) for r in taught]  # B C
            outputs = [self.momentum_projector(h) for h in seen]  # B K
            regions = self.momentum_region_projector(torch.cat(taught, 1)).chunk(2, 1)  # B m K each
            self.center.note(torch.cat(outputs), step)
            self.region_center.note(torch.cat(regions), step)
            teacher = [self.center(x, t) for x in outputs]
            teacher_regions = [self.region_center(x, t) for x in regions]
        found = [m.flatten(2).transpose(1, 2) for m in run_maps(self.encoder, batch, range(self.n_views))]  # B n C
        student = self.projector(torch.cat([r.mean(1) for r in found])).chunk(len(found))
        counts = [r.shape[1] for r in found]
        student_regions = self.region_projector(torch.cat(found, 1)).split(counts, 1)  # B n K each
        view = crops_loss(teacher, student, temperature)
        region = region_loss(teacher_regions, student_regions, taught, found, temperature)
        return {
            **self.losses((view + region) / 2, view, [r.mean(1) for r in found[:2]]),
            "loss/region": region.detach(),
            **teacher_signs(view, teacher, seen),
        }
