"""Typed, closed configs: defaults <- yaml <- key=value, merged by OmegaConf, every mistake one line.

A config dataclass stands beside the code it sets; this file holds those that pretraining and the evaluations
share, and `load_config`; no other file touches OmegaConf.
"""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gcssl.errors import UserError
from gcssl.keys import RANGES, Leaf, arms, check_limits, check_value, flatten, leaves, meanings, nearest, show

T = TypeVar("T")
HELP = {"-h", "--help"}


@dataclass
class ModelConfig:
    name: str = "gcvit_nano"
    img_size: Any = 64  # side, or [height, width], in pixels
    drop_path: float = 0.0  # rate of the last block; rises linearly from 0
    window_ratio: list[int] | None = None  # a stage's window = side / ratio tokens; null: (32, 32, 16, 32)
    bias_resize: str = "bicubic"  # bicubic: same fraction of the window; crop: same token distance
    in_chans: int = 3
    grad_checkpointing: bool = False  # less memory, a third more time
    weights: str | None = None  # run folder, checkpoint or file to start a new run from


@dataclass
class DataConfig:
    path: str = "shapes"  # folder, files or name of a data set; shapes: generated images
    train_split: str | None = None  # null: found by its name
    val_split: str | None = None  # of the evaluations; null: found by its name
    image_column: str | None = None  # null: found by type and name
    label_column: str | None = None  # null: found by type and name; pretraining needs none
    val_labels: str | None = None  # label file of a flat ImageNet val/ folder
    workers: int = 4  # of each process
    max_bad: float = 0.01  # share of undecodable images above which training stops; kNN and probes leave them out
    timeout: int = 300  # seconds a loader worker may take for one batch
    cache_dir: str | None = None  # for what must be converted or unpacked; null: that of datasets
    shapes_n: int = 10_000  # training images of the generated set; its test split has a fifth of it


@dataclass
class AugmentConfig:
    """Overrides of the objective's published view parameters; null keeps them."""

    where: str = "device"  # colour, blur, solarise: on the device in batches, or on the worker
    colour: str = "exact"  # jitter as torchvision's; fast: by one matrix an image, clamped once
    scale: list[float] | None = None  # smallest and largest share of the image's area in a crop
    ratio: list[float] | None = None  # smallest and largest width / height of a crop
    flip_p: float | None = None  # chance of the mirror image
    jitter_p: float | None = None  # chance of a jitter of the colours
    jitter: list[float] | None = None  # brightness, contrast, saturation, hue
    gray_p: float | None = None  # chance of a grey image
    blur_p: list[float] | None = None  # chances, one a view
    blur_sigma: list[float] | None = None  # smallest and largest, in pixels
    solarize_p: list[float] | None = None  # chances, one a view
    interpolation: str | None = None


@dataclass
class TrainConfig:
    epochs: int = 100
    steps: int | None = None  # when set, wins over epochs
    batch_size: int = 128  # per process and micro-batch; the most where global_batch is set
    global_batch: int | None = None  # null: batch_size x processes x accumulate
    accumulate: int = 1  # micro-batches a step; derived when global_batch is set
    optimizer: str = "adamw"
    blr: float = 1.5e-4  # peak learning rate at lr_base images a step
    lr_rule: str = "linear"  # lr = blr x global batch / lr_base, x its root, or blr
    lr_base: int = 256
    min_lr: float = 0.0  # the schedule's end, not scaled by the batch
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.05
    weight_decay_end: float | None = None  # a cosine from weight_decay to it; null: constant
    warmup_epochs: float = 10.0
    clip_grad: float | None = None  # largest norm of the whole gradient; null or 0: none
    precision: str = "fp32"
    compile: bool = False  # by torch.compile; the doctor says what it gains
    shard: bool = False  # gradients and optimizer state over the processes (FSDP2)
    deterministic: bool = False  # only kernels that give the same bits each time
    max_hours: float | None = None  # of training, then a checkpoint and exit code 75
    on_collapse: str = "warn"  # stop: with exit code 78
    spike_sigma: float | None = 6.0  # skip losses so many deviations above the last 128 steps'; null: none
    max_bad_steps: int = 5  # skipped ones in a row that stop the run, with exit code 78
    seed: int = 0


@dataclass
class EvalConfig:
    online_every: int = 10  # epochs between online kNN probes; 0: never
    backend: str = "auto"  # of kNN; auto: what is right and faster on a slice


