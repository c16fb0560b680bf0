"""Small real parts for the objectives' tests: a GC ViT of 16 channels and smooth random images of 64 px."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.config import AugmentConfig
from gcssl.models.gcvit import GCViT
from gcssl.models.hidden import upsample_mask
from gcssl.ssl.base import Setup
from gcssl.ssl.masking import draw_mask
from gcssl.ssl.objectives import OBJECTIVES

SIZE = (64, 64)
HEADS = {"hidden_dim": 32, "bottleneck_dim": 16, "out_dim": 16, "local_crops": 0}


def small_encoder(drop_path: float = 0.0) -> GCViT:
    return GCViT(
        embed_dim=16,
        depths=(2, 2, 2, 2),
        num_heads=(1, 1, 2, 2),
        img_size=SIZE,
        window_ratio=(16, 16, 16, 32),
        drop_path=drop_path,
    )


@pytest.fixture
def make_encoder() -> Callable[..., GCViT]:
    return small_encoder


@pytest.fixture
def make_objective() -> Callable[..., Any]:
    def make(
        name: str, encoder: nn.Module | None = None, total_steps: int = 100, size: tuple[int, int] = SIZE, **cfg: Any
    ) -> Any:
        torch.manual_seed(0)
        cls, schema = OBJECTIVES[name]
        part = OBJECTIVES[cfg.get("view", "mocov3")][1] if name == "joint" else schema
        known = {f.name for f in dataclasses.fields(part)}
        cfg = {key: value for key, value in HEADS.items() if key in known} | cfg
        return cls(schema(**cfg), encoder or small_encoder(), Setup(AugmentConfig(), size, total_steps, 10))

    return make


@pytest.fixture
def make_midway(make_objective: Callable[..., Any]) -> Callable[..., Any]:
    """make_objective's, as some way into a run: teachers unlike the student, centres unlike zero and each other."""

    def make(name: str, **cfg: Any) -> Any:
        objective = make_objective(name, **cfg)
        with torch.no_grad():
            for key, p in objective.named_parameters():
                if key.startswith(("teacher.", "momentum_")):
                    p.add_(0.05 * torch.randn_like(p))
            for key in getattr(objective, "centers", ()):
                getattr(objective, key).mean.normal_(0, 0.1)
        return objective

    return make


def smooth_images(n: int, seed: int = 0, size: tuple[int, int] = SIZE) -> Tensor:
    """n 3 *size: low-frequency noise of about unit variance."""
    g = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(n, 3, 5, 5, generator=g), size, mode="bicubic")


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Any]]:
    """batch(n, views): `views` images per sample, `small` of half the side; each of the former has a mask of
    `grid` units, ratio 0.6.
    """

    def make(n: int, views: int = 1, seed: int = 0, small: int = 0, grid: tuple[int, int] = (8, 8)) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        masks = [np.stack([draw_mask(rng, grid, 0.6) for _ in range(n)]) for _ in range(views)]
        crops = [smooth_images(n, seed + views + v)[..., ::2, ::2] for v in range(small)]
        return {
            "index": torch.arange(n),
            "views": [smooth_images(n, seed + v) for v in range(views)] + crops,
            "masks": [torch.from_numpy(mask) for mask in masks],
        }

    return make


@pytest.fixture
def scramble() -> Callable[..., dict[str, Any]]:
    """scramble(batch, hidden): the batch with loud noise in the units of its one view that `hidden` B h w names, by
    default those that its mask hides.
    """

    def noisy(batch: dict[str, Any], hidden: Tensor | None = None) -> dict[str, Any]:
        x, hidden = batch["views"][0], batch["masks"][0] if hidden is None else hidden
        where = upsample_mask(hidden, *x.shape[-2:])[:, None]  # B 1 H W
        return batch | {"views": [torch.where(where, 100 * torch.randn_like(x), x)]}

    return noisy


@pytest.fixture
def draw_batch() -> Callable[..., dict[str, Any]]:
    """batch(objective, n, size): one image per sample, and the masks that the objective draws."""

    def draw(objective: Any, n: int, size: tuple[int, int] = SIZE) -> dict[str, Any]:
        drawn = [objective.draw(np.random.default_rng(i), size)[1] for i in range(n)]
        masks = [torch.from_numpy(np.stack(same)) for same in zip(*drawn, strict=True)]
        return {"index": torch.arange(n), "views": [smooth_images(n, 0, size)], "masks": masks}

    return draw
