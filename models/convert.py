"""Weights from files: ours, timm's and NVlabs' key layouts, and bias tables of any window size.

Nothing is unpickled but tensors, plain containers and argparse.Namespace (timm's trainer stores its options).
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from gcssl.errors import UserError, one_line
from gcssl.models.gcvit import GCViT
from gcssl.models.windows import query_levels, resize_table

TABLE = "attn.rel_pos.relative_position_bias_table"
FOLDER_FILES = ("backbone.safetensors", "model.safetensors")
State = dict[str, Tensor]

# conv-block parts, timm's name <- NVlabs' name
_UNIT = {"conv_dw": "conv.0", "se.fc1": "conv.2.fc.0", "se.fc2": "conv.2.fc.2", "conv_pw": "conv.3"}
_BLOCK = {"attn.rel_pos.relative_position_bias_table": "attn.relative_position_bias_table"}
_BLOCK |= {"ls1.gamma": "gamma1", "ls2.gamma": "gamma2"}


# ---- files


def read_file(path: Path) -> Any:
    """Tensors and plain containers of a .safetensors or torch file; UserError for what could run code."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a run folder, a checkpoint or an exported file")
    if path.suffix == ".onnx":
        raise UserError(f"{path}: ONNX cannot be read back; expected the run, or its export with format=timm or torch")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds; none of them is worth a traceback
        raise UserError(f"{path}: {refusal(error)}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A description beside weights; UserError for one that is damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); restore it or move it away") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a description of the weights beside it, got a {type(content).__name__}")
    return content


