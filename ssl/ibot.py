"""iBOT (arXiv:2111.07832): DINO's task on whole views, and masked image modelling whose targets are the teacher's
prototype assignments of the hidden regions of the same view.

Regions are the backbone's last tokens (32 pixels on GC ViT), pooled features their mean. Pixels are hidden before the
stem and tokens after it (ssl/simmim.py says why).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcssl.augment import View, ViewSpec
from gcssl.errors import UserError
from gcssl.models.build import Backbone
from gcssl.ssl.base import Setup
from gcssl.ssl.masking import draw_blocks, fill_color, hide_pixels, make_mask_token
from gcssl.ssl.prototypes import (
    Center,
    PrototypeConfig,
    PrototypeObjective,
    crops_loss,
    cross_entropy,
    teacher_signs,
    warmed_up,
)
from gcssl.ssl.views import check_above_zero, check_at_least, check_share, run_maps, run_views


@dataclass
class IBOTConfig(PrototypeConfig):
    name: str = "ibot"
    out_dim: int = 8192  # of the one head for views and regions
    norm_last_layer: bool = False
    mask_ratio: float = 0.3  # of a view that is masked: mask_ratio +- mask_ratio_var
    mask_ratio_var: float = 0.2
    mask_prob: float = 0.5  # share of the large views that are masked
    warmup_teacher_patch_temp: float = 0.04
    teacher_patch_temp: float = 0.07  # after warmup_teacher_temp_epochs
    pred_start_epoch: float = 0.0  # before it nothing is masked; 50 as published for Swin


@dataclass(frozen=True)
class MaskedCropDraw:
    """DINO's crops; in each large one, with probability `prob`, blocks of units hidden: masks h w or None."""

    crops: Callable[..., Any]
    unit: int
    prob: float
    ratio: tuple[float, float]

    def __call__(
        self, rng: np.random.Generator, img_size: tuple[int, int]
    ) -> tuple[list[tuple[ViewSpec, View]], list[np.ndarray | None]]:
        views, masks = self.crops(rng, img_size)
        grid = (img_size[0] // self.unit, img_size[1] // self.unit)
        for i in range(2):
            masked, ratio = rng.random() < self.prob, rng.uniform(*self.ratio)
            masks[i] = draw_blocks(rng, grid, max(1, round(ratio * grid[0] * grid[1])) if masked else 0)
        return views, masks


def masked_loss(teacher: Tensor, student: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Mean over samples of the mean cross-entropy of hidden regions; 0 for a sample that hides none.

    teacher: log-probabilities B n K; student: outputs B n K; mask: B n.
    """
    error = cross_entropy(teacher.exp(), student, temperature)  # B n
    return ((error * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


class IBOT(PrototypeObjective):
    """Student: encoder, mask token, projector. Teacher: momentum copies of encoder and projector, two centres."""

    centers = ("center", "patch_center")
    patch_center: Center

    def __init__(self, cfg: IBOTConfig, encoder: Backbone, setup: Setup) -> None:
        token = make_mask_token(encoder, cfg.name)  # before the heads, so that a seed gives the weights it gave
        super().__init__(cfg, encoder, setup)
        self.mask_token = token
        check_above_zero(cfg, "warmup_teacher_patch_temp", "teacher_patch_temp")
        check_at_least(cfg, pred_start_epoch=0)
        check_share(cfg, "mask_prob")
        low, high = cfg.mask_ratio - cfg.mask_ratio_var, cfg.mask_ratio + cfg.mask_ratio_var
        if not 0 < low <= high < 1:
            given = f"objective.mask_ratio={cfg.mask_ratio}, objective.mask_ratio_var={cfg.mask_ratio_var}"
            raise UserError(f"{given}: ratio - var and ratio + var must lie between 0 and 1, both excluded")
        self.draw = MaskedCropDraw(self.draw, encoder.stride, cfg.mask_prob, (low, high))

    def loss_changes(self, step: int) -> bool:
        """Whether the masked term joins the loss at this step."""
        start = self.cfg.pred_start_epoch * self.steps_per_epoch
        return start > 0 and step == math.ceil(start)

    def patch_temp(self, step: int) -> float:
        c = self.cfg
        epochs = c.warmup_teacher_temp_epochs
        return warmed_up(step, self.steps_per_epoch, c.warmup_teacher_patch_temp, c.teacher_patch_temp, epochs)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        masks = torch.cat(batch["masks"][:2])  # 2B h w
        if step < self.cfg.pred_start_epoch * self.steps_per_epoch:
            masks = torch.zeros_like(masks)
        with torch.no_grad():
            taught = torch.cat(run_maps(self.teacher, batch, range(2))).flatten(2).transpose(1, 2)  # 2B n C
            seen = taught.mean(1)  # 2B C
            outputs, patches = self.momentum_projector(seen), self.momentum_projector(taught)  # 2B K, 2B n K
            self.center.note(outputs, step)
            self.patch_center.note(patches, step)
            teacher = self.center(outputs, self.teacher_temp(step)).chunk(2)
            teacher_patches = self.patch_center(patches, self.patch_temp(step))

        def hidden(x: Tensor, noise: Tensor | None) -> Tensor:
            seen = hide_pixels(x, masks, fill_color(self.encoder))
            return self.encoder.forward_features(seen, masks, self.mask_token, noise)

        large = torch.cat(run_views(hidden, batch, range(2))).flatten(2).transpose(1, 2)  # 2B n C
        small = [m.mean((2, 3)) for m in run_maps(self.encoder, batch, range(2, self.n_views))]
        student = self.projector(torch.cat([large.mean(1), *small])).chunk(self.n_views)
        view = crops_loss(teacher, student, self.cfg.student_temp)
        patch = masked_loss(teacher_patches, self.projector(large), masks.flatten(1), self.cfg.student_temp)
        return {
            **self.losses(view + patch, view, large.mean(1).chunk(2)),
            "loss/patch": patch.detach(),
            **teacher_signs(view, teacher, seen.chunk(2)),
        }