@dataclass
class RuntimeConfig:
    timeout: int = 600  # seconds a process waits for the others


@dataclass
class LogConfig:
    every: int = 10  # optimizer steps
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])


@dataclass
class CheckpointConfig:
    every: float = 1.0  # epochs; at least one optimizer step
    keep: int = 2  # newest checkpoints that are not pruned
    keep_every: int | None = None  # epochs whose checkpoints are never pruned
    on_error: str = "stop"  # where one cannot be written; warn: and train on


@dataclass
class PretrainConfig:
    out: str = ""  # run folder, made or gone on with
    encoder: str | None = None  # evaluated and exported; null: the one the objective's paper evaluates
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: Any = None  # the dataclass of objective.name
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    allow_env: bool = False  # let ${oc.env:...} read the environment


def load_config(schema: type[T], argv: list[str], objectives: dict[str, type] | None = None) -> T:
    """Defaults <- yaml files <- key=value, as a `schema`; every mistake is a UserError `<key>: <reason>`.

    argv: paths of yaml files first, then key=value; what comes later wins. objectives: name -> config
    dataclass, of which objective.name chooses the type of the `objective` key. `${oc.env:...}` is refused
    unless the command line itself (not a yaml) has allow_env=true. With --help among argv it prints the program's
    docstring and every key with its value in the yaml files, or its default, and its comment, and exits with 0.
    """
    paths, pairs = _split([argument for argument in argv if argument not in HELP])
    raw = [(str(path), read_yaml(path)) for path in paths]
    if HELP & set(argv) and objectives:  # shows the keys of one where none is named
        raw.insert(0, ("", {"objective": {"name": next(iter(objectives))}}))
    default = _with_objective(schema(), [layer for _, layer in raw] + [_nest(k, v) for k, v in pairs], objectives)
    known = leaves(default)
    if HELP & set(argv):
        values = {key: value for _, layer in raw for key, value in flatten(layer, stop=known).items()}
        sys.stdout.write(_help(known, values, meanings(default)))
        raise SystemExit(0)
    layers = raw + [("", _nest(key, _parse(key, text, known))) for key, text in pairs]
    layers = [(source, _at_home(layer)) for source, layer in layers]
    allow_env = any(layer.get("allow_env") is True for source, layer in layers if not source)
    merged = OmegaConf.structured(default)
    for source, layer in layers:
        if "allow_env" in layer and ("allow_env" not in known or source):
            layer = {key: value for key, value in layer.items() if key != "allow_env"}
        where = f" (in {source})" if source else ""
        for key, value in flatten(layer, stop=known).items():
            check_value(key, value, known, allow_env, where)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise _explain(error, layer, known, where) from None
    try:
        config = cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise _explain(error, {}, known, "") from None
    for key, value in flatten(config_dict(config), stop=known).items():
        check_limits(key, value, known[key])
    return config


def config_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of JSON values."""
    return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def to_yaml(content: dict[str, Any]) -> str:
    """The result of config_dict as yaml that load_config reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(content))


def read_yaml(path: Path | str) -> dict[str, Any]:
    """A yaml file as nested dicts, with `${...}` left as it stands."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (FileNotFoundError, IsADirectoryError):
        folder = Path(path).parent
        near = nearest(Path(path).name, [other.name for other in folder.glob("*.yaml")])
        raise UserError(f"{path}: no such config file; expected [file.yaml ...] key=value ...{near}") from None
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no valid yaml: {_yaml_problem(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values, got a {type(content).__name__}")
    return _expand({str(key): value for key, value in content.items()})


def _help(known: dict[str, Leaf], values: dict[str, Any], comments: dict[str, str]) -> str:
    lines = [
        f"  {key}={show(values.get(key, leaf.default))}  ({leaf.expected()})  {comments.get(key, '')}".rstrip()
        for key, leaf in known.items()
    ]
    return "\n".join([(sys.modules["__main__"].__doc__ or "").strip(), "", "[file.yaml ...] key=value ...", *lines, ""])


def _split(argv: list[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    paths: list[Path] = []
    pairs: list[tuple[str, str]] = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        is_path = not pairs and (not equals or (argument.endswith((".yaml", ".yml")) and Path(argument).exists()))
        if argument.startswith("-"):
            raise UserError(f"{key}: options are written without dashes: [file.yaml ...] key=value ...")
        if is_path and (argument.endswith((".yaml", ".yml")) or Path(argument).is_file()):
            paths.append(Path(argument))
        elif not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            own = Path(argument) / "config.yaml"
            near = f"; did you mean {own}, or backbone={argument}?" if own.is_file() else ""
            near = near or ("; yaml files come before all keys" if argument.endswith((".yaml", ".yml")) else "")
            near = near or ("; write key=value without spaces" if re.fullmatch(r"\w+\.\w+", argument) else "")
            near = near or ("; write a list without spaces: [1,2]" if argument.endswith("]") else "")
            raise UserError(f"{argument}: expected [file.yaml ...] key=value ..., for example train.epochs=10{near}")
        else:
            pairs.append((key, value))
    return paths, pairs


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def _expand(tree: dict[str, Any]) -> dict[str, Any]:
    """Let a yaml write `train.epochs: 3` for the nested form, as the command line does."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        inner = {str(k): v for k, v in value.items()} if isinstance(value, dict) else None
        nested = _nest(key, _expand(inner) if inner is not None else value)
        result = cast(dict[str, Any], _merge(result, nested))
    return result