def refusal(error: Exception) -> str:
    """One line for a file that could not be read; names the pickled object that was refused, if any."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"cannot be read ({one_line(error)})"
    found = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class|operand)[:\s]+`?([A-Za-z_][\w.]*)", text)
    if found:
        name = next(g for g in found.groups() if g)
        kinds = "only tensors, plain containers and argparse.Namespace are read; save model.state_dict()"
        return f"refused: it pickles {name}; {kinds}"
    told = "no weights of torch, or cut short" if "Weights only load failed" in text else one_line(error)
    return f"not a readable checkpoint ({told}); expected .safetensors or torch weights"


def read_state(source: str | Path | Mapping[str, Any]) -> State:
    """The tensors of a file, an exported folder or a loaded checkpoint, without wrappers and prefixes."""
    where = "the given state dict" if isinstance(source, Mapping) else str(source)
    if isinstance(source, Mapping):
        found: Any = source
    else:
        path = Path(source)
        inside = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        found = read_file(inside[0] if inside else path)
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping) and found[key]:
            found = found[key]
            break
    state = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not state:
        raise UserError(f"{where}: holds no weights; expected tensors by name, bare or under state_dict")
    while prefix := next((p for p in ("module.", "_orig_mod.") if all(k.startswith(p) for k in state)), ""):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def saved_img_size(source: str | Path | Mapping[str, Any]) -> list[int] | None:
    """Image size [h, w] of the bias tables, where a description beside the weights states it."""
    if isinstance(source, Mapping):
        return None
    path = Path(source)
    beside = [path / "backbone.json", path / "config.json", path.with_suffix(".json")]
    for file in beside:
        if file.is_file():
            size = (read_json(file).get("model_args") or {}).get("img_size")
            return [size, size] if isinstance(size, int) else size
    return None


# ---- NVlabs' layout


def is_nvlabs(state: Mapping[str, Tensor]) -> bool:
    return any(k.startswith(("levels.", "patch_embed.conv_down.")) for k in state)


def from_nvlabs(state: Mapping[str, Tensor]) -> State:
    """NVlabs' names and shapes -> timm's. UserError for the layout of June 2022."""
    old = next((k for k in state if re.match(r"levels\.\d+\.to_q_global\.", k)), None)
    if old is not None:
        raise UserError(
            f"checkpoint key {old}: this is NVIDIA's first GC ViT layout (June 2022), trained with queries "
            "mixed between images; its weights do not work here: use a checkpoint released after August 2022"
        )
    out = {}
    for key, value in state.items():
        if not key.endswith(".relative_position_index"):
            name = _timm_name(key)
            out[name] = value[:, :, None, None] if ".se." in name and value.ndim == 2 else value
    return out


def _timm_name(key: str) -> str:
    unit = {nv: name for name, nv in _UNIT.items()}
    if key.startswith("patch_embed.proj."):
        return key.replace("patch_embed.proj", "stem.conv1")
    if m := re.fullmatch(r"patch_embed\.conv_down\.(.+)\.(\w+)", key):
        return f"stem.down.{_unit_name(m[1], unit)}.{m[2]}"
    if m := re.fullmatch(r"levels\.(\d+)\.downsample\.(.+)\.(\w+)", key):
        return f"stages.{int(m[1]) + 1}.downsample.{_unit_name(m[2], unit)}.{m[3]}"
    if m := re.fullmatch(r"levels\.(\d+)\.q_global_gen\.to_q_global\.(\d+)\.(.+)\.(\w+)", key):
        return f"stages.{m[1]}.global_block.blocks.conv{int(m[2]) + 1}.{unit.get(m[3], m[3])}.{m[4]}"
    if m := re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.(.+)", key):
        block = {nv: name for name, nv in _BLOCK.items()}
        return f"stages.{m[1]}.blocks.{m[2]}.{block.get(m[3], m[3])}"
    return re.sub(r"^head\.(\w+)$", r"head.fc.\1", re.sub(r"^norm\.(\w+)$", r"stages.3.norm.\1", key))


def _unit_name(name: str, unit: Mapping[str, str]) -> str:
    return f"conv_block.{unit[name]}" if name in unit else name


# ---- what a state dict is


def table_side(rows: int) -> int | None:
    """Side of the square window whose table has `rows` = (2w-1)^2 rows; None when there is none."""
    side = math.isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 else None


def describe(state: Mapping[str, Tensor], img_size: Sequence[int] | None = None) -> dict[str, Any] | None:
    """GCViT arguments that a state dict in timm's layout was built with; None when it is not a GC ViT.

    img_size and window_ratio come from the tables, of square windows; `img_size` says it for others.
    """
    try:
        depths = [1 + max(_ints(state, rf"stages\.{i}\.blocks\.(\d+)\.norm1\.weight")) for i in range(4)]
        tables = [state[f"stages.{i}.blocks.0.{TABLE}"] for i in range(4)]
        dim, in_chans = state["stem.conv1.weight"].shape[:2]
        hidden = state["stages.0.blocks.0.mlp.fc1.weight"].shape[0]
        pools = [max(_ints(state, rf"stages\.{i}\.global_block\.blocks\.conv(\d+)\.conv_pw")) for i in range(4)]
    except (KeyError, ValueError):
        return None
    sides = [s for t in tables if (s := table_side(t.shape[0])) is not None]  # of four when windows are square
    ratio = [32, 32, 16, 32]
    if img_size is None and len(sides) == 4:
        img_size = [sides[3] * 32] * 2
    if img_size is not None and len(sides) == 4 and img_size[0] == img_size[1]:
        ratio = [img_size[0] // s for s in sides]
    elif pools[0] > 1:
        ratio = [4 * 2 ** pools[0], *ratio[1:]]
    scale = state.get("stages.0.blocks.0.ls1.gamma")
    head = state.get("head.fc.weight")
    return {
        "embed_dim": dim, "depths": depths, "num_heads": [t.shape[1] for t in tables],
        "mlp_ratio": hidden / dim, "layer_scale": None if scale is None else 1e-5,
        "img_size": None if img_size is None else list(img_size), "window_ratio": ratio,
        "num_classes": 0 if head is None else head.shape[0], "in_chans": in_chans,
    }  # fmt: skip


def _ints(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    return [int(m[1]) for k in state if (m := re.match(pattern, k))]


# ---- loading


def load_weights(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    img_size: Sequence[int] | None = None,
    where: str | None = None,
) -> list[str]:
    """Loads weights into `model`; returns what was resized, left fresh or ignored, one line each.

    source: a file, an exported folder or a state dict in our (timm's) or NVlabs' layout. Bias tables of other
    windows are resized as the model's `bias_resize` says; img_size is that of the saved tables, needed where
    windows are not square; where: what messages call the source. UserError, the model untouched, when the
    weights are of another architecture.
    """
    where = where or ("state dict" if isinstance(source, Mapping) else str(source))
    state, notes = read_state(source), []
    if is_nvlabs(state):
        state, notes = from_nvlabs(state), ["NVlabs' key layout"]
    own = dict(model.state_dict())
    prefix = "" if isinstance(model, GCViT) else "model."
    if prefix and not any(k.startswith(prefix) for k in state):
        state = {prefix + k: v for k, v in state.items()}
    notes += _fit_head(model, state, own, prefix)
    if isinstance(model, GCViT):
        size = img_size or saved_img_size(source)
        _same_architecture(model, state, where, size)
        notes += _fit_tables(model, state, size, where)
    else:
        notes += _fit_positions(model, state, own, img_size)
    _same_names(model, state, own, where)
    model.load_state_dict(state)
    return notes


def _fit_head(model: nn.Module, state: State, own: State, prefix: str) -> list[str]:
    """Drops a head of another size, takes the model's own for a missing one; says which. Changes `state`."""
    if isinstance(model, GCViT):
        names = ["head.fc.weight", "head.fc.bias"]
    else:
        heads = getattr(model.model, "pretrained_cfg", {}).get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        names = [f"{prefix}{h}.{part}" for h in heads for part in ("weight", "bias")]
    if all((n in state) == (n in own) and (n not in own or state[n].shape == own[n].shape) for n in names):
        return []
    had, has = (f"{s[names[0]].shape[0]} classes" if names[0] in s else "no head" for s in (state, own))
    for name in names:
        state.pop(name, None)
        if name in own:
            state[name] = own[name]
    return [f"head: {had} in the file, {has} in the model; " + ("left fresh" if names[0] in own else "ignored")]


def _fit_tables(model: GCViT, state: State, size: Sequence[int] | None, where: str) -> list[str]:
    """Resizes bias tables that are of other windows than the model's. Changes `state`."""
    notes: dict[str, None] = {}
    mode = model.model_args["bias_resize"]
    for name, own in model.state_dict().items():
        if not name.endswith(TABLE):
            continue
        stage = int(name.split(".")[1])
        ratio, new = model.window_ratio[stage], model.windows[stage]
        rows = state[name].shape[0]
        side = table_side(rows) or 0
        windows = [(size[0] // ratio, size[1] // ratio)] if size else []
        old = next((w for w in (*windows, new, (side, side)) if (2 * w[0] - 1) * (2 * w[1] - 1) == rows), None)
        if old is None:
            raise UserError(f"{where}: bias tables of windows that are not square; state the image size they are for")
        state[name] = resize_table(state[name], old, new, mode).to(own.dtype).contiguous()
        if old != new:
            notes[f"bias tables of stage {stage + 1}: {old[0]}x{old[1]} -> {new[0]}x{new[1]} ({mode})"] = None
    return list(notes)


def _same_architecture(model: GCViT, state: State, where: str, size: Sequence[int] | None) -> None:
    found = describe(state, size)
    if found is None:
        first = ", ".join(list(state)[:3])
        raise UserError(f"{where}: not a GC ViT (its first keys: {first}); the model is {model.name}")
    args = model.model_args
    keys = ("embed_dim", "depths", "num_heads", "in_chans")
    differ = [f"{k} {found[k]} (the model has {args[k]})" for k in keys if found[k] != args[k]]
    hidden, own = (int(args["embed_dim"] * ratio + 1e-6) for ratio in (found["mlp_ratio"], args["mlp_ratio"]))
    if hidden != own:
        differ.append(f"mlp_ratio {found['mlp_ratio']} (the model has {args['mlp_ratio']})")
    if (found["layer_scale"] is None) != (args["layer_scale"] is None):
        has, lacks = ("the file", "the model") if args["layer_scale"] is None else ("the model", "the file")
        differ.append(f"layer scale in {has}, none in {lacks}")
    if differ:
        raise UserError(f"{where}: another architecture than {model.name}: {'; '.join(differ)}")
    pools = [max(1, n) for n in query_levels(model.window_ratio)]
    held = [max(_ints(state, rf"stages\.{i}\.global_block\.blocks\.conv(\d+)\.conv_pw")) for i in range(4)]
    if pools != held:
        fits = {"[3, 2, 1, 1]": "null", "[2, 1, 1, 1]": "[16,16,16,32]"}.get(str(held), "its own")
        raise UserError(
            f"{where}: query generators of {held} blocks, {pools} for window_ratio "
            f"{list(model.window_ratio)}: it was trained with another; set model.window_ratio={fits}"
        )


def _fit_positions(model: Any, state: State, own: State, size: Sequence[int] | None) -> list[str]:
    """Resizes a timm model's tables of another square image by timm's own rule for its class. Changes `state`."""
    other = [k for k in state if k in own and state[k].shape != own[k].shape]
    rule = getattr(sys.modules[type(model.model).__module__], "checkpoint_filter_fn", None)
    if not other or rule is None or (size is not None and size[0] != size[-1]):
        return []
    try:
        fitted = rule({k.removeprefix("model."): v for k, v in state.items()}, model.model)
    except Exception:  # a rule may choke on weights that are not of its class: _same_names says what does not fit
        return []
    fits = [k for k in other if (v := fitted.get(k.removeprefix("model."))) is not None and v.shape == own[k].shape]
    if not fits:
        return []
    first = f"{fits[0].removeprefix('model.')} {list(state[fits[0]].shape)} -> {list(own[fits[0]].shape)}"
    state |= {k: fitted[k.removeprefix("model.")].to(own[k].dtype).contiguous() for k in fits}
    return [f"{len(fits)} tables of another image size resized as timm does ({first})"]


def _same_names(model: nn.Module, state: State, own: State, where: str) -> None:
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [
        f"{k} {list(v.shape)} instead of {list(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    kinds = {"missing": missing, "unknown": extra, "of other shape": shapes}
    parts = [f"{len(names)} {what} ({names[0]})" for what, names in kinds.items() if names]
    if parts:
        name = getattr(model, "name", type(model).__name__)
        raise UserError(f"{where}: another architecture than {name}: weights {', '.join(parts)}")
