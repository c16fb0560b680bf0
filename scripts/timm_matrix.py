"""Tries the smallest model of each family of timm and writes docs/timm.md: what each can be pretrained with.

python -m scripts.timm_matrix [family ...]

With families only their rows are made anew. Every model is built at a small image size, then does one forward and
backward pass of a view objective (simclr) and of masked modelling (simmim), two images each, as
DistributedDataParallel asks it: every trainable parameter must get a gradient. Then it gets a smaller image.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.runfolder import environment
from gcssl.runtime import entry
from gcssl.ssl.masking import default_unit, draw_mask
from gcssl.ssl.objectives import OBJECTIVES
from scripts.timing import hardware

DOC = Path(__file__).resolve().parent.parent / "docs" / "timm.md"
SIZES = (64, 96, 128, 160, 192, 224, 256)  # tried in this order, then the model's own
START = {"ghostnetv2_100": 128, "ghostnetv3_050": 128}  # half of it must be legal too

# family -> its smallest models, one of each kind
FAMILIES = {
    "aimv2": "aimv2_large_patch14_224",
    "beit": "beit_base_patch16_224 beitv2_base_patch16_224 beit3_base_patch16_224",
    "botnet": "botnet26t_256",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto convnextv2_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240 crossvit_9_dagger_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s cspresnet50",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1 efficientformerv2_s0",
    "efficientnet": "efficientnet_lite0 efficientnetv2_rw_t",
    "efficientvim": "efficientvim_m1 efficientvim_m1_dist",
    "efficientvit": "efficientvit_b0 efficientvit_l1 efficientvit_m0",
    "eva": "eva02_tiny_patch14_224 vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "flexivit": "flexivit_small",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_nano gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "gernet": "gernet_s",
    "ghostnet": "ghostnet_050 ghostnetv2_100 ghostnetv3_050",
    "halonet": "halonet26t",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnet_tiny hgnetv2_b0",
    "hiera": "hiera_tiny_224 hieradet_small sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception": "inception_v3 inception_v4 inception_resnet_v2",
    "inception_next": "inception_next_atto",
    "lambda_resnet": "lambda_resnet26rpt_256",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s levit_256d levit_conv_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "coatnet_pico_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxvit_tiny_tf_224 "
    "maxxvit_rmlp_nano_rw_256",
    "metaformer": "caformer_s18 convformer_s18 poolformer_s12 poolformerv2_s12",
    "mixer": "mixer_s16_224 gmixer_12_224 gmlp_ti16_224 resmlp_12_224",
    "mnasnet": "mnasnet_small",
    "mobilenet": "mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035"
    " mobilenetv4_hybrid_medium_075 mobilenetv5_base",
    "mobileone": "mobileone_s1",
    "mobilevit": "mobilevit_xxs mobilevitv2_050",
    "mvitv2": "mvitv2_tiny mvitv2_small_cls",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0 nfnet_l0",
    "pit": "pit_ti_224 pit_ti_distilled_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002 regnety_002 regnetz_b16",
    "repghost": "repghostnet_050",
    "repvgg": "repvgg_a0",
    "repvit": "repvit_m0_9 repvit_m1",
    "res2net": "res2net50_14w_8s",
    "resnest": "resnest14d",
    "resnet": "resnet10t resnet18 resnetv2_18 legacy_seresnet18 eca_resnext26ts",
    "rexnet": "rexnet_100",
    "sam": "samvit_base_patch16_224",
    "selecsls": "selecsls42",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin": "swin_tiny_patch4_window7_224 swin_s3_tiny_224",
    "swinv2": "swinv2_tiny_window8_256",
    "swinv2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224 tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_pcpvt_small twins_svt_small",
    "vgg": "vgg11 vgg11_bn",
    "visformer": "visformer_tiny",
    "vit": "test_vit vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224"
    " vit_srelpos_small_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception xception41",
    "xcit": "xcit_nano_12_p16_224",
}


@dataclass
class Row:
    """A line of the table; the last three are "yes" (and for which size) or why not."""

    family: str
    model: str
    params: str  # millions
    size: str  # pixels of a side
    view: str
    masked: str
    smaller: str


def judge(family: str, name: str) -> Row:
    """One model's row. Nothing but UserError counts as a refusal."""
    torch.manual_seed(0)
    try:
        backbone, size = build_small(name)
    except UserError as error:
        return Row(family, name, "", "", *[cell(error)] * 3)
    params = f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.1f}"
    view = answer(lambda: try_objective("simclr", backbone, size, hidden_dim=16, out_dim=8))
    small = size // 2 // backbone.stride * backbone.stride
    smaller = answer(lambda: check_pooled(backbone, small))
    unit = math.gcd(size, default_unit((size, size)))
    # last: it freezes what it does not use
    masked = answer(lambda: try_objective("simmim", backbone, size, mask_unit=unit))
    smaller = f"yes ({small})" if smaller == "yes" else smaller
    return Row(family, name, params, str(size), view, masked, smaller)


