"""Backbones back from what runs, exports, timm and NVlabs wrote."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch

from gcssl.checkpoint import load_checkpoint, read_backbone, read_checkpoint
from gcssl.config import ModelConfig, read_yaml
from gcssl.errors import UserError, one_line
from gcssl.log import say
from gcssl.models.build import BACKBONES, Backbone, backbone_info, build_backbone, from_config, from_config_on_meta
from gcssl.models.convert import State, describe, from_nvlabs, is_nvlabs, load_weights, read_json, read_state
from gcssl.models.gcvit import GCViT
from gcssl.models.timm_backbone import TimmBackbone, is_model, known_models, nearest_models
from gcssl.models.windows import query_levels

T = TypeVar("T")

FRESH = ("random", "none")  # backbones that no file holds
TIMM = "timm:"  # what stands before the name of weights that timm publishes
CLASS_KEYS = ("embed_dim", "depths", "num_heads", "mlp_ratio", "layer_scale")  # what tells two variants apart
FULL_CROP = ("gcvit_xxtiny", "gcvit_tiny", "gcvit_base", "gcvit_large")  # NVIDIA's releases judged without a border


@dataclass
class AskedModel(ModelConfig):
    """What is asked of a saved backbone: a key left empty asks for nothing."""

    name: str = ""
    img_size: Any = None
    bias_resize: str | None = None  # type: ignore[assignment]


def from_dict(schema: type[T], values: dict[str, Any]) -> T:
    """A config dataclass from a run's section; keys of other versions are left out."""
    known = {f.name for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    return schema(**{key: value for key, value in values.items() if key in known})


@dataclass
class Saved:
    """Weights as they were found: timm's key layout, and what is known of them."""

    state: State
    name: str | None  # None: not stated and not recognised
    args: dict[str, Any]  # of GCViT, or of TimmBackbone
    info: dict[str, Any]


def load_backbone(
    spec: str | os.PathLike[str], model: ModelConfig | None = None, encoder: str | None = None, exact: bool = False
) -> tuple[Backbone, dict[str, Any]]:
    """The backbone that `spec` names, and its description (backbone_info's keys).

    spec: a run folder (finished or not), one of its checkpoints, an exported folder or file, a timm or NVlabs
    checkpoint, "timm:<name>" (timm's published weights), "random" (untrained, seed 0 whatever the caller's
    random state) or "none" (untrained, from the caller's random state). For saved weights `model` is an
    AskedModel, None asking for nothing, and what it asks for must agree; drop_path and grad_checkpointing are
    always taken from it, and img_size when it is set (bias tables are then resized).
    exact: build what `model` says, img_size and window_ratio included, and load the weights into that, as a
    new run does.
    """
    if not spec or not isinstance(spec, str | os.PathLike):
        given = f"given {spec!r}" if spec else "not given"
        raise UserError(f"backbone: {given}; expected a run folder, a checkpoint, a file, random or none")
    spec = os.fspath(spec)
    if spec in FRESH:
        model = model or ModelConfig()
        if not model.name:
            raise UserError(f"backbone={spec}: of which model? pass model.name=<a GC ViT or a model of timm>")
        if spec == "none":
            backbone = from_config(model)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                backbone = from_config(model)
        return backbone, backbone_info(backbone, source=spec)
    if encoder not in (None, "student", "teacher"):
        raise UserError(f"encoder={encoder}: expected student or teacher")
    saved = read_timm(spec) if spec.startswith(TIMM) else read_saved(Path(spec), encoder)
    model = model or AskedModel()
    if exact:
        backbone = from_config(model)
    else:
        check_asked(spec, saved, model)
        backbone = rebuild(saved, model)
    notes = load_weights(backbone, saved.state, saved.args.get("img_size"), spec)
    check_query(spec, saved, backbone)
    if notes:
        say(f"{spec}: {'; '.join(notes)}")
    info = backbone_info(backbone)
    current = ("name", "model_args", "img_size", "windows", "num_classes", "channels", "num_features", "stride")
    info |= {k: v for k, v in saved.info.items() if k not in current and (v is not None or k not in info)}
    backbone.mean, backbone.std = tuple(info["mean"]), tuple(info["std"])
    return backbone, {**info, "source": spec, "notes": notes}


def check_exists(spec: str, key: str = "backbone") -> None:
    """UserError where `spec`, the value of `key`, is a path to nothing: said before anything large is opened."""
    if spec not in FRESH and not spec.startswith(TIMM) and not Path(spec).exists():
        fresh = {"backbone": ", or random, or none", "compare": ", or random"}.get(key, "")
        raise UserError(f"{key}={spec}: no such run, checkpoint or file; expected the path of one{fresh}")


def read_timm(spec: str) -> Saved:
    """timm's published weights by name, "timm:gcvit_xxtiny" or with its tag, from the Hub or its cache."""
    name = spec.removeprefix(TIMM)
    base = name.split(".")[0]
    if not is_model(base):
        raise UserError(f"{spec}: timm has no such model; nearest: {nearest_models(name, known_models())}")
    if timm.get_pretrained_cfg(name) is None or not timm.is_model_pretrained(name):
        raise UserError(f"{spec}: timm publishes no weights for it; pass a checkpoint file")
    try:
        theirs: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub, the network and the file system each raise their own
        raise UserError(
            f"{spec}: its weights cannot be had here ({one_line(error)}); "
            "without a network pass the path of a downloaded checkpoint"
        ) from None
    own: dict[str, Any] = theirs.pretrained_cfg
    built = build_backbone(base, own["input_size"][1:], theirs.num_classes)
    keys = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    info = backbone_info(built, **{key: own[key] for key in keys if key in own})
    return Saved(theirs.state_dict(), base, built.model_args, info)


def read_saved(path: Path, encoder: str | None) -> Saved:
    """Finds weights and description behind a path. UserError when there are none."""
    check_exists(str(path))
    config = path.with_name("config.json")
    if path.name == "model.safetensors" and config.is_file() and "gcssl" in read_json(config):
        path = path.parent  # the file inside of an export says less than its folder
    if path.is_file():
        return read_weights_file(path)
    if (path / "backbone.json").is_file():
        state, info = read_backbone(path)
        held = info.get("encoder")
        if encoder in (None, held):
            return saved_as_described(state, info, path / "backbone.json")
        if not (path / "checkpoints").is_dir():
            raise UserError(f"{path}: holds the {held} encoder, encoder={encoder} was asked for")
    if (path / "config.json").is_file():
        exported = read_json(path / "config.json").get("gcssl")
        if exported is None:
            return read_weights_file(path / "model.safetensors")
        return saved_as_described(read_state(path), exported, path / "config.json")
    return read_run(path, encoder)


def saved_as_described(state: State, info: Any, where: Path) -> Saved:
    if not isinstance(info, dict) or not info.get("name") or not isinstance(info.get("model_args"), dict):
        raise UserError(f"{where}: does not say which model the weights are of (name and model_args)")
    args = {**info["model_args"]}
    if isinstance(args.get("img_size"), int):
        args["img_size"] = [args["img_size"]] * 2
    return Saved(state, info["name"], args, info)


def read_weights_file(path: Path) -> Saved:
    """An exported torch file, with its json beside it, or a timm or NVlabs checkpoint."""
    beside = path.with_suffix(".json")
    state = read_state(path)
    described = read_json(beside) if beside.is_file() else {}
    if "model_args" in described:
        return saved_as_described(state, described, beside)
    nvlabs = is_nvlabs(state)
    state = from_nvlabs(state) if nvlabs else state
    args = describe(state)
    if args is None:
        return Saved(state, None, {}, {})
    name = recognise(args)
    info: dict[str, Any] = {"crop_pct": 0.875, "interpolation": "bicubic"}
    if args["img_size"] is None:  # windows that are not square tell neither size nor ratio
        args["img_size"] = [224, 224]
    else:
        info["model_args"] = args
    if nvlabs:
        large = min(args["img_size"]) >= 384
        info["crop_pct"] = 1.0 if large or name in FULL_CROP else 0.875
        info["crop_mode"] = "squash" if large else "center"
    return Saved(state, name, args, info)


def recognise(args: dict[str, Any]) -> str:
    """The variant with this width, depths, heads, MLP ratio and layer scale; "gcvit" when there is none."""
    return next((n for n, a in BACKBONES.items() if "img_size" not in a and _same_class(a, args)), "gcvit")


def _same_class(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(k in a and k in b and a[k] == b[k] for k in CLASS_KEYS)


def read_run(path: Path, encoder: str | None) -> Saved:
    """The encoder inside a run's checkpoint: the newest of a run folder, or the one given."""
    loaded = read_checkpoint(path) if (path / "manifest.json").is_file() else load_checkpoint(path)
    run = path if (path / "config.yaml").is_file() else path.parent.parent
    if loaded is None or not (run / "config.yaml").is_file():
        raise UserError(f"{path}: neither a run folder with a backbone or a checkpoint, nor an exported backbone")
    config = read_yaml(run / "config.yaml")
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{run / 'config.yaml'}: is no config of a run (no model section)")
    tensors = loaded.tensors["model"]
    if "objective" in config:
        which = encoder or config.get("encoder") or loaded.state.get("default_encoder", "student")
        prefix = "teacher." if which == "teacher" else "encoder."
    elif encoder is not None:
        raise UserError(f"{path}: a fine-tuned run has no {encoder} encoder; leave encoder out")
    else:  # fine-tuning judges, and writes as its backbone, the moving average of the weights
        which, prefix = "ema", "ema.module."
    if run == path and not (path / "backbone.json").is_file():
        say(f"{path}: the run has not ended; its newest checkpoint is taken, of step {loaded.step}")
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if not state:
        raise UserError(f"{path}: its checkpoint holds no {which} encoder")
    built = from_config_on_meta(from_dict(ModelConfig, config["model"]))
    objective = (config.get("objective") or {}).get("name")
    args = {**built.model_args, "num_classes": loaded.state.get("num_classes", 0)}
    info = backbone_info(built, step=loaded.step, objective=objective, encoder=which)
    info |= {key: loaded.state[key] for key in ("mean", "std", "class_names", "trained_on") if key in loaded.state}
    info |= {key: config[key] for key in ("crop_pct", "interpolation") if config.get(key)}  # that fine-tuning judges by
    return Saved(state, built.name, args, info)


def check_asked(spec: str, saved: Saved, model: ModelConfig) -> None:
    """UserError when `model` asks for another model than the saved one."""
    if saved.name is None and not model.name:
        raise UserError(f"{spec}: not a GC ViT, nor does it say what it is; pass model.name=<a model of timm>")
    same_class = model.name in ("", saved.name) or _same_class(BACKBONES.get(model.name, {}), saved.args)
    if saved.name is not None and not same_class:
        raise UserError(f"{spec} holds {saved.name}, model.name={model.name} was asked for; leave model.name out")
    ratio = saved.args.get("window_ratio")
    if model.window_ratio is not None and ratio is not None and list(model.window_ratio) != list(ratio):
        raise UserError(f"{spec} has window_ratio {list(ratio)}, {list(model.window_ratio)} was asked for")
    if model.in_chans not in (3, saved.args.get("in_chans", 3)):
        raise UserError(f"{spec} has in_chans {saved.args.get('in_chans', 3)}, {model.in_chans} was asked for")


def check_query(spec: str, saved: Saved, backbone: Backbone) -> None:
    """UserError where a query generator would pool otherwise, which its weights alone do not always tell."""
    ratio = saved.info.get("model_args", {}).get("window_ratio")
    if ratio and isinstance(backbone, GCViT) and query_levels(ratio) != query_levels(backbone.window_ratio):
        told = f"{spec} has window_ratio {list(ratio)}, {list(backbone.window_ratio)} pools its queries otherwise"
        raise UserError(f"{told}; set model.window_ratio to its own")


def rebuild(saved: Saved, model: ModelConfig | None = None) -> Backbone:
    """The saved backbone's architecture with fresh weights, at the size and resizing that `model` asks for."""
    model = model or AskedModel()
    if saved.name is None:  # weights of a timm model: only the config says which
        return from_config(model)
    args = {**saved.args, "drop_path": model.drop_path, "grad_checkpointing": model.grad_checkpointing}
    if model.img_size is not None:
        args["img_size"] = model.img_size
    if "embed_dim" in args and model.bias_resize is not None:
        args["bias_resize"] = model.bias_resize
    if "embed_dim" not in args:
        return TimmBackbone(saved.name, **args)
    backbone = GCViT(**args)
    backbone.name = saved.name
    return backbone
