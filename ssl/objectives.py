"""The objectives by name: objective.name -> (class, config dataclass)."""

from gcssl.ssl.joint import Joint, JointConfig
from gcssl.ssl.mocov3 import MoCoV3, MoCoV3Config
from gcssl.ssl.simmim import SimMIM, SimMIMConfig

OBJECTIVES: dict[str, tuple[type, type]] = {
    "simmim": (SimMIM, SimMIMConfig),
    "mocov3": (MoCoV3, MoCoV3Config),
    "joint": (Joint, JointConfig),
}
