"""What the view objectives share: the crops and their features, the heads' norm, the signs of a collapse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.augment import BYOL_1, BYOL_2, View, ViewSpec, draw_view, override
from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.log import say
from gcssl.models.build import Backbone
from gcssl.models.functional import at_least_fp32
from gcssl.models.gcvit import GCViT
from gcssl.models.heads import BatchNorm
from gcssl.ssl.base import Objective
from gcssl.ssl.gather import reducer


@dataclass(frozen=True)
class CropDraw:
    """A sample's crops: (rng, (H, W)) -> ([(spec, view), ...], [None, ...])."""

    large: tuple[ViewSpec, ...]  # their size is that of the call
    small: tuple[ViewSpec, ...] = ()  # these keep their own

    def __call__(
        self, rng: np.random.Generator, img_size: tuple[int, int]
    ) -> tuple[list[tuple[ViewSpec, View]], list[np.ndarray | None]]:
        specs = [*(replace(spec, size=img_size) for spec in self.large), *self.small]
        return [(spec, draw_view(rng, spec)) for spec in specs], [None] * len(specs)


def pair_draw(augment: AugmentConfig, first: ViewSpec = BYOL_1, second: ViewSpec = BYOL_2) -> CropDraw:
    """The two crops `first` and `second` (BYOL's, arXiv:2006.07733, table 6) with what `augment` sets."""
    return CropDraw((override(first, augment, 0, 2), override(second, augment, 1, 2)))


def run_views(call: Callable[[Tensor, Tensor | None], Tensor], batch: dict[str, Any], views: range) -> list[Tensor]:
    """call(x, noise) -> B ... of these views of the batch: neighbours of one size in one batch, one output a view.

    noise: the views' drop path noise where the batch has it.
    """
    noise = batch.get("noise")
    out: list[Tensor] = []
    for _, same in groupby(views, key=lambda i: batch["views"][i].shape[-2:]):
        at = list(same)
        x = torch.cat([batch["views"][i] for i in at])
        out += call(x, torch.cat([noise[i] for i in at], 1) if noise else None).chunk(len(at))
    return out


def run_maps(encoder: Any, batch: dict[str, Any], views: range) -> list[Tensor]:
    """The last maps B C h w of these views of the batch."""
    return run_views(lambda x, noise: encoder.forward_features(x, noise=noise), batch, views)


class ViewObjective(Objective):
    """An objective on several crops of an image, with `loss` on their pooled features."""

    n_views: int = 2

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """What `forward` returns, from the student's pooled features B C of all views."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        return self.loss(run_views(self.encoder, batch, range(self.n_views)), batch, step)


def use_maps_alone(encoder: Any, objective: str) -> None:
    """Freeze, and say so, what of a timm model only its own pooling and head would use."""
    if not isinstance(encoder, GCViT) and (unused := encoder.freeze_unused()):
        say(f"{objective} uses the encoder's last map alone, so these stay as they are: {', '.join(unused)}")


def norm(dim: int, affine: bool) -> nn.Module:
    """A head's batch norm, over the samples of all processes."""
    return BatchNorm(dim, reducer, affine)


def check_at_least(cfg: Any, **least: float) -> None:
    """UserError for a value of the objective's config below its least one."""
    for key, low in least.items():
        if getattr(cfg, key) < low:
            raise UserError(f"objective.{key}={getattr(cfg, key)} must be at least {low}")


def check_above_zero(cfg: Any, *keys: str) -> None:
    for key in keys:
        if not getattr(cfg, key) > 0:
            raise UserError(f"objective.{key}={getattr(cfg, key)} must be above 0")


def check_share(cfg: Any, *keys: str) -> None:
    for key in keys:
        if not 0 <= getattr(cfg, key) <= 1:
            raise UserError(f"objective.{key}={getattr(cfg, key)} must lie in 0..1")


def check_takes(encoder: Any, height: int, width: int) -> None:
    """UserError unless the encoder takes images of that size."""
    like, mode = next(encoder.parameters()), encoder.training
    try:
        with torch.no_grad():
            encoder.eval()(like.new_zeros(1, encoder.model_args["in_chans"], height, width))
    finally:
        encoder.train(mode)


