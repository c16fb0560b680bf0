"""UM-MAE (arXiv:2205.10063): the encoder sees a quarter of the image, stitched to an image of half the side.

Of each 2 x 2 block of units one is kept, at random (uniform sampling); the kept ones, side by side, are an image
that any backbone takes, and nothing of the dropped ones is in it. Part of the kept units is hidden once more
(secondary masking), since a task of one in four alone is too easy. A light decoder predicts the dropped units:

    loss = mean (prediction - norm_pixels)^2 over dropped units

masks[0] B h w: the units of the image, True = dropped. masks[1] B h/2 w/2: the kept units, True = hidden. Both
belong to the one view. Departures: the secondary mask hides pixels before the stem as well as tokens after it, as
in simmim.py; bias tables read the stitched image's own positions, not the kept units' places in the whole one.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from gcssl.augment import MAE, View, ViewSpec, draw_view, override
from gcssl.errors import UserError
from gcssl.models.build import Backbone
from gcssl.models.decoders import TokenDecoder
from gcssl.models.gcvit import GCViT
from gcssl.ssl.base import Objective, Setup
from gcssl.ssl.masking import (
    STEM_STRIDE,
    default_unit,
    draw_mask,
    draw_uniform_mask,
    fill_color,
    hidden_count,
    hide_pixels,
    keep_units,
    make_mask_token,
    upsample_mask,
)
from gcssl.ssl.targets import reconstruction, target_loss
from gcssl.ssl.views import check_takes


@dataclass
class UMMAEConfig:
    name: str = "ummae"
    mask_unit: int | None = None  # pixels; null: 16 from 96 px up, 8 below
    secondary_ratio: float = 0.25  # of the kept units
    decoder_dim: int = 512
    decoder_depth: int = 2


@dataclass(frozen=True)
class UniformDraw:
    """A sample's one crop and its two masks: (rng, (H, W)) -> ([(spec, view)], [mask h w, mask h/2 w/2])."""

    spec: ViewSpec  # its size is that of the call
    unit: int
    secondary_ratio: float

    def __call__(
        self, rng: np.random.Generator, img_size: tuple[int, int]
    ) -> tuple[list[tuple[ViewSpec, View]], list[np.ndarray | None]]:
        spec = replace(self.spec, size=img_size)
        h, w = img_size[0] // self.unit, img_size[1] // self.unit
        view, mask = draw_view(rng, spec), draw_uniform_mask(rng, (h, w))
        return [(spec, view)], [mask, draw_mask(rng, (h // 2, w // 2), self.secondary_ratio)]


def check_compaction(encoder: Backbone, img_size: tuple[int, int], unit: int, secondary_ratio: float) -> None:
    """UserError unless units tile the encoder's tokens, half the image suits it, and a kept unit stays visible."""
    if not isinstance(encoder, GCViT):
        encoder.check_map()
    legal = [u for u in range(STEM_STRIDE, encoder.stride + 1, STEM_STRIDE) if encoder.stride % u == 0]
    if not legal:
        stride = f"{encoder.name} has tokens of {encoder.stride} px"
        raise UserError(f"objective.name=ummae: {stride}, which no mask unit of 4, 8, ... px divides; take simmim")
    if unit not in legal:
        raise UserError(f"objective.mask_unit={unit}: ummae needs a divisor of the stride {encoder.stride}: {legal}")
    side = 2 * (max(encoder.stride, *encoder.window_ratio) if isinstance(encoder, GCViT) else encoder.stride)
    if img_size[0] % side or img_size[1] % side:
        height, width = img_size
        raise UserError(f"model.img_size={height}x{width}: ummae halves it, so both sides must be multiples of {side}")
    check_half(encoder, img_size)
    n_kept = img_size[0] * img_size[1] // (2 * unit) ** 2
    if n_kept < 2:
        given = f"objective.mask_unit={unit}: of {img_size[0]}x{img_size[1]} px ummae keeps {n_kept} unit"
        raise UserError(f"{given}, and hides some of those; take a smaller unit or larger images")
    if not 0.0 <= secondary_ratio < 1.0 or hidden_count(n_kept, secondary_ratio) >= n_kept:
        raise UserError(
            f"objective.secondary_ratio={secondary_ratio} must lie in [0, 1) and leave one of {n_kept} kept units"
        )


def check_half(encoder: Backbone, img_size: tuple[int, int]) -> None:
    """UserError unless the encoder takes images of half the size; GC ViT does."""
    height, width = img_size[0] // 2, img_size[1] // 2
    try:
        if not isinstance(encoder, GCViT):
            check_takes(encoder, height, width)
    except UserError:
        built = f"{encoder.name} built for {img_size[0]}x{img_size[1]} does not take"
        raise UserError(
            f"objective.name=ummae gives the backbone images of half the size, {height}x{width}, which {built}; "
            "take simmim or another backbone"
        ) from None


class UMMAE(Objective):
    """Uniformly masked autoencoder on any backbone; one that takes no mask token is masked in its pixels only."""

    n_pictures = 8

    def __init__(self, cfg: UMMAEConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        height, width = size = setup.img_size
        self.unit = unit = cfg.mask_unit if cfg.mask_unit is not None else min(16, default_unit(size))
        check_compaction(encoder, size, unit, cfg.secondary_ratio)
        self.encoder: Any = encoder
        self.mask_token = make_mask_token(encoder, cfg.name)
        grid = (height // unit, width // unit)
        split = encoder.stride // unit
        self.decoder = TokenDecoder(encoder.num_features, grid, unit, split, cfg.decoder_dim, cfg.decoder_depth)
        self.draw = UniformDraw(override(MAE, setup.augment), unit, cfg.secondary_ratio)

    def predict(self, batch: dict[str, Any]) -> Tensor:
        """Normalised pixels B 3 H W of the first view, from its stitched and masked kept units."""
        x, (mask, second) = batch["views"][0], batch["masks"][:2]  # B 3 H W; B h w; B h/2 w/2
        noise = batch.get("noise", [None])[0]
        seen = hide_pixels(keep_units(x, mask), second, fill_color(self.encoder))  # B 3 H/2 W/2
        return self.decoder(self.encoder.forward_features(seen, second, self.mask_token, noise), mask)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        x, mask = batch["views"][0], batch["masks"][0]
        return target_loss("norm_pixels", self.predict(batch), x, mask, self.unit)

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What `reconstruction` makes of them; hidden: what the encoder sees, each unit in its place."""
        x, (mask, second) = batch["views"][0], batch["masks"][:2]
        seen = hide_pixels(x, mask | upsample_mask(second, *mask.shape[1:]), fill_color(self.encoder))
        return reconstruction(self.encoder, x, mask, seen, self.predict(batch), "norm_pixels", self.unit)
