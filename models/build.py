"""Backbones by name, with fresh weights; load.py brings saved ones back."""

from collections.abc import Sequence
from typing import Any

import torch

from gcssl.config import ModelConfig
from gcssl.errors import UserError
from gcssl.models.gcvit import GCViT
from gcssl.models.timm_backbone import TimmBackbone, is_model, known_models, nearest_models, register_variants

Backbone = GCViT | TimmBackbone

_TINY: dict[str, Any] = {"embed_dim": 64, "num_heads": [2, 4, 8, 16], "mlp_ratio": 3.0, "layer_scale": None}
_WIDE: dict[str, Any] = {"mlp_ratio": 2.0, "layer_scale": 1e-5}

# name -> arguments of GCViT (arXiv:2206.09959 and NVIDIA's releases); timm's class knows the same names
BACKBONES: dict[str, dict[str, Any]] = {
    "gcvit_nano": {**_TINY, "embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]},
    "gcvit_xxtiny": {**_TINY, "depths": [2, 2, 6, 2]},
    "gcvit_xtiny": {**_TINY, "depths": [3, 4, 6, 5]},
    "gcvit_tiny": {**_TINY, "depths": [3, 4, 19, 5]},
    "gcvit_tiny2": {**_TINY, "depths": [3, 4, 29, 5]},
    "gcvit_small": {**_WIDE, "embed_dim": 96, "depths": [3, 4, 19, 5], "num_heads": [3, 6, 12, 24]},
    "gcvit_small2": {
        **_WIDE, "embed_dim": 96, "depths": [3, 4, 23, 5], "num_heads": [3, 6, 12, 24], "mlp_ratio": 3.0,
    },
    "gcvit_base": {**_WIDE, "embed_dim": 128, "depths": [3, 4, 19, 5], "num_heads": [4, 8, 16, 32]},
    "gcvit_large": {**_WIDE, "embed_dim": 192, "depths": [3, 4, 19, 5], "num_heads": [6, 12, 24, 48]},
}  # fmt: skip
for _name in list(BACKBONES)[1:]:  # the same weights with bias tables for larger images
    BACKBONES |= {f"{_name}_{size}": {**BACKBONES[_name], "img_size": size} for size in (384, 512)}


def register_with_timm() -> None:
    """Makes timm.create_model build the variants above that timm lacks (from timm's own class)."""
    register_variants(BACKBONES)


def build_backbone(
    name: str,
    img_size: int | Sequence[int] | None = None,
    num_classes: int = 0,
    drop_path: float = 0.0,
    window_ratio: Sequence[int] | None = None,
    bias_resize: str = "bicubic",
    in_chans: int = 3,
    grad_checkpointing: bool = False,
    **kw: Any,
) -> Backbone:
    """A backbone with fresh weights: one of BACKBONES, or any model of timm.

    img_size: side or (H, W) in pixels, where bias tables and position embeddings live; None: the variant's
    own (224). window_ratio and bias_resize concern GC ViT alone, and so does kw (other arguments of GCViT).
    """
    common: dict[str, Any] = {"num_classes": num_classes, "drop_path": drop_path, "in_chans": in_chans}
    common["grad_checkpointing"] = grad_checkpointing
    if name in BACKBONES:
        args = {**BACKBONES[name], **common, "bias_resize": bias_resize, **kw}
        if img_size is not None:
            args["img_size"] = img_size
        if window_ratio is not None:
            args["window_ratio"] = window_ratio
        backbone = GCViT(**args)
        backbone.name = name
        return backbone
    if not is_model(name):
        known = nearest_models(name, [*BACKBONES, *known_models()])
        raise UserError(f"model.name={name}: no such model here or in timm; nearest: {known}")
    if kw or window_ratio is not None:
        given = ", ".join([*kw, *(["window_ratio"] if window_ratio is not None else [])])
        raise UserError(f"model.name={name}: {given} concerns GC ViT alone; for a timm model set it to null")
    if bias_resize != "bicubic":
        raise UserError(f"model.bias_resize={bias_resize}: concerns GC ViT alone, not {name}; leave it out")
    return TimmBackbone(name, 224 if img_size is None else img_size, **common)


def from_config(model: ModelConfig) -> Backbone:
    """Fresh weights from the caller's random state."""
    return build_backbone(
        model.name, model.img_size, 0, model.drop_path, model.window_ratio, model.bias_resize or "bicubic",
        model.in_chans, model.grad_checkpointing,
    )  # fmt: skip


def from_config_on_meta(model: ModelConfig) -> Backbone:
    with torch.device("meta"):
        return from_config(model)


def backbone_info(backbone: Backbone, **extra: Any) -> dict[str, Any]:
    """What backbone.json says: how to rebuild the backbone, what it takes and gives, where it comes from."""
    info = {
        "name": backbone.name,
        "model_args": backbone.model_args,
        "img_size": list(backbone.img_size),
        "windows": [list(w) for w in backbone.windows] if isinstance(backbone, GCViT) else None,
        "stride": backbone.stride,
        "channels": list(backbone.channels),
        "num_features": backbone.num_features,
        "num_classes": backbone.num_classes,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "crop_pct": backbone.crop_pct,
        "crop_mode": "center",
        "interpolation": backbone.interpolation,
        "class_names": None,
        "trained_on": None,
        "step": None,
        "objective": None,
        "encoder": None,
    }
    return {**info, **extra}
