"""Tries the smallest model of each family of timm and writes docs/timm.md: what each can be pretrained with.

python -m scripts.timm_matrix [family ...]

With families only their rows are made anew. Every model is built at a small image size; then each objective does one
forward and backward pass on two images, as DistributedDataParallel asks it (every trainable parameter must get a
gradient, and none an immense one), and moves its teacher, if any. Those of many crops get two local ones of half the
size where the model takes these. A model that fails otherwise than by a UserError is left out, and the program ends
with its traceback.
"""

import dataclasses
import gc
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.runfolder import provenance
from gcssl.runtime import entry
from gcssl.ssl.base import Setup
from gcssl.ssl.masking import default_unit
from gcssl.ssl.objectives import OBJECTIVES
from scripts.timing import hardware

DOC = Path(__file__).resolve().parent.parent / "docs" / "timm.md"
SIZES = (64, 96, 128, 160, 192, 224, 256)  # tried in this order, then the model's own
COLUMNS = {  # title -> the objectives it speaks of; tried in this order, as those of maps freeze what they do not use
    "pooled views": ("simclr", "mocov3", "moby", "byol", "vicreg", "dino", "simdino"),
    "views on maps": ("esvit", "ibot"),
    "simmim": ("simmim",),
    "localmim": ("localmim",),
    "ummae": ("ummae",),
}
TRIED = tuple(objective for objectives in COLUMNS.values() for objective in objectives)
CROPS = "smaller crops"
MOST_NORM = 1e6  # of the gradient, which the small heads of TINY make large: more cannot be trained from
TINY = {  # keys of the objectives, for those that have them
    "hidden_dim": 16, "bottleneck_dim": 8, "out_dim": 8, "queue": 8, "decoder_dim": 64, "mask_prob": 1.0,
}  # fmt: skip
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
    """A model's line in the table, and why it cannot do what it cannot."""

    family: str
    model: str
    params: str  # millions
    size: str  # pixels of a side
    crops: str  # the same of smaller crops, or "no"
    refusals: dict[str, str]  # objective, or CROPS -> the line of the UserError

    def cells(self) -> list[str]:
        marks = [mark([o for o in objectives if o in self.refusals], objectives) for objectives in COLUMNS.values()]
        return [self.family, self.model, self.params, self.size, self.crops, *marks]


def mark(refused: Sequence[str], objectives: Sequence[str]) -> str:
    if not refused:
        return "yes"
    return "no" if len(refused) == len(objectives) else f"not {', '.join(refused)}"


def judge(family: str, name: str) -> Row:
    """One model's row. Nothing but UserError counts as a refusal."""
    torch.manual_seed(0)
    try:
        backbone, size = build_small(name)
    except UserError as error:
        return Row(family, name, "-", "-", "no", dict.fromkeys((CROPS, *TRIED), cell(error)))
    params = f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.1f}"
    small = size // 2 // backbone.stride * backbone.stride
    lines = {CROPS: refusal(lambda: check_pooled(backbone, small))}
    crops = {"local_crops": 0 if lines[CROPS] else 2, "local_size": small}
    for objective in TRIED:
        lines[objective] = refusal(lambda name=objective: try_objective(name, backbone, size, crops))
    refusals = {what: line for what, line in lines.items() if line}
    return Row(family, name, params, str(size), "no" if lines[CROPS] else str(small), refusals)


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


def try_objective(objective: str, backbone: Any, size: int, crops: dict[str, int]) -> None:
    """One step of two images, without an optimizer; RuntimeError where DistributedDataParallel would stop."""
    cls, schema = OBJECTIVES[objective]
    options = {**TINY, **crops, "mask_unit": math.gcd(size, default_unit((size, size)))}
    keys = {field.name for field in dataclasses.fields(schema)}
    cfg = schema(**{key: value for key, value in options.items() if key in keys})
    model = cls(cfg, backbone, Setup(AugmentConfig(), (size, size), 1, 1)).train()
    model.zero_grad()
    loss = model(random_batch(model.draw, size), 0)["loss"]
    loss.backward()
    left = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    if left or not loss.isfinite() or not norm < MOST_NORM:
        raise RuntimeError(f"{objective}: loss {loss.item()}, norm {norm}, parameters without a gradient: {left}")
    model.after_step(0)


def random_batch(draw: Callable[..., Any], size: int) -> dict[str, Any]:
    """Two images of noise, in the views and masks that an objective draws."""
    drawn = [draw(np.random.default_rng(i), (size, size)) for i in range(2)]
    views = [torch.randn(2, 3, *spec.size) for spec, _ in drawn[0][0]]
    masks: list[Tensor | None] = [
        None if two[0] is None else torch.from_numpy(np.stack(two))
        for two in zip(*(masks for _, masks in drawn), strict=True)
    ]
    return {"index": torch.arange(2), "views": views, "masks": masks}


