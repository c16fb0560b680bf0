"""MoCo v3 (arXiv:2104.02057): two views, a momentum encoder, and InfoNCE over the global batch instead of a
queue.

With q_i from the student (encoder, projector, predictor) and k_i from the teacher (encoder, projector), the
loss is ctr(q1, k2) + ctr(q2, k1), where ctr is 2T times the cross-entropy of q's similarity to all keys over
T (algorithm 1).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.augment import BYOL_1, BYOL_2, View, ViewSpec, draw_view, override
from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.models.heads import BatchNorm, at_least_fp32, mlp
from gcssl.ssl.ema import ema_update, momentum_at, momentum_copy
from gcssl.ssl.gather import all_gather_no_grad, rank, reducer


@dataclass
class MoCoV3Config:
    name: str = "mocov3"
    hidden_dim: int = 4096
    projector_layers: int = 3  # as published: 3 for transformers, 2 for ResNet-50; 2 learns faster in short runs
    predictor_layers: int = 2  # as published; 0: none, which aligns the views from the first step on in short runs
    out_dim: int = 256
    temperature: float = 0.2
    momentum: float = 0.99  # of the teacher at the start; rises to 1 along a cosine


@dataclass(frozen=True)
class PairDraw:
    """A sample's two crops: (rng, (H, W)) -> ([(spec, view), (spec, view)], [None, None])."""

    specs: tuple[ViewSpec, ViewSpec]  # their size is that of the call

    def __call__(
        self, rng: np.random.Generator, img_size: tuple[int, int]
    ) -> tuple[list[tuple[ViewSpec, View]], list[np.ndarray | None]]:
        specs = [replace(spec, size=img_size) for spec in self.specs]
        return [(spec, draw_view(rng, spec)) for spec in specs], [None, None]


def info_nce(q: Tensor, keys: Tensor, first: int, temperature: float) -> tuple[Tensor, Tensor]:
    """2T * cross-entropy of cosine similarities over T, and the share of queries nearest to their own key.

    q n d; keys N d of all processes, in sample order; query i's key is keys[first + i]. Computed in fp32.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, keys = F.normalize(at_least_fp32(q), dim=1), F.normalize(at_least_fp32(keys), dim=1)
        logits = q @ keys.T / temperature  # n N
        target = torch.arange(first, first + len(q), device=q.device)
        loss = 2.0 * temperature * F.cross_entropy(logits, target)
        return loss, (logits.detach().argmax(1) == target).float().mean()


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
        cov = z.T @ z  # d d
        return cov.trace().square() / cov.square().sum().clamp(min=1e-30)


def check_config(cfg: MoCoV3Config) -> None:
    """UserError for a value out of range."""
    for key in ("hidden_dim", "projector_layers", "out_dim"):
        if getattr(cfg, key) < 1:
            raise UserError(f"objective.{key}={getattr(cfg, key)} must be at least 1")
    if cfg.predictor_layers < 0:
        raise UserError(f"objective.predictor_layers={cfg.predictor_layers} must be at least 0; 2 is MoCo v3's")
    if not cfg.temperature > 0:
        raise UserError(f"objective.temperature={cfg.temperature} must be above 0; 0.2 is MoCo v3's")
    if not 0 <= cfg.momentum <= 1:
        raise UserError(f"objective.momentum={cfg.momentum} must lie in 0..1; 0.99 is MoCo v3's")


class MoCoV3(nn.Module):
    """Student: encoder, projector, predictor. Teacher: momentum copies of encoder and projector, always in
    eval mode.
    """

    default_encoder = "student"
    couples_batch = True
    n_views = 2

    def __init__(
        self,
        cfg: MoCoV3Config,
        encoder: nn.Module,
        augment: AugmentConfig,
        img_size: tuple[int, int],
        total_steps: int,
        steps_per_epoch: int,  # noqa: ARG002
    ) -> None:
        super().__init__()
        check_config(cfg)
        self.cfg, self.total_steps = cfg, total_steps
        dim: int = encoder.num_features  # type: ignore[assignment]
        self.encoder = encoder
        self.projector = mlp([dim, *[cfg.hidden_dim] * (cfg.projector_layers - 1), cfg.out_dim], _norm)
        between = [cfg.hidden_dim] * (cfg.predictor_layers - 1)
        self.predictor = mlp([cfg.out_dim, *between, cfg.out_dim], _norm) if cfg.predictor_layers else nn.Identity()
        self.teacher = momentum_copy(encoder)
        self.momentum_projector = momentum_copy(self.projector)
        specs = [override(replace(s, size=img_size), augment, i, 2) for i, s in enumerate((BYOL_1, BYOL_2))]
        self.draw = PairDraw((specs[0], specs[1]))

    def train(self, mode: bool = True) -> "MoCoV3":
        """Set the student's mode; the teacher stays in eval mode (drop path 0)."""
        super().train(mode)
        self.teacher.eval()
        self.momentum_projector.eval()
        return self

    def loss(self, features: list[Tensor], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Loss from the student's pooled features B C of the two views; the teacher sees both views whole."""
        with torch.no_grad():
            taught = [self.teacher(x) for x in batch["views"][:2]]  # B C
            taught = [all_gather_no_grad(torch.cat([h, self.momentum_projector(h)], 1)) for h in taught]  # N C + d
        seen, keys = zip(*(t.tensor_split([features[0].shape[1]], 1) for t in taught), strict=True)
        queries = [self.predictor(self.projector(h)) for h in features]  # B d
        first, t = rank() * len(queries[0]), self.cfg.temperature
        loss_1, right_1 = info_nce(queries[0], keys[1], first, t)
        loss_2, right_2 = info_nce(queries[1], keys[0], first, t)
        return {
            "loss": loss_1 + loss_2,
            "accuracy": (right_1 + right_2) / 2,
            "feature_std": (feature_std(seen[0]) + feature_std(seen[1])) / 2,  # of the teacher, over all processes
            "feature_rank": (feature_rank(keys[0]) + feature_rank(keys[1])) / 2,
        }

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:  # noqa: ARG002
        noise = batch.get("noise") or [None, None]
        return self.loss([self.encoder(x, n) for x, n in zip(batch["views"][:2], noise, strict=False)], batch)

    def momentum(self, step: int) -> float:
        """The teacher's momentum after optimizer step `step` (counted from 0).

        MoCo v3 moves the teacher at the start of step + 1, before encoding the keys: the same moment.
        """
        return momentum_at(step + 1, self.total_steps, self.cfg.momentum)

    def after_step(self, step: int) -> None:
        """Move the teacher after optimizer step `step`, the one that `forward` got."""
        m = self.momentum(step)
        ema_update(self.teacher, self.encoder, m)
        ema_update(self.momentum_projector, self.projector, m)


def _norm(dim: int, affine: bool) -> nn.Module:
    return BatchNorm(dim, reducer, affine)