def check_small(encoder: Any, size: int) -> None:
    """UserError unless the encoder takes square crops of `size` pixels."""
    try:
        check_takes(encoder, size, size)
    except UserError as error:
        raise UserError(f"objective.local_size={size}: {error}") from None


# ---- signs of a collapse

LEAST_ROWS = 4


@torch.no_grad()
def feature_std(z: Tensor) -> Tensor:
    """Collapse monitor of N d: mean over dimensions of the std of l2-normalised rows, times sqrt(d).

    About 1 when the directions fill the sphere, 0 when all samples have the same one. Of use before a
    batch norm only: that one hides a collapse by stretching whatever is left to unit variance.
    """
    z = F.normalize(at_least_fp32(z), dim=1)
    return z.std(0, correction=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def feature_rank(z: Tensor) -> Tensor:
    """Directions that N d varies in: (sum of eigenvalues)^2 / sum of their squares, of its covariance."""
    with torch.autocast(z.device.type, enabled=False):
        z = at_least_fp32(z)
        z = z - z.mean(0)
        gram = z @ z.T if len(z) < z.shape[1] else z.T @ z  # of the same eigenvalues but for zeros: the smaller one
        return gram.trace().square() / gram.square().sum().clamp(min=1e-30)


def signs(features: Sequence[Tensor], embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
    """Both monitors, a mean over views: the spread of features (N C), the rank of embeddings (N d).

    Of all processes: gather first. Where a micro-batch leaves fewer than LEAST_ROWS, they would be low by themselves
    (one row has no spread, two have rank 1): nothing is returned.
    """
    if len(features[0]) < LEAST_ROWS:
        return {}
    return {
        "feature_std": torch.stack([feature_std(h) for h in features]).mean(),
        "feature_rank": torch.stack([feature_rank(z) for z in embeddings]).mean(),
    }


@dataclass
class MultiCropConfig:
    """What DINO, SimDINO, EsViT and iBOT share."""

    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    momentum: float = 0.996  # of the teacher at the start; rises to 1; nearer to 1 for small batches
    local_crops: int = 8  # small crops of each image; 0: none (augment.scale=[0.14,1] is published for that)
    local_size: int = 96  # their side in pixels
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.4])


def multi_crop_draw(cfg: MultiCropConfig, encoder: Backbone, augment: AugmentConfig) -> CropDraw:
    """DINO's crops: two large ones of BYOL's colours and scale 0.4 to 1, and `local_crops` small ones.

    `augment` overrides all of them, but for `scale`, which speaks of the large ones. A list of blur_p or
    solarize_p has one value each for the first large crop, the second, and the small ones.
    """
    check_at_least(cfg, hidden_dim=1, bottleneck_dim=1, local_crops=0, local_size=1)
    kinds = 3 if cfg.local_crops else 2
    large = [replace(spec, scale=(0.4, 1.0), interpolation="bicubic") for spec in (BYOL_1, BYOL_2)]
    first, second = (override(spec, augment, i, kinds) for i, spec in enumerate(large))
    if not cfg.local_crops:
        return CropDraw((first, second))
    check_small(encoder, cfg.local_size)
    if len(cfg.local_scale) != 2 or not 0 < cfg.local_scale[0] <= cfg.local_scale[1] <= 1:
        given = f"objective.local_scale={list(cfg.local_scale)}"
        raise UserError(f"{given}: expected the smallest and the largest share of the image's area, above 0 to 1")
    if cfg.local_size > min(encoder.img_size):
        sides = "x".join(map(str, encoder.img_size))
        raise UserError(
            f"objective.local_size={cfg.local_size}: the small crops, of large ones of {sides}; expected less"
        )
    size, crop = (cfg.local_size, cfg.local_size), replace(augment, scale=list(cfg.local_scale))
    small = override(replace(large[0], size=size, blur_p=0.5), crop, 2, kinds)
    return CropDraw((first, second), (small,) * cfg.local_crops)
