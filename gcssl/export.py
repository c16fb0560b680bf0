"""Backbones for others: python -m gcssl.export backbone=runs/a format=timm out=exported

timm: a folder with model.safetensors, config.json and README.md. timm.create_model("local-dir:<folder>",
pretrained=True) loads it; for the variants that timm's registry lacks, README.md has the two lines that build
timm's own class from config.json. torch: a .pt state dict with its description in a .json beside it. onnx: one file
that takes any number of images of the backbone's size, with the description in its metadata.
Each is written under a temporary name, read back, compared with the backbone, and only then given its name.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn

from gcssl.checkpoint import write_tensors
from gcssl.config import ModelConfig, load_config
from gcssl.errors import Failure, UserError, one_line
from gcssl.files import aside, replacing
from gcssl.log import say
from gcssl.models.build import Backbone, backbone_info
from gcssl.models.convert import load_weights
from gcssl.models.gcvit import GCViT
from gcssl.models.load import AskedModel, Saved, load_backbone, rebuild, recognise
from gcssl.models.timm_backbone import timm_cfg
from gcssl.runfolder import check_writable
from gcssl.runtime import entry

TOLERANCE = 2e-5  # largest difference of an output, relative to the outputs' scale
SUFFIXES = {"torch": (".pt", ".pth"), "onnx": (".onnx",)}
# timm's entry points set depths and num_heads themselves (and more) and take no others
TIMM_HAS = ("gcvit_xxtiny", "gcvit_xtiny", "gcvit_tiny", "gcvit_small", "gcvit_base")
ENTRY_ARGS = ("img_size", "window_ratio", "in_chans")  # num_classes stands beside them: transformers gives its own
CLASS_ARGS = (*ENTRY_ARGS, "embed_dim", "depths", "num_heads", "mlp_ratio", "layer_scale")


@dataclass
class ExportConfig:
    backbone: str = ""  # as in load_backbone: run folder, checkpoint, file, timm:<name>, random with model.name=
    format: str = "timm"  # of the result; onnx needs gcssl[onnx]
    out: str = ""  # a new folder (timm) or a new .pt or .onnx file
    encoder: str | None = None
    model: ModelConfig = field(default_factory=AskedModel)
    allow_env: bool = False


def export(cfg: ExportConfig) -> Path:
    """Writes the export and returns its path. UserError when something is there already or outputs differ."""
    if not cfg.backbone or not cfg.out:
        missing = "out=<what to write>" if cfg.backbone else "backbone=<run folder, checkpoint or file>"
        raise UserError(f"{missing.partition('=')[0]}: not given; expected {missing}")
    out = Path(cfg.out)
    if out.suffix not in SUFFIXES.get(cfg.format, (out.suffix,)):
        raise UserError(f"out={cfg.out}: expected a file name that ends in {SUFFIXES[cfg.format][0]}")
    if cfg.format == "timm" and out.suffix in (".safetensors", *sum(SUFFIXES.values(), ())):
        raise UserError(f"out={cfg.out}: format=timm writes a folder; expected a name without {out.suffix}")
    for path in (out, out.with_suffix(".json")) if cfg.format == "torch" else (out,):
        if path.exists():
            raise UserError(f"out={cfg.out}: {path} is already there; choose a new name or remove it")
    check_writable(cfg.out)
    backbone, info = load_backbone(cfg.backbone, cfg.model, cfg.encoder)
    backbone.eval()
    info = {key: value for key, value in info.items() if key not in ("source", "notes")}  # paths of this machine
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        difference = {"timm": export_timm, "torch": export_torch, "onnx": export_onnx}[cfg.format](backbone, info, out)
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_full(out.parent, backbone):
            raise
        raise Failure(f"out: {out} cannot be written ({one_line(error)}); make room on that disk") from None
    parameters = sum(p.numel() for p in backbone.parameters())
    say(f"{out}: {backbone.name}, {parameters:,} parameters; outputs read back differ by {difference:.1e}")
    return out


def timms(backbone: Backbone) -> nn.Module:
    """The model whose weights have timm's names: GC ViT itself, else the one that is wrapped."""
    return backbone if isinstance(backbone, GCViT) else backbone.model


def is_full(folder: Path, backbone: Backbone) -> bool:
    """Has the disk no room for the weights? safetensors, torch and onnx each tell it by an error of their own."""
    needed = sum(t.numel() * t.element_size() for t in backbone.state_dict().values())
    return shutil.disk_usage(folder).free < 1.1 * needed


# ---- timm


def export_timm(backbone: Backbone, info: dict[str, Any], out: Path) -> float:
    """The folder that timm loads; returns the largest relative difference of timm's outputs from ours."""
    config = timm_config(backbone, info)
    temporary = aside(out)
    temporary.mkdir()
    try:
        write_tensors(temporary / "model.safetensors", timms(backbone).state_dict())
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (temporary / "README.md").write_text(readme(config, out.name))
        difference = max(largest_difference(backbone, build(temporary)) for build in builders(config))
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def timm_config(backbone: Backbone, info: dict[str, Any]) -> dict[str, Any]:
    """config.json: timm's own keys, and ours under "gcssl"."""
    args = backbone.model_args
    if isinstance(backbone, GCViT):
        variant = recognise(args)
        native = variant in TIMM_HAS
        name = "gcvit_nano" if variant == "gcvit" else variant  # ours take any arguments of the class
        model_args = {k: args[k] for k in (ENTRY_ARGS if native else CLASS_ARGS)}
        size = (args["in_chans"], *backbone.img_size)
        cfg = timm_cfg(backbone.img_size, input_size=size, architecture=name).to_dict()
    else:
        name, model_args = backbone.name, dict(backbone.model._model_args)
        cfg = {**backbone.model.pretrained_cfg, "input_size": (args["in_chans"], *backbone.img_size)}
        for source in ("url", "file", "hf_hub_id", "source"):
            cfg.pop(source, None)
    for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
        cfg[key] = info[key]
    cfg["num_classes"] = backbone.num_classes
    config: dict[str, Any] = {"architecture": name, "num_classes": backbone.num_classes}
    config |= {"num_features": backbone.num_features, "pretrained_cfg": cfg, "model_args": model_args}
    if info.get("class_names") and len(info["class_names"]) == backbone.num_classes:
        config["label_names"] = info["class_names"]
    return {**config, "gcssl": {**info, **backbone_core(backbone)}}


