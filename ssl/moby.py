"""MoBY (arXiv:2105.04553): MoCo v2's queue of keys with BYOL's predictor and crops, made for Swin."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gcssl.models.build import Backbone
from gcssl.models.functional import at_least_fp32
from gcssl.models.heads import mlp
from gcssl.ssl.base import Setup
from gcssl.ssl.ema import MomentumObjective
from gcssl.ssl.gather import gather_together
from gcssl.ssl.views import check_above_zero, check_at_least, norm, pair_draw, signs


@dataclass
class MoBYConfig:
    name: str = "moby"
    hidden_dim: int = 4096
    out_dim: int = 256
    temperature: float = 0.2
    momentum: float = 0.99  # of the teacher at the start; rises to 1 along a cosine
    queue: int = 4096  # keys kept a view; any number, the newest ones


def queue_loss(q: Tensor, key: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's own key among the queue's, and the share of queries nearest to their own.

    q, key n d; queue K d of unit rows. Cosine similarities over the temperature, in fp32.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, key = F.normalize(at_least_fp32(q), dim=1), F.normalize(at_least_fp32(key), dim=1)
        logits = torch.cat([(q * key).sum(1, keepdim=True), q @ queue.to(q.dtype).T], 1) / temperature  # n 1+K
        own = torch.zeros(len(q), dtype=torch.long, device=q.device)
        return F.cross_entropy(logits, own), (logits.detach().argmax(1) == 0).float().mean()


class MoBY(MomentumObjective):
    """Student: encoder, projector, predictor. Teacher: momentum copies of encoder and projector. One queue a
    view.
    """

    couples_batch = True  # through the batch norms of its heads
    queue: Tensor
    _keys: Tensor  # 2 N d: of the last forward, for the queue

    def __init__(self, cfg: MoBYConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__(cfg, encoder, setup)
        check_at_least(cfg, hidden_dim=1, out_dim=1, queue=1)
        check_above_zero(cfg, "temperature")
        # Linear, batch norm, ReLU, Linear; no norm at the end
        self.projector = mlp([encoder.num_features, cfg.hidden_dim, cfg.out_dim], norm)[:-1]
        self.predictor = mlp([cfg.out_dim, cfg.hidden_dim, cfg.out_dim], norm)[:-1]
        self.make_teachers()
        self.register_buffer("queue", F.normalize(torch.randn(2, cfg.queue, cfg.out_dim), dim=-1))  # newest first
        self.draw = pair_draw(setup.augment)

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Loss from the student's pooled features B C of the two views."""
        seen, keys = self.teach(batch)  # B C, B d
        joined = gather_together([*seen, *keys])  # N C, N C, N d, N d
        self._keys = F.normalize(torch.stack([at_least_fp32(k) for k in joined[2:]]), dim=-1)
        queries = [self.predictor(self.projector(h)) for h in features]  # B d
        found = [queue_loss(queries[i], keys[1 - i], self.queue[1 - i], self.cfg.temperature) for i in (0, 1)]
        return {
            "loss": found[0][0] + found[1][0],
            "accuracy": (found[0][1] + found[1][1]) / 2,
            **signs(joined[:2], joined[2:]),
        }

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The step's keys of all processes enter the queue, the oldest leave it; then the teacher moves."""
        keys = self._keys.to(self.queue.dtype)
        self.queue.copy_(torch.cat([keys, self.queue], 1)[:, : self.queue.shape[1]])
        super().after_step(step)

    def chance(self, global_batch: int) -> dict[str, float]:
        """The loss of embeddings that say nothing, for the collapse watch."""
        return {"loss": 2.0 * math.log(1 + self.cfg.queue)}
