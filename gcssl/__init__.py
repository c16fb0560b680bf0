"""Self-supervised pretraining of GC ViT. Importing it registers with timm the variants that timm lacks."""

from gcssl.models.build import register_with_timm

__version__ = "0.1.0"

register_with_timm()
