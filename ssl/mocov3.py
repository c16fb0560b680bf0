"""MoCo v3 (arXiv:2104.02057): two views, a momentum encoder, and InfoNCE over the global batch instead of a
queue.

With q_i from the student (encoder, projector, predictor) and k_i from the teacher (encoder, projector), the
loss is ctr(q1, k2) + ctr(q2, k1), where ctr is 2T times the cross-entropy of q's similarity to all keys over
T (algorithm 1).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.models.build import Backbone
from gcssl.models.functional import at_least_fp32
from gcssl.models.heads import mlp
from gcssl.ssl.base import Setup
from gcssl.ssl.ema import MomentumObjective
from gcssl.ssl.gather import gather_together, rank
from gcssl.ssl.views import check_above_zero, check_at_least, norm, pair_draw, signs


@dataclass
class MoCoV3Config:
    name: str = "mocov3"
    hidden_dim: int = 4096
    projector_layers: int = 3  # as published: 3 for transformers, 2 for ResNet-50; 2 learns faster in short runs
    predictor_layers: int = 2  # as published; 0: none, which aligns the views from the first step on in short runs
    out_dim: int = 256
    temperature: float = 0.2
    momentum: float = 0.99  # of the teacher at the start; rises to 1 along a cosine


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


class MoCoV3(MomentumObjective):
    """Student: encoder, projector, predictor. Teacher: momentum copies of encoder and projector."""

    couples_batch = True

    def __init__(self, cfg: MoCoV3Config, encoder: Backbone, setup: Setup) -> None:
        super().__init__(cfg, encoder, setup)
        check_at_least(cfg, hidden_dim=1, projector_layers=1, predictor_layers=0, out_dim=1)
        check_above_zero(cfg, "temperature")
        dim = encoder.num_features
        self.projector = mlp([dim, *[cfg.hidden_dim] * (cfg.projector_layers - 1), cfg.out_dim], norm)
        between = [cfg.hidden_dim] * (cfg.predictor_layers - 1)
        self.predictor = mlp([cfg.out_dim, *between, cfg.out_dim], norm) if cfg.predictor_layers else nn.Identity()
        self.make_teachers()
        self.draw = pair_draw(setup.augment)

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Loss from the student's pooled features B C of the two views."""
        seen, keys = self.teach(batch)  # B C, B d
        joined = gather_together([*seen, *keys])  # N C, N C, N d, N d
        keys = joined[2:]
        queries = [self.predictor(self.projector(h)) for h in features]  # B d
        first, t = rank() * len(queries[0]), self.cfg.temperature
        loss_1, right_1 = info_nce(queries[0], keys[1], first, t)
        loss_2, right_2 = info_nce(queries[1], keys[0], first, t)
        return {
            "loss": loss_1 + loss_2,
            "accuracy": (right_1 + right_2) / 2,
            **signs(joined[:2], keys),  # of the teacher
        }

    def chance(self, global_batch: int) -> dict[str, float]:
        """The loss of embeddings that say nothing, for the collapse watch."""
        return {"loss": 4.0 * self.cfg.temperature * math.log(global_batch)}
