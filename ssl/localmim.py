"""LocalMIM (arXiv:2303.05251): every stage of the encoder predicts the hidden part at its own scale.

    loss = mean over stages of the target's loss, in cells of the stage's stride

Early stages thus learn from their own head and not through all that follows. A stage of stride s predicts cells of
s pixels: norm_pixels are standardised in them, hog counts gradients in them (4, 8, 16, 32 px in GC ViT). Where a
mask unit is not made of whole cells, they are the largest that do fit both. Departures from the paper's Swin: it
reads each stage behind its downsampler (cells of 8, 16, 32, 32 px), through a norm and a transformer block instead
of a linear head; it sums the losses; its hog has 18 bins; its encoder computes visible tokens alone. Here pixels and
stem tokens are both hidden, as in simmim.py, because GC ViT leaks otherwise.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gcssl.augment import MAE, override
from gcssl.errors import UserError
from gcssl.models.build import Backbone
from gcssl.models.gcvit import GCViT
from gcssl.ssl.base import Objective, Setup
from gcssl.ssl.masking import (
    STEM_STRIDE,
    MaskedDraw,
    check_ratio,
    check_unit,
    default_unit,
    fill_color,
    hide_pixels,
    make_mask_token,
)
from gcssl.ssl.targets import TARGETS, check_target, reconstruction, target_head, target_loss


@dataclass
class LocalMIMConfig:
    name: str = "localmim"
    mask_ratio: float = 0.75
    mask_unit: int | None = None  # pixels; null: 32 from 192 px up, 16 from 96, 8 below
    target: str = field(default="norm_pixels", metadata={"choices": TARGETS})


class LocalMIM(Objective):
    """Heads on all maps of stride 4 and more, on any backbone that has two or more of them."""

    n_pictures = 8

    def __init__(self, cfg: LocalMIMConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        height, width = size = setup.img_size
        unit = cfg.mask_unit if cfg.mask_unit is not None else default_unit(size)
        check_unit(size, unit)
        check_ratio((height // unit) * (width // unit), cfg.mask_ratio)
        if not isinstance(encoder, GCViT):
            encoder.check_map()
        check_target(cfg.target, unit, encoder.stride)
        stages = [(c, s) for c, s in zip(encoder.channels, encoder.strides, strict=True) if s >= STEM_STRIDE]
        if len(stages) < 2:
            raise UserError(f"objective.name=localmim: {encoder.name} has one stride only; take simmim, which is that")
        self.encoder: Any = encoder
        self.target, self.cells = cfg.target, [math.gcd(stride, unit) for _, stride in stages]
        self.heads = nn.ModuleList(
            target_head(cfg.target, dim, stride, cell) for (dim, stride), cell in zip(stages, self.cells, strict=True)
        )
        self.mask_token = make_mask_token(encoder, cfg.name)
        self.draw = MaskedDraw(override(MAE, setup.augment), unit, cfg.mask_ratio)

    def features(self, batch: dict[str, Any]) -> list[Tensor]:
        """The maps B C h w of all stages, the finest first, of the first view with its mask applied."""
        x, mask = batch["views"][0], batch["masks"][0]  # B 3 H W; B h w, True = hidden
        noise = batch.get("noise", [None])[0]
        maps = self.encoder.forward_pyramid(
            hide_pixels(x, mask, fill_color(self.encoder)), mask, self.mask_token, noise
        )
        return maps[-len(self.heads) :]

    def loss(self, features: list[Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss from the maps of the first view, whose own pixels are the target; each stage's under its name, and
        the sign of collapse of the last one.
        """
        x, mask = batch["views"][0], batch["masks"][0]
        outs = [
            target_loss(self.target, head(fmap), x, mask, cell)
            for head, fmap, cell in zip(self.heads, features, self.cells, strict=True)
        ]
        parts = {f"loss/stage{i}": out["loss"].detach() for i, out in enumerate(outs, 1)}
        return {**outs[-1], "loss": torch.stack([out["loss"] for out in outs]).mean(), **parts}

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        return self.loss(self.features(batch), batch)

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What `reconstruction` makes of the last stage's prediction."""
        x, mask = batch["views"][0], batch["masks"][0]
        pred = self.heads[-1](self.features(batch)[-1])
        seen = hide_pixels(x, mask, fill_color(self.encoder))
        return reconstruction(self.encoder, x, mask, seen, pred, self.target, self.cells[-1])
