"""SimMIM (arXiv:2111.09886): predict the normalised RGB of hidden pixels with a linear head, L1.

Two departures, both because GC ViT's overlapping stem and squeeze-excite leak: the hidden pixels are set to 0
before the stem, and the stem's tokens there are replaced by the mask token after it (SimMIM does only the
latter).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gcssl.augment import SIMMIM, View, ViewSpec, draw_view, override
from gcssl.config import AugmentConfig
from gcssl.models.decoders import PixelHead
from gcssl.models.gcvit import GCViT
from gcssl.models.heads import at_least_fp32
from gcssl.ssl.masking import check_ratio, check_unit, default_unit, draw_mask, hide_pixels, upsample_mask
from gcssl.ssl.views import use_maps_alone

N_PICTURES = 8


@dataclass
class SimMIMConfig:
    name: str = "simmim"
    mask_ratio: float = 0.6
    mask_unit: int | None = None  # pixels; None: 32 from 192 px up, 16 from 96, 8 below


@dataclass(frozen=True)
class MaskedDraw:
    """A sample's one crop and its mask: (rng, (H, W)) -> ([(spec, view)], [mask h w])."""

    spec: ViewSpec  # its size is that of the call
    unit: int
    ratio: float

    def __call__(
        self, rng: np.random.Generator, img_size: tuple[int, int]
    ) -> tuple[list[tuple[ViewSpec, View]], list[np.ndarray | None]]:
        spec = replace(self.spec, size=img_size)
        grid = (img_size[0] // self.unit, img_size[1] // self.unit)
        return [(spec, draw_view(rng, spec))], [draw_mask(rng, grid, self.ratio)]


def l1_hidden(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error over hidden pixels and channels: a mean per sample, then over samples.

    pred, target B 3 H W; mask B h w. Every sample hides the same count, so this is also SimMIM's mean over
    all hidden pixels of the batch, and the mean over N equal processes is the loss of one process on the
    joined batch.
    """
    hidden = upsample_mask(mask, *target.shape[-2:])  # B H W
    error = (at_least_fp32(pred) - at_least_fp32(target)).abs().mean(1)  # B H W
    error = torch.where(hidden, error, 0.0)
    return (error.sum((1, 2)) / hidden.sum((1, 2)).clamp(min=1)).mean()


class SimMIM(nn.Module):
    """Masked image modelling on any backbone; one that takes no mask token is masked in its pixels only."""

    default_encoder = "student"
    couples_batch = False

    def __init__(
        self,
        cfg: SimMIMConfig,
        encoder: nn.Module,
        augment: AugmentConfig,
        img_size: tuple[int, int],
        total_steps: int,  # noqa: ARG002
        steps_per_epoch: int,  # noqa: ARG002
    ) -> None:
        super().__init__()
        unit = cfg.mask_unit if cfg.mask_unit is not None else default_unit(img_size)
        check_unit(img_size, unit)
        check_ratio((img_size[0] // unit) * (img_size[1] // unit), cfg.mask_ratio)
        self.encoder: Any = encoder
        self.head = PixelHead(encoder.num_features, encoder.stride)  # type: ignore[arg-type]
        self.mask_token: nn.Parameter | None = None
        if isinstance(encoder, GCViT):
            self.mask_token = nn.Parameter(torch.empty(encoder.channels[0]))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        use_maps_alone(encoder, cfg.name)
        self.draw = MaskedDraw(override(replace(SIMMIM, size=img_size), augment), unit, cfg.mask_ratio)

    def features(self, batch: dict[str, Any]) -> Tensor:
        """The last map B C h w of the first view with its mask applied."""
        x, mask = batch["views"][0], batch["masks"][0]  # B 3 H W; B h w, True = hidden
        noise = batch["noise"][0] if batch.get("noise") else None
        return self.encoder.forward_features(hide_pixels(x, mask), mask, self.mask_token, noise)

    def loss(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss from the last map (B C h w) of the first view, whose own pixels are the target."""
        return {"loss": l1_hidden(self.head(features), batch["views"][0], batch["masks"][0])}

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:  # noqa: ARG002
        return self.loss(self.features(batch), batch)

    def after_step(self, step: int) -> None:
        """Nothing to commit."""

    @torch.no_grad()
    def pictures(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:  # noqa: ARG002
        """original, hidden (what the encoder sees), reconstructed (prediction in the hidden units): n 3 H W,
        0..1. The caller has put the module in eval mode.
        """
        few = {key: [part[:N_PICTURES] for part in batch[key][:1]] for key in ("views", "masks")}
        pred = at_least_fp32(self.head(self.features(few)))
        x, mask = few["views"][0], few["masks"][0]
        mean, std = (x.new_tensor(v).view(1, -1, 1, 1) for v in (self.encoder.mean, self.encoder.std))
        hidden = upsample_mask(mask, *x.shape[-2:]).unsqueeze(1)  # n 1 H W
        shown = {"original": x, "hidden": hide_pixels(x, mask), "reconstructed": torch.where(hidden, pred, x)}
        return {name: (image * std + mean).clamp(0.0, 1.0) for name, image in shown.items()}