def _merge(a: Any, b: Any) -> Any:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return b
    return {**a, **{key: _merge(a.get(key), value) for key, value in b.items()}}


def _at_home(tree: Any) -> Any:
    """The shell leaves ~/ alone after data.path=, and nobody names a file or a folder ~."""
    if isinstance(tree, dict):
        return {key: _at_home(value) for key, value in tree.items()}
    return str(Path(tree).expanduser()) if isinstance(tree, str) and tree.startswith("~/") else tree


def _with_objective(default: T, layers: list[dict[str, Any]], objectives: dict[str, type] | None) -> T:
    """The defaults, with the dataclass of the chosen objective in place."""
    if objectives is None or not hasattr(default, "objective"):
        return default
    given = [layer["objective"] for layer in layers if "objective" in layer]
    for section in given:
        if not isinstance(section, dict):
            raise UserError(f"objective: given {show(section)}, expected objective.name={section}")
    names = [section["name"] for section in given if "name" in section]
    choices = ", ".join(objectives)
    if names and names[-1] not in objectives:
        raise UserError(
            f"objective.name: given {show(names[-1])}, expected one of {choices}{nearest(str(names[-1]), objectives)}"
        )
    if names:
        default.objective = objectives[names[-1]]()
    elif default.objective is None:
        keys = ", ".join(sorted({str(key) for layer in layers for key in layer})[:5])
        among = f" among {keys}" if keys else ""
        raise UserError(
            f"objective.name: not given{among}, expected one of {choices}; or give a yaml of configs/pretrain"
        )
    return default


def _parse(key: str, text: str, known: dict[str, Leaf]) -> Any:
    """A command line value.

    Where text is wanted it is taken as written, so that out=007 and name=no stay what they are.
    """
    legal = arms(known[key].kind) if key in known else []
    quoted = text[:1] in ("'", '"')
    if str in legal and not quoted and not (text in ("null", "~") and type(None) in legal):
        return text
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{key}: given {text}, which is no valid yaml value: {_yaml_problem(error)}") from None
    return cast(dict[str, Any], parsed)["value"]


def _explain(error: OmegaConfBaseException, layer: dict[str, Any], known: dict[str, Leaf], where: str) -> UserError:
    """OmegaConf's error as one line.

    It names no key for a section that was given a value: then the layer tells.
    """
    full = str(error.full_key or next(iter(flatten(layer, stop=known)), "config"))
    key = re.sub(r"\[\d+\]", "", full)
    value = flatten(layer, stop=known).get(key)
    if key in known and key in flatten(layer, stop=known) and "${" not in str(value):
        expected, choices = known[key].expected(), known[key].choices
        default = known[key].default
        if isinstance(default, list) and not isinstance(value, list):
            alone = [value if not choices or value in choices else choices[0]]
            values = default if key in RANGES and RANGES[key][2] else alone  # of a set length
            expected = f"a list: {key}=[{','.join(map(str, values))}]"
        return UserError(f"{key}: given {show(value)}, expected {expected}{where}")
    return UserError(f"{key}: {_yaml_problem(error)}{where}")


def _yaml_problem(error: BaseException) -> str:
    """The first line of an OmegaConf error; the problem and its place of a yaml error."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"{getattr(error, 'problem', '')} in line {mark.line + 1}, column {mark.column + 1}"
    return str(error).strip().split("\n")[0]
