"""The objectives by name: objective.name -> (class, config dataclass)."""

from gcssl.ssl.byol import BYOL, BYOLConfig
from gcssl.ssl.dino import DINO, DINOConfig
from gcssl.ssl.esvit import EsViT, EsViTConfig
from gcssl.ssl.ibot import IBOT, IBOTConfig
from gcssl.ssl.joint import Joint, JointConfig
from gcssl.ssl.localmim import LocalMIM, LocalMIMConfig
from gcssl.ssl.mae import MAE, MAEConfig
from gcssl.ssl.moby import MoBY, MoBYConfig
from gcssl.ssl.mocov3 import MoCoV3, MoCoV3Config
from gcssl.ssl.simclr import SimCLR, SimCLRConfig
from gcssl.ssl.simdino import SimDINO, SimDINOConfig
from gcssl.ssl.simmim import SimMIM, SimMIMConfig
from gcssl.ssl.ummae import UMMAE, UMMAEConfig
from gcssl.ssl.vicreg import VICReg, VICRegConfig

OBJECTIVES: dict[str, tuple[type, type]] = {
    "simmim": (SimMIM, SimMIMConfig),
    "localmim": (LocalMIM, LocalMIMConfig),
    "mae": (MAE, MAEConfig),
    "ummae": (UMMAE, UMMAEConfig),
    "simclr": (SimCLR, SimCLRConfig),
    "mocov3": (MoCoV3, MoCoV3Config),
    "moby": (MoBY, MoBYConfig),
    "byol": (BYOL, BYOLConfig),
    "vicreg": (VICReg, VICRegConfig),
    "dino": (DINO, DINOConfig),
    "simdino": (SimDINO, SimDINOConfig),
    "esvit": (EsViT, EsViTConfig),
    "ibot": (IBOT, IBOTConfig),
    "joint": (Joint, JointConfig),
}