def backbone_core(backbone: Backbone) -> dict[str, Any]:
    """The part of the description that the weights decide."""
    info = backbone_info(backbone)
    return {k: info[k] for k in ("name", "model_args", "img_size", "windows", "num_classes")}


def builders(config: dict[str, Any]) -> list[Callable[[Path], nn.Module]]:
    """The ways in which timm builds this export: its registry and, for our variants, its class."""

    def from_registry(folder: Path) -> nn.Module:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)

    def from_class(folder: Path) -> nn.Module:
        config = json.loads((folder / "config.json").read_text())
        model = GlobalContextVit(num_classes=config["num_classes"], **config["model_args"])
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        return model

    return [from_registry, from_class] if "embed_dim" in config["model_args"] else [from_registry]


def largest_difference(backbone: Backbone, other: nn.Module) -> float:
    """Largest relative difference of outputs and features of two images; UserError above TOLERANCE."""
    images = _images(backbone, 2)
    ours: Any = timms(backbone)
    theirs: Any = other.eval()
    with torch.no_grad():
        outputs = _difference(backbone, ours(images), theirs(images))
        return max(outputs, _difference(backbone, ours.forward_features(images), theirs.forward_features(images)))


def _images(backbone: Backbone, count: int) -> Tensor:
    size = (count, backbone.model_args["in_chans"], *backbone.img_size)
    return torch.rand(size, generator=torch.Generator().manual_seed(0))


def _difference(backbone: Backbone, a: Tensor, b: Tensor) -> float:
    difference = ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
    if not difference <= TOLERANCE:  # also when it is not a number
        raise UserError(f"{backbone.name}: outputs read back differ by {difference:.1e}; not written")
    return difference


def readme(config: dict[str, Any], name: str) -> str:
    """How to load the folder, and what it is."""
    info = config["gcssl"]
    lines = [f"# {info['name']}", ""]
    what = ", ".join(f"{k} {info[k]}" for k in ("objective", "step", "encoder") if info.get(k) is not None)
    lines += [f"Written by gcssl ({what or 'no training stated'})."]
    if "embed_dim" in config["model_args"]:
        lines += [
            "",
            "timm's registry lacks this variant; timm's class has it:",
            "",
            "```python",
            "import json",
        ]
        lines += ["import safetensors.torch", "from timm.models.gcvit import GlobalContextVit"]
        lines += [f'config = json.load(open("{name}/config.json"))']
        lines += ['model = GlobalContextVit(num_classes=config["num_classes"], **config["model_args"])']
        lines += [f'model.load_state_dict(safetensors.torch.load_file("{name}/model.safetensors"))', "```"]
        lines += ["", "After `import gcssl` its registry has it too:"]
    lines += ["", "```python", "import timm"]
    lines += [f'model = timm.create_model("local-dir:{name}", pretrained=True)', "```", ""]
    mean, std = (", ".join(f"{v:g}" for v in info[key]) for key in ("mean", "std"))
    lines += [f"`{name}` is this folder. Images: RGB in 0..1, normalised by mean {mean} and std {std}."]
    return "\n".join(lines) + "\n"


# ---- torch


def export_torch(backbone: Backbone, info: dict[str, Any], out: Path) -> float:
    """A state dict and its description; returns the largest relative difference of the outputs read back."""
    with replacing(out) as weights, replacing(out.with_suffix(".json")) as described:
        torch.save({k: v.detach().cpu() for k, v in timms(backbone).state_dict().items()}, weights)
        described.write_text(json.dumps({**info, **backbone_core(backbone)}, indent=1) + "\n")
        again = rebuild(Saved({}, backbone.name, json.loads(described.read_text())["model_args"], {}))
        load_weights(again, torch.load(weights, weights_only=True))
        return largest_difference(backbone, timms(again))


# ---- onnx


def export_onnx(backbone: Backbone, info: dict[str, Any], out: Path) -> float:
    """images B 3 H W -> output: logits, or pooled features B C; the largest relative difference of ONNX Runtime's."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"format=onnx: {error.name} is not installed; pip install 'gcssl[onnx]'") from None
    say("export: tracing the model for ONNX; a large one takes minutes")
    free = ({0: torch.export.Dim("batch")},)  # traced with two images, tried with three
    program = torch.onnx.export(
        backbone, (_images(backbone, 2),), dynamo=True, verbose=False, dynamic_shapes=free,
        input_names=["images"], output_names=["output"],
    )  # fmt: skip
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # where in this machine's files each came from
    description = {**info, **backbone_core(backbone)}
    program.model.metadata_props.update({key: json.dumps(value) for key, value in description.items()})
    images = _images(backbone, 3)
    with replacing(out) as temporary:
        program.save(temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        with torch.no_grad():
            ours = backbone(images)
        return _difference(backbone, ours, torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))


def main(argv: list[str]) -> None:
    export(load_config(ExportConfig, argv))


if __name__ == "__main__":
    entry(main)
