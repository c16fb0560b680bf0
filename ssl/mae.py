"""MAE (arXiv:2111.06377) in its exact form on GC ViT: the encoder sees, and computes, visible units only.

    loss = mean (prediction - norm_pixels)^2 over hidden units     (or that of another `target`: targets.py)

GC ViT cannot simply drop tokens before its stem: convolutions, squeeze-excite and the global query all join units.
Here hidden units take no part in any of them (the masked semantics of SparK, arXiv:2301.03580), so nothing of a
mask token, fill colour or hole is learnt, and none of them is computed (models/visible.py): at ratio 0.75 and 224
px the encoder keeps about a third of SimMIM's activations. Its step is 3 times as fast on a CPU, and on an H200, which
waits for kernels to be started, 0.76 to 0.90 times (docs/results/bench-intel-xeon-2-cores.md, docs/results/gpu_h200).
`dense` runs every layer on the whole map instead, with equal results: the reference. Departures: a unit is a token
of the last stage, 32 px (ViT's: 16 px), and positions enter through the decoder and the bias tables alone.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gcssl.augment import MAE as CROP
from gcssl.augment import override
from gcssl.errors import UserError
from gcssl.models.build import Backbone
from gcssl.models.decoders import TokenDecoder
from gcssl.models.gcvit import GCViT
from gcssl.models.hidden import upsample_mask
from gcssl.ssl.base import Objective, Setup
from gcssl.ssl.masking import MaskedDraw, check_ratio, check_unit, hidden_count, hide_pixels
from gcssl.ssl.targets import HOG_CELL, TARGETS, check_target, head_shape, reconstruction, target_loss


@dataclass
class MAEConfig:
    name: str = "mae"
    mask_ratio: float = 0.75
    mask_unit: int = 32  # pixels
    target: str = field(default="norm_pixels", metadata={"choices": TARGETS})
    decoder_dim: int = 512
    decoder_depth: int = 8
    dense: bool = False  # compute hidden units too: the slow reference


class MAE(Objective):
    """Masked autoencoder on GC ViT."""

    n_pictures = 8

    def __init__(self, cfg: MAEConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        height, width = size = setup.img_size
        if not isinstance(encoder, GCViT):
            raise UserError(f"objective.name=mae: needs GC ViT, which can leave tokens out; given {encoder.name}")
        unit = cfg.mask_unit
        whole = max(encoder.stride, *encoder.window_ratio)
        if unit % whole:
            raise UserError(f"objective.mask_unit={unit}: mae hides whole tokens and queries, so multiples of {whole}")
        check_unit(size, unit)
        n_units = (height // unit) * (width // unit)
        check_ratio(n_units, cfg.mask_ratio)
        self.dense, self.n_visible = cfg.dense, n_units - hidden_count(n_units, cfg.mask_ratio)
        self.encoder: Any = encoder
        self.target, self.cell = cfg.target, HOG_CELL if cfg.target == "hog" else unit
        check_target(cfg.target, unit, stride := encoder.stride)
        upscale, channels = head_shape(cfg.target, stride, self.cell)
        grid = (height // stride, width // stride)
        self.decoder = TokenDecoder(
            encoder.num_features, grid, upscale, 1, cfg.decoder_dim, cfg.decoder_depth, channels
        )
        self.draw = MaskedDraw(override(CROP, setup.augment), unit, cfg.mask_ratio)

    def predict(self, batch: dict[str, Any]) -> Tensor:
        """The target, pixels B 3 H W or hog B 27 H/8 W/8, of the first view from its visible units."""
        x, mask = batch["views"][0], batch["masks"][0]  # B 3 H W; B h w, True = hidden
        noise = batch.get("noise", [None])[0]
        features = self.encoder.forward_visible(x, mask, noise, self.dense, self.n_visible)  # B C H/32 W/32
        return self.decoder(features, upsample_mask(mask, *features.shape[2:]))

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        x, mask = batch["views"][0], batch["masks"][0]
        return target_loss(self.target, self.predict(batch), x, mask, self.cell)

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """What `reconstruction` makes of them."""
        x, mask = batch["views"][0], batch["masks"][0]
        seen = hide_pixels(x, mask)
        return reconstruction(self.encoder, x, mask, seen, self.predict(batch), self.target, self.cell)
