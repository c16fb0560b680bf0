"""BYOL (arXiv:2006.07733): a predictor on the student's embedding of one view finds the teacher's of the
other; nothing is contrasted.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gcssl.models.build import Backbone
from gcssl.models.functional import at_least_fp32
from gcssl.models.heads import mlp
from gcssl.ssl.base import Setup
from gcssl.ssl.ema import MomentumObjective
from gcssl.ssl.gather import gather_together
from gcssl.ssl.views import check_at_least, norm, pair_draw, signs


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
        super().__init__(cfg, encoder, setup)
        check_at_least(cfg, hidden_dim=1, out_dim=1)
        # Linear, batch norm, ReLU, Linear; no norm at the end (section 3.3)
        self.projector = mlp([encoder.num_features, cfg.hidden_dim, cfg.out_dim], norm)[:-1]
        self.predictor = mlp([cfg.out_dim, cfg.hidden_dim, cfg.out_dim], norm)[:-1]
        self.make_teachers()
        self.draw = pair_draw(setup.augment)

    def loss(self, features: list[Tensor], batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Loss from the student's pooled features B C of the two views."""
        seen, targets = self.teach(batch)  # B C, B d
        predictions = [self.predictor(self.projector(h)) for h in features]  # B d
        loss = regression_loss(predictions[0], targets[1]) + regression_loss(predictions[1], targets[0])
        joined = gather_together([*seen, *targets])  # N C, N C, N d, N d
        return {"loss": loss, **signs(joined[:2], joined[2:])}
