"""SimMIM (arXiv:2111.09886): predict the normalised RGB of hidden pixels, or another target, with a linear head.

Two departures, both because GC ViT's overlapping stem and squeeze-excite leak: the hidden pixels are set to 0
before the stem, and the stem's tokens there are replaced by the mask token after it (SimMIM does only the latter).
FastMIM (arXiv:2212.06593) is this at 128 px with `fill=learned`, a trainable colour of the hidden pixels, `target=hog`
and four transformer blocks before the head.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gcssl.augment import SIMMIM, override
from gcssl.models.build import Backbone
from gcssl.models.decoders import MapDecoder
from gcssl.ssl.base import Objective, Setup
from gcssl.ssl.masking import (
    MaskedDraw,
    check_ratio,
    check_unit,
    default_unit,
    fill_color,
    hide_pixels,
    make_mask_token,
)
from gcssl.ssl.targets import HOG_CELL, TARGETS, check_target, reconstruction, target_head, target_loss


@dataclass
class SimMIMConfig:
    name: str = "simmim"
    mask_ratio: float = 0.6
    mask_unit: int | None = None  # pixels; null: 32 from 192 px up, 16 from 96, 8 below
    target: str = field(default="pixels", metadata={"choices": TARGETS})
    fill: str = field(default="zero", metadata={"choices": ("zero", "learned")})  # of hidden pixels
    decoder_dim: int = 256
    decoder_depth: int = 0  # transformer blocks before the linear head (FastMIM: 4)


class SimMIM(Objective):
    """Masked image modelling on any backbone; one that takes no mask token is masked in its pixels only."""

    n_pictures = 8

    def __init__(self, cfg: SimMIMConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        height, width = size = setup.img_size
        unit = cfg.mask_unit if cfg.mask_unit is not None else default_unit(size)
        check_unit(size, unit)
        check_ratio((height // unit) * (width // unit), cfg.mask_ratio)
        self.encoder: Any = encoder
        self.target, self.cell = cfg.target, HOG_CELL if cfg.target == "hog" else unit
        check_target(cfg.target, unit, encoder.stride)
        self.head: nn.Module
        if cfg.decoder_depth:
            decoder = MapDecoder(encoder.num_features, cfg.decoder_dim, cfg.decoder_depth)
            self.head = nn.Sequential(decoder, target_head(cfg.target, cfg.decoder_dim, encoder.stride, self.cell))
        else:
            self.head = target_head(cfg.target, encoder.num_features, encoder.stride, self.cell)
        self.mask_token = make_mask_token(encoder, cfg.name)
        color = fill_color(encoder)
        self.mask_color = nn.Parameter(torch.full((3,), color)) if cfg.fill == "learned" else color
        self.draw = MaskedDraw(override(SIMMIM, setup.augment), unit, cfg.mask_ratio)

    def features(self, batch: dict[str, Any]) -> Tensor:
        """The last map B C h w of the first view with its mask applied."""
        x, mask = batch["views"][0], batch["masks"][0]  # B 3 H W; B h w, True = hidden
        noise = batch.get("noise", [None])[0]
        return self.encoder.forward_features(hide_pixels(x, mask, self.mask_color), mask, self.mask_token, noise)

    def loss(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss from the last map (B C h w) of the first view, whose own pixels are the target."""
        x, mask = batch["views"][0], batch["masks"][0]
        return target_loss(self.target, self.head(features), x, mask, self.cell)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        return self.loss(self.features(batch), batch)

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What `reconstruction` makes of them."""
        x, mask = batch["views"][0], batch["masks"][0]
        seen = hide_pixels(x, mask, self.mask_color)
        return reconstruction(self.encoder, x, mask, seen, self.head(self.features(batch)), self.target, self.cell)
