"""VICReg (arXiv:2105.04906): two views' embeddings agree, each dimension keeps its variance, and dimensions
are decorrelated.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gcssl.models.build import Backbone
from gcssl.models.functional import at_least_fp32
from gcssl.models.heads import mlp
from gcssl.ssl.base import Setup
from gcssl.ssl.gather import all_gather_with_grad, gather_together
from gcssl.ssl.views import ViewObjective, check_at_least, norm, pair_draw, signs


@dataclass
class VICRegConfig:
    name: str = "vicreg"
    hidden_dim: int = 8192
    out_dim: int = 8192
    invariance: float = 25.0  # the weights of the three terms (section 4.2)
    variance: float = 25.0
    covariance: float = 1.0


def variance_loss(z: Tensor) -> Tensor:
    """Mean over dimensions of max(0, 1 - sqrt(var + 1e-4)) of N d, the variance unbiased (equations 1 and 2)."""
    return F.relu(1.0 - torch.sqrt(z.var(0) + 1e-4)).mean()


def covariance_loss(z: Tensor) -> Tensor:
    """Sum over i != j of cov_ij^2, over d, of N d, the covariance unbiased (equations 3 and 4)."""
    z = z - z.mean(0)
    cov = z.T @ z / (len(z) - 1)  # d d
    return (cov.square().sum() - cov.diagonal().square().sum()) / z.shape[1]


class VICReg(ViewObjective):
    """Encoder and expander; no teacher."""

    couples_batch = True

    def __init__(self, cfg: VICRegConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        check_at_least(cfg, hidden_dim=1, out_dim=1, invariance=0, variance=0, covariance=0)
        self.cfg = cfg
        dim = encoder.num_features
        self.encoder = encoder
        self.projector = mlp([dim, cfg.hidden_dim, cfg.hidden_dim, cfg.out_dim], norm)[:-1]
        self.draw = pair_draw(setup.augment)

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Loss from the pooled features B C of the two views; its three terms are logged unweighted."""
        z = [all_gather_with_grad(at_least_fp32(self.projector(h))) for h in features]  # N d
        with torch.autocast(z[0].device.type, enabled=False):
            terms = {
                "invariance": F.mse_loss(z[0], z[1]),
                "variance": (variance_loss(z[0]) + variance_loss(z[1])) / 2,
                "covariance": covariance_loss(z[0]) + covariance_loss(z[1]),
            }
            loss = torch.stack([getattr(self.cfg, name) * term for name, term in terms.items()]).sum()
        logged = {f"loss/{name}": term.detach() for name, term in terms.items()}
        return {"loss": loss, **logged, **signs(gather_together(features), z)}

    def chance(self, global_batch: int) -> dict[str, float]:
        """The loss of embeddings that say nothing, for the collapse watch."""
        return {"loss/variance": 0.99}
