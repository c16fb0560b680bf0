"""BYOL (arXiv:2006.07733): a predictor on the student's embedding of one view finds the teacher's of the
other; nothing is contrasted.
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
from gcssl.ssl.ema import MomentumObjective, momentum_copy
from gcssl.ssl.gather import all_gather_no_grad
from gcssl.ssl.views import check_at_least, check_share, norm, pair_draw, run_views, signs


@dataclass
class BYOLConfig:
    name: str = "byol"
    hidden_dim: int = 4096
    out_dim: int = 256
    momentum: float = 0.99  # of the teacher at the start: 0.99 for 100 and 300 epochs, 0.996 for 1000; rises to 1


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over samples of |p - t|^2 of the l2-normalised rows of n d (equation 2): 2 - 2 cos. In fp32."""
    return 2.0 - 2.0 * F.cosine_similarity(at_least_fp32(prediction), at_least_fp32(target)).mean()


class BYOL(MomentumObjective):
    """Student: encoder, projector, predictor. Teacher: momentum copies of encoder and projector."""

    couples_batch = True  # through the batch norms of its heads

    def __init__(self, cfg: BYOLConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        check_at_least(cfg, hidden_dim=1, out_dim=1)
        check_share(cfg, "momentum")
        self.total_steps, self.start_momentum = setup.total_steps, cfg.momentum
        dim = encoder.num_features
        self.encoder = encoder
        # Linear, batch norm, ReLU, Linear; no norm at the end (section 3.3)
        self.projector = mlp([dim, cfg.hidden_dim, cfg.out_dim], norm)[:-1]
        self.predictor = mlp([cfg.out_dim, cfg.hidden_dim, cfg.out_dim], norm)[:-1]
        self.teacher = momentum_copy(encoder)
        self.momentum_projector = momentum_copy(self.projector)
        self.draw = pair_draw(setup.augment)

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Loss from the student's pooled features B C of the two views; the teacher sees both views whole."""
        with torch.no_grad():
            seen = run_views(self.teacher, batch, range(2))  # B C
            targets = [self.momentum_projector(h) for h in seen]  # B d
        predictions = [self.predictor(self.projector(h)) for h in features]  # B d
        loss = regression_loss(predictions[0], targets[1]) + regression_loss(predictions[1], targets[0])
        return {"loss": loss, **signs(*([all_gather_no_grad(x) for x in part] for part in (seen, targets)))}
