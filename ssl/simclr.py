"""SimCLR (arXiv:2002.05709): two views of each image; each must find the other among all views of the global
batch.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.augment import SIMCLR
from gcssl.models.build import Backbone
from gcssl.models.functional import at_least_fp32
from gcssl.models.heads import BatchNorm, mlp
from gcssl.ssl.base import Setup
from gcssl.ssl.gather import all_gather_with_grad, gather_together, rank, reducer
from gcssl.ssl.views import ViewObjective, check_above_zero, check_at_least, pair_draw, signs


@dataclass
class SimCLRConfig:
    name: str = "simclr"
    hidden_dim: int = 2048
    projector_layers: int = 3  # of SimCLR v2 (arXiv:2006.10029) and the published code; version 1: 2
    out_dim: int = 128
    temperature: float = 0.1


def nt_xent(z: tuple[Tensor, Tensor], joined: tuple[Tensor, Tensor], first: int, t: float) -> tuple[Tensor, Tensor]:
    """NT-Xent (equation 1), and the share of views nearest to their partner.

    z: this process's two views, n d each; joined: those of all processes, N d each, in sample order, where
    view i of z is joined[first + i]. Each of the 2n anchors tells its partner from the 2N - 1 views that are
    not itself. As in the published code the loss is the anchors' mean of view 1 plus that of view 2: 2 ln(2N - 1)
    when all embeddings are one. Computed in fp32.
    """
    with torch.autocast(z[0].device.type, enabled=False):
        anchors, views = (F.normalize(at_least_fp32(torch.cat(pair)), dim=1) for pair in (z, joined))
        n, total = len(z[0]), len(joined[0])
        own = torch.arange(first, first + n, device=anchors.device)
        itself, partner = torch.cat([own, own + total]), torch.cat([own + total, own])
        logits = (anchors @ views.T / t).scatter(1, itself[:, None], float("-inf"))  # 2n 2N
        loss = 2.0 * F.cross_entropy(logits, partner)
        return loss, (logits.detach().argmax(1) == partner).float().mean()


class SimCLR(ViewObjective):
    """Encoder and projector; no teacher."""

    couples_batch = True

    def __init__(self, cfg: SimCLRConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        check_at_least(cfg, hidden_dim=1, projector_layers=1, out_dim=1)
        check_above_zero(cfg, "temperature")
        self.cfg = cfg
        dim = encoder.num_features
        self.encoder = encoder
        self.projector = mlp([dim, *[cfg.hidden_dim] * (cfg.projector_layers - 1), cfg.out_dim], _norm)
        self.draw = pair_draw(setup.augment, SIMCLR, SIMCLR)

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Loss from the pooled features B C of the two views."""
        z = self.projector(features[0]), self.projector(features[1])  # B d
        joined = all_gather_with_grad(z[0]), all_gather_with_grad(z[1])  # N d
        loss, accuracy = nt_xent(z, joined, rank() * len(z[0]), self.cfg.temperature)
        return {"loss": loss, "accuracy": accuracy, **signs(gather_together(features), joined)}

    def chance(self, global_batch: int) -> dict[str, float]:
        """The loss of embeddings that say nothing, for the collapse watch."""
        return {"loss": 2.0 * math.log(2 * global_batch - 1)}


def _norm(dim: int, affine: bool) -> nn.Module:
    """The published head's last batch norm has a scale and no shift."""
    return BatchNorm(dim, reducer, affine, scale=True)