def check_pooled(backbone: nn.Module, size: int) -> None:
    shape = tuple(backbone.train()(torch.randn(2, 3, size, size)).shape)
    if shape != (2, backbone.num_features):
        raise RuntimeError(f"pooled features are {shape}")


def refusal(work: Callable[[], None]) -> str:
    """The UserError's line; nothing where it works."""
    try:
        work()
    except UserError as error:
        return cell(error)
    return ""


def cell(error: UserError) -> str:
    return str(error).replace("|", "/")


# ---- the document

TITLES = ("family", "model", "parameters (M)", "image size", CROPS, *COLUMNS)
REASONS = ("model", "refuses", "in this line")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]


def reasons(row: Row) -> list[list[str]]:
    """Its lines of the second table: what is refused for one reason stands in one."""
    grouped: dict[str, list[str]] = {}
    for what, line in row.refusals.items():
        grouped.setdefault(line, []).append(what)
    return [[row.model, ", ".join(whats), line] for line, whats in grouped.items()]


def read_rows(text: str) -> dict[str, Row]:
    """model -> its row in the document."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = {
        x[1]: Row(x[0], x[1], x[2], x[3], x[4], {})
        for x in lines
        if len(x) == len(TITLES) and x[0] not in (TITLES[0], "---")
    }
    for name, whats, line in (x for x in lines if len(x) == len(REASONS) and x[0] in rows):
        rows[name].refusals |= dict.fromkeys(whats.split(", "), line)
    return rows


def document(rows: list[Row], command: str, commit: str | None, seconds: float) -> str:
    """docs/timm.md."""
    rows = sorted(rows, key=lambda r: (r.family, r.model))
    counts = [f"{title} {sum(row.cells()[i] != 'no' for row in rows)}" for i, title in enumerate(TITLES) if i > 3]
    lines = [
        "# Which models of timm can be pretrained",
        "",
        "Any model of timm can be the backbone (`model.name=`); this table says what the smallest models of each",
        "family were seen to do: one forward and backward pass of each objective, in which every trainable parameter",
        "gets a gradient, and the move of its teacher, if it has one. Why a model refuses something stands in the",
        "second table, in the line that a run stops with.",
        "",
        "- **image size**: the side in pixels that the model was built for here, the smallest tried that it takes.",
        "- **smaller crops**: the size of the smaller images that the same object also takes. dino, simdino, esvit and",
        "  ibot were tried with two such crops; where it says no, with `objective.local_crops=0`.",
        f"- **pooled views**: {', '.join(COLUMNS['pooled views'])}, which need pooled features alone.",
        f"- **views on maps**: {', '.join(COLUMNS['views on maps'])}, which read the last map.",
        "- **simmim**, **localmim**, **ummae**: pixels are hidden. localmim reads maps of two strides or more, ummae",
        "  gives the model images of half the size. `mae` takes GC ViT alone.",
        "",
        f"{len(rows)} models of {len({r.family for r in rows})} families. Of these take {', '.join(counts)}.",
        "",
        f"Made by `{command}` in {seconds / 60:.0f} minutes on {time.strftime('%Y-%m-%d')}, "
        f"commit {commit}, torch {torch.__version__}, timm {timm.__version__}, {hardware()}.",
        "",
        *table(TITLES, [row.cells() for row in rows]),
        "",
        "## Why not",
        "",
        *table(REASONS, [line for row in rows for line in reasons(row)]),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    if unknown := [word for word in argv if word not in FAMILIES]:
        raise UserError(f"{unknown[0]}: no such family; expected some of {', '.join(FAMILIES)}")
    started, rows = time.perf_counter(), read_rows(DOC.read_text()) if argv and DOC.exists() else {}
    command = " ".join(["python -m scripts.timm_matrix", *argv])
    commit = provenance()["commit"]  # before the document is another than the committed one
    failed = []
    for family in argv or FAMILIES:
        for name in FAMILIES[family].split():
            begun = time.perf_counter()
            try:
                row = rows[name] = judge(family, name)
                print(*row.cells(), f"{time.perf_counter() - begun:.1f} s", sep=" | ", flush=True)
            except Exception:  # a fault, not a refusal: the others are still worth their time
                traceback.print_exc()
                failed.append(name)
            gc.collect()
        # after each family, so that a run that is stopped leaves what it found
        DOC.write_text(document(list(rows.values()), command, commit, time.perf_counter() - started))
    if failed:
        raise RuntimeError(f"these failed, and {DOC.name} has no new rows of them: {', '.join(failed)}")


if __name__ == "__main__":
    entry(main)
