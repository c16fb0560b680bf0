"""DINO (arXiv:2104.14294): self-distillation with no labels. The student's prototype assignments of every crop
match the teacher's of the two large crops, which are centred and sharpened.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcssl.ssl.prototypes import PrototypeConfig, PrototypeObjective, crops_loss, teacher_signs


@dataclass
class DINOConfig(PrototypeConfig):
    name: str = "dino"


class DINO(PrototypeObjective):
    """Student: encoder and projector. Teacher: momentum copies of both, and the centre of its outputs."""

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Loss from the student's pooled features B C of all crops; the teacher sees the two large ones."""
        seen, outputs = self.teach(batch)  # B C, B K
        self.center.note(torch.cat(outputs), step)
        teacher = [self.center(x, self.teacher_temp(step)) for x in outputs]
        student = self.projector(torch.cat(features)).chunk(len(features))
        view = crops_loss(teacher, student, self.cfg.student_temp)
        return {**self.losses(view, view, features[:2]), **teacher_signs(view, teacher, seen)}