def build_small(name: str) -> tuple[Any, int]:
    """The model at the first size of SIZES that it takes, else at its own, and that size."""
    config = timm.get_pretrained_cfg(name)
    own = config.input_size[-1] if config else 224
    stride = stride_of(name, own)
    step = math.lcm(stride, 16)  # masks have units of 8, 16 or 32 px
    least = max(2 * stride, START.get(name, 0))
    refusal = UserError(f"{name}: no size was tried")
    for size in dict.fromkeys([*(-(-max(s, least) // step) * step for s in SIZES), own]):
        try:
            return build_backbone(name, size), size
        except UserError as error:
            refusal = error
    raise refusal


def stride_of(name: str, own: int) -> int:
    """Pixels between two positions of the model's last map."""
    with torch.device("meta"):
        try:
            return build_backbone(name, own).stride
        except UserError:  # its own size is no multiple
            return build_backbone(name, 256).stride


def try_objective(objective: str, backbone: Any, size: int, **options: Any) -> None:
    """One forward and backward pass, two images; RuntimeError where DistributedDataParallel would stop."""
    cls, schema = OBJECTIVES[objective]
    model = cls(schema(**options), backbone, AugmentConfig(), (size, size), 1, 1).train()
    side = size // options.get("mask_unit", size)
    masks = torch.from_numpy(np.stack([draw_mask(np.random.default_rng(i), (side, side), 0.6) for i in range(2)]))
    views = [torch.randn(2, 3, size, size) for _ in range(2)]
    model.zero_grad()
    loss = model({"index": torch.arange(2), "views": views, "masks": [masks, masks]}, 0)["loss"]
    loss.backward()
    left = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if left or not loss.isfinite():
        raise RuntimeError(f"loss {loss.item()}, parameters without a gradient: {left}")


def check_pooled(backbone: nn.Module, size: int) -> None:
    shape = tuple(backbone.train()(torch.randn(2, 3, size, size)).shape)
    if shape != (2, backbone.num_features):
        raise RuntimeError(f"pooled features are {shape}")


def answer(work: Callable[[], None]) -> str:
    """ "yes", or the UserError's line."""
    try:
        work()
    except UserError as error:
        return cell(error)
    return "yes"


def cell(error: UserError) -> str:
    return str(error).replace("|", "/")


# ---- the document

TITLES = ("family", "model", "parameters (M)", "image size", "view objective", "masked modelling", "smaller crops")


def read_rows(text: str) -> dict[str, Row]:
    """model -> its row in the document."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {parts[1]: Row(*parts) for parts in lines if len(parts) == len(TITLES) and parts[0] != TITLES[0]}


def document(rows: list[Row], command: str, seconds: float) -> str:
    """docs/timm.md."""
    names = {"view": "a view objective", "masked": "masked modelling", "smaller": "smaller crops"}
    counts = [f"{sum(getattr(r, k).startswith('yes') for r in rows)} take {what}" for k, what in names.items()]
    lines = [
        "# Which models of timm can be pretrained",
        "",
        "Any model of timm can be the backbone (`model.name=`); this table says what the smallest models of each",
        "family were seen to do. Where one cannot do something, the cell holds the line that a run stops with.",
        "",
        "- **image size**: the side in pixels that the model was built for here, the smallest tried that it takes.",
        "- **view objective**: one training step of SimCLR; VICReg asks for the same. MoCo v3, BYOL, DINO and the like",
        "  also run a copy as the teacher, in eval mode but for its batch norms: not tried.",
        "- **masked modelling**: one training step of SimMIM, which hides pixels.",
        "- **smaller crops**: the same object also takes images of the size in brackets, as multi-crop needs.",
        "",
        f"{len(rows)} models of {len({r.family for r in rows})} families: {', '.join(counts)}.",
        "",
        f"Made by `{command}` in {seconds / 60:.0f} minutes on {time.strftime('%Y-%m-%d')}, "
        f"commit {environment()['commit']}, torch {torch.__version__}, timm {timm.__version__}, {hardware()}.",
        "",
        f"| {' | '.join(TITLES)} |",
        f"|{'---|' * len(TITLES)}",
        *(f"| {' | '.join(astuple(row))} |" for row in sorted(rows, key=lambda r: (r.family, r.model))),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    if unknown := [word for word in argv if word not in FAMILIES]:
        raise UserError(f"{unknown[0]}: no such family; expected some of {', '.join(FAMILIES)}")
    started, rows = time.perf_counter(), read_rows(DOC.read_text()) if argv and DOC.exists() else {}
    for family in argv or FAMILIES:
        for name in FAMILIES[family].split():
            begun = time.perf_counter()
            row = rows[name] = judge(family, name)
            print(*astuple(row), f"{time.perf_counter() - begun:.1f} s", sep=" | ", flush=True)
            gc.collect()
    command = " ".join(["python -m scripts.timm_matrix", *argv])
    DOC.write_text(document(list(rows.values()), command, time.perf_counter() - started))


if __name__ == "__main__":
    entry(main)
