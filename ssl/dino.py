"""DINO (arXiv:2104.14294): self-distillation with no labels. The student's prototype assignments of every crop
match the teacher's of the two large crops, which are centred and sharpened.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gcssl.models.build import Backbone
from gcssl.models.heads import DINOHead
from gcssl.ssl.base import Setup
from gcssl.ssl.ema import momentum_copy
from gcssl.ssl.prototypes import (
    Center,
    PrototypeConfig,
    PrototypeObjective,
    check_prototypes,
    crops_loss,
    teacher_signs,
)
from gcssl.ssl.views import multi_crop_draw, run_views


@dataclass
class DINOConfig(PrototypeConfig):
    name: str = "dino"


class DINO(PrototypeObjective):
    """Student: encoder and projector. Teacher: momentum copies of both, and the centre of its outputs."""

    default_encoder = "teacher"

    def __init__(self, cfg: DINOConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        check_prototypes(cfg)
        self.cfg, self.total_steps, self.steps_per_epoch = cfg, setup.total_steps, setup.steps_per_epoch
        self.start_momentum, self.n_views = cfg.momentum, 2 + cfg.local_crops
        self.draw = multi_crop_draw(cfg, encoder, setup.augment)
        self.encoder = encoder
        dim = encoder.num_features
        self.projector = DINOHead(dim, cfg.hidden_dim, cfg.bottleneck_dim, cfg.out_dim, not cfg.norm_last_layer)
        self.teacher = momentum_copy(encoder)
        self.momentum_projector = momentum_copy(self.projector)
        self.center = Center(cfg.out_dim, cfg.center_momentum)

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Loss from the student's pooled features B C of all crops; the teacher sees the two large ones whole."""
        with torch.no_grad():
            seen = run_views(self.teacher, batch, range(2))  # B C
            outputs = [self.momentum_projector(h) for h in seen]  # B K
            self.center.note(torch.cat(outputs), step)
            teacher = [self.center(x, self.teacher_temp(step)) for x in outputs]
        student = self.projector(torch.cat(features)).chunk(len(features))
        view = crops_loss(teacher, student, self.cfg.student_temp)
        return {**self.losses(view, view, features[:2]), **teacher_signs(view, teacher, seen)}
