"""Config keys: which exist, what each may hold, and the one line that says so to who got it wrong."""

import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from gcssl.errors import UserError

# Strings of which only these are legal, wherever a schema has the key. A field of another schema may carry
# its own: field(default=..., metadata={"choices": (...)}).
CHOICES = {
    "encoder": ("student", "teacher"),
    "format": ("timm", "torch", "onnx"),
    "model.bias_resize": ("bicubic", "crop"),
    "augment.where": ("device", "worker"),
    "augment.colour": ("exact", "fast"),
    "augment.interpolation": ("bilinear", "bicubic"),
    "train.optimizer": ("adamw", "sgd", "lars", "lamb"),
    "train.lr_rule": ("linear", "sqrt", "none"),
    "train.on_collapse": ("warn", "stop"),
    "checkpoint.on_error": ("stop", "warn"),
    "train.precision": ("fp32", "bf16", "fp16"),
    "eval.backend": ("auto", "faiss", "torch"),
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),  # of the evaluations: augment.INTERPOLATIONS
    "finetune.augment": ("none", "light", "full"),
    "log.trackers": ("tensorboard",),
}

PLAIN_REFERENCE = re.compile(r"\$\{[\w.\[\]]+\}")  # of OmegaConf: to another key, through no resolver

MAY_BE_EMPTY = ("log.trackers",)
ABOVE_0, BELOW_1 = math.nextafter(0, 1), math.nextafter(1, 0)  # open ends of a range

# Numbers: the smallest and the largest legal value (None: no bound), and how many of them a list has (None: any).
RANGES: dict[str, tuple[float, float | None, int | None]] = {
    "model.drop_path": (0, 0.99, None),
    "model.in_chans": (3, 3, None),  # images are RGB
    "model.window_ratio": (1, None, 4),
    "data.workers": (0, None, None),
    "data.max_bad": (0, 1, None),
    "data.timeout": (1, None, None),
    "data.shapes_n": (1, None, None),
    "train.epochs": (1, None, None),
    "train.steps": (1, None, None),
    "train.batch_size": (1, None, None),
    "train.accumulate": (1, None, None),
    "train.global_batch": (1, None, None),
    "train.blr": (0, None, None),
    "train.min_lr": (0, None, None),
    "train.weight_decay": (0, None, None),
    "train.weight_decay_end": (0, None, None),
    "train.betas": (0, 0.999999, 2),
    "train.clip_grad": (0, None, None),
    "train.lr_base": (1, None, None),
    "train.max_hours": (0, None, None),
    "train.spike_sigma": (1, None, None),
    "train.max_bad_steps": (1, None, None),
    "train.warmup_epochs": (0, None, None),
    "eval.online_every": (0, None, None),
    "runtime.timeout": (1, None, None),
    "log.every": (1, None, None),
    "checkpoint.every": (ABOVE_0, None, None),
    "checkpoint.keep": (2, None, None),  # the newest one may be damaged
    "checkpoint.keep_every": (0, None, None),
    "plan.processes": (1, None, None),
    "plan.images_per_s": (ABOVE_0, None, None),
    "plan.minutes": (ABOVE_0, None, None),
    "plan.efficiency": (ABOVE_0, 1, None),
    "plan.price": (0, None, None),
    "doctor.scan": (0, None, None),
    "doctor.minutes": (0, None, None),
    "doctor.processes": (1, None, None),
    "crop_pct": (ABOVE_0, 1, None),
    "finetune.scale": (ABOVE_0, 1, 2),
    "finetune.color_jitter": (0, None, None),
    "finetune.reprob": (0, 1, None),
    "finetune.mixup": (0, None, None),
    "finetune.cutmix": (0, None, None),
    "finetune.smoothing": (0, BELOW_1, None),
    "finetune.ema_decay": (0, BELOW_1, None),
    "finetune.layer_decay": (ABOVE_0, 1, None),
    "batch_size": (1, None, None),  # of the evaluations
    "ks": (1, None, None),  # of kNN
    "temperature": (ABOVE_0, None, None),
    "epochs": (1, None, None),  # of the linear probe
    "head_batch": (1, None, None),
    "lrs": (ABOVE_0, None, None),
    "weight_decays": (0, None, None),
    "scale": (ABOVE_0, 1, 2),
}
SMALLER_FIRST = ("finetune.scale", "scale")  # pairs of a smallest and a largest value


