"""The objectives by name: objective.name -> (class, config dataclass).

Those of one kind stand in joint.py, which combines any of MASKED with any of VIEW.
"""

from typing import Any

from gcssl.config import PretrainConfig
from gcssl.models.build import Backbone
from gcssl.ssl.base import Objective, Setup
from gcssl.ssl.ibot import IBOT, IBOTConfig
from gcssl.ssl.joint import MASKED, VIEW, Joint, JointConfig

OBJECTIVES: dict[str, tuple[type, type]] = {
    **MASKED,  # simmim localmim ummae mae
    **VIEW,  # simclr mocov3 moby byol vicreg dino simdino esvit
    "ibot": (IBOT, IBOTConfig),
    "joint": (Joint, JointConfig),
}

SCHEMAS: dict[str, type] = {name: schema for name, (_, schema) in OBJECTIVES.items()}  # what load_config takes


def make_objective(cfg: PretrainConfig, backbone: Backbone, total_steps: int, steps_per_epoch: int) -> Objective:
    objective: type[Any] = OBJECTIVES[cfg.objective.name][0]
    return objective(cfg.objective, backbone, Setup(cfg.augment, backbone.img_size, total_steps, steps_per_epoch))