def flatten(tree: dict[str, Any], prefix: str = "", stop: Collection[str] = ()) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; a key in `stop` keeps its dict as its value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and key not in stop:
            flat |= flatten(value, key + ".", stop)
        else:
            flat[key] = value
    return flat


def diff_configs(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """One line `key: old -> new` for each key that differs."""
    old, new = flatten(a), flatten(b)
    absent = "(absent)"
    keys = [key for key in {**old, **new} if key not in old or key not in new or old[key] != new[key]]
    return [f"{key}: {show(old.get(key, absent))} -> {show(new.get(key, absent))}" for key in keys]


def defaults_of(config: Any) -> Any:
    """A config of the same objective in which nothing was set."""
    fresh = type(config)()
    if hasattr(fresh, "objective"):
        fresh.objective = type(config.objective)()
    return fresh


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean x?` where a choice is near, nothing otherwise."""
    found = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {found[0]}?" if found else ""


@dataclass(frozen=True)
class Leaf:
    """What is known of one key: its annotation, default and choices."""

    kind: Any
    default: Any
    choices: tuple[str, ...]

    def expected(self) -> str:
        return "one of " + ", ".join(self.choices) if self.choices else _type_name(self.kind)


def leaves(config: Any, prefix: str = "") -> dict[str, Leaf]:
    """Every key that can be set, by its full name."""
    kinds = typing.get_type_hints(type(config))
    found: dict[str, Leaf] = {}
    for item in dataclasses.fields(config):
        key, value = prefix + item.name, getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, key + ".")
        else:
            choices = item.metadata.get("choices", CHOICES.get(key, ()))
            found[key] = Leaf(kinds[item.name], value, tuple(choices))
    return found


def meanings(config: Any, prefix: str = "") -> dict[str, str]:
    """What --help says of each key: the comment beside it in its dataclass, or in one of the `parts` of its class."""
    found: dict[str, str] = {}
    for schema in [base for one in (*getattr(config, "parts", ()), type(config)) for base in reversed(one.__mro__)]:
        with contextlib.suppress(OSError, TypeError):  # no source: object, or a class that was put together
            comments = re.findall(r"^    (\w+): .*  # (?!type:)(.+)$", inspect.getsource(schema), re.MULTILINE)
            found |= {prefix + name: comment for name, comment in comments}
    for item in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, item.name)):
            found |= meanings(value, f"{prefix}{item.name}.")
    return found


def arms(kind: Any) -> list[Any]:
    """int | None -> [int, NoneType]."""
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return list(typing.get_args(kind)) if union else [kind]


def _type_name(kind: Any) -> str:
    names = {
        bool: "true or false",
        float: "a number",
        int: "a whole number",
        str: "text",
        type(None): "null",
        Any: "a side or [height,width]",
    }
    told = []
    for arm in arms(kind):
        origin, inner = typing.get_origin(arm), typing.get_args(arm)
        if origin in (list, tuple):
            kinds = {float: "numbers, [0.2,1.0]", int: "whole numbers, [1,2]", str: "words, [a,b]"}
            told.append(f"a list of {kinds.get(inner[0], inner[0])}" if inner else "a list")
        elif origin is dict:
            told.append("keys with values")
        else:
            told.append(names.get(arm, getattr(arm, "__name__", str(arm))))
    return " or ".join(told)


def check_value(key: str, value: Any, known: dict[str, Leaf], allow_env: bool, where: str) -> None:
    """A key that exists, no reading of the environment, no value that OmegaConf would bend into shape."""
    if key not in known:
        raise UserError(f"{key}: {_unknown(key, value, known)}{where}")
    if not allow_env and "${" in PLAIN_REFERENCE.sub(" ", json.dumps(value, default=str)):
        raise UserError(
            f"{key}: {value} may read the environment, expected ${{another.key}} at most; put allow_env=true on the "
            f"command line to let it{where}"
        )
    legal = arms(known[key].kind)
    bent_to_text = isinstance(value, bool) and str in legal and bool not in legal
    bent_to_bool = bool in legal and isinstance(value, (int, float)) and not isinstance(value, bool)
    if bent_to_text or bent_to_bool:
        hint = " (yaml reads yes, no, on, off as true and false: quote them)" if bent_to_text else ""
        raise UserError(f"{key}: given {show(value)}, expected {known[key].expected()}{hint}{where}")


def _unknown(key: str, value: Any, known: dict[str, Leaf]) -> str:
    inside = [name for name in known if name.startswith(key + ".")]
    if inside:
        return f"given {show(value)}, expected keys inside it: {inside[0]}=... and the like"
    parent, _, last = key.rpartition(".")
    outer = next((name for name in known if key.startswith(name + ".")), None)
    if outer is not None:
        return f"no such key; {outer} is {known[outer].expected()} and holds no keys"
    if key.startswith("objective.") and not any(name.startswith("objective.") for name in known):
        return "no such key; objectives and their recipes, configs/pretrain, are of pretrain.py; others: configs/eval"
    siblings = {name[len(parent) + 1 if parent else 0 :].split(".")[0] for name in known if name.startswith(parent)}
    near = difflib.get_close_matches(last, sorted(siblings), n=1)
    if near:
        return f"no such key; did you mean {parent + '.' if parent else ''}{near[0]}?"
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    near = difflib.get_close_matches(key, same_name, n=1, cutoff=0) or difflib.get_close_matches(
        key, list(known), n=1, cutoff=0.8
    )
    if near:
        return f"no such key; did you mean {near[0]}?"
    recipe = "; each objective has a recipe of its own, configs/pretrain/<name>_*.yaml" if parent == "objective" else ""
    return f"no such key; {parent or 'the config'} has {', '.join(sorted(siblings)) or 'none'}{recipe}"


def check_limits(key: str, value: Any, leaf: Leaf) -> None:
    """What no type says: choices, numbers that are finite and in their range, an image size."""
    values = value if isinstance(value, list) else [value]
    bad = any(isinstance(number, float) and not math.isfinite(number) for number in values)
    expected = "a finite number" if bad else leaf.expected()
    if value is not None and leaf.choices:
        bad = bad or any(one not in leaf.choices for one in values)
    if key.endswith("img_size") and leaf.kind is Any and not (value is None and leaf.default is None):
        sides = [side for side in values if isinstance(side, int) and not isinstance(side, bool) and side > 0]
        bad = len(sides) != (2 if isinstance(value, list) else 1) or len(sides) != len(values)
        expected = "a side in pixels (64) or [height,width] ([64,96])"
    if not bad and value is not None and key in RANGES:
        low, high, length = RANGES[key]
        bad = any(v < low or (high is not None and v > high) for v in values)
        bad = bad or (length is not None and len(values) != length)
        expected = _range_name(low, high, length)
        if key in SMALLER_FIRST:
            bad, expected = bad or values != sorted(values), f"{expected}, the smaller first"
    if value == [] and key not in MAY_BE_EMPTY:
        bad, expected = True, f"a list of at least one value, {expected}"
    if bad:
        near = nearest(str(value), leaf.choices)
        raise UserError(f"{key}: given {show(value)}, expected {expected}{near}")


def _range_name(low: float, high: float | None, length: int | None) -> str:
    bounds = "above 0" if low == ABOVE_0 else f"at least {low:g}"
    if high == BELOW_1:
        bounds += " and below 1"
    elif high is not None and low == ABOVE_0:
        bounds += f" and at most {high:g}"
    elif high is not None:
        bounds = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return bounds if length is None else f"a list of {length} numbers, each {bounds}"


def show(value: Any) -> str:
    if isinstance(value, str):
        return value if value and value == value.strip() else repr(value)
    return json.dumps(value, default=str)
