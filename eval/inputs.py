"""What every frozen evaluation reads and writes: backbone, data with its test split, result file."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from gcssl.config import DataConfig, ModelConfig, RuntimeConfig, TrainConfig, config_dict, load_config, read_yaml
from gcssl.data import held_out, open_data
from gcssl.errors import Failure, UserError
from gcssl.eval.features import PRECISIONS, Crop, Features, ForwardOptions, extract, frozen
from gcssl.eval.results import check_result, comparison, packed, result_table, settings_of, write_result
from gcssl.log import say
from gcssl.models.build import Backbone
from gcssl.models.load import FRESH, AskedModel, check_exists, from_dict, load_backbone
from gcssl.runfolder import check_writable
from gcssl.runtime import main_process_first, make_accelerator
from gcssl.sources import Files

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gcssl.augment import ViewSpec
    from gcssl.data import Images

T = TypeVar("T")
FEW = 100  # test images below which it is said how coarse a result is


@dataclass
class AskedData(DataConfig):
    """What is asked of the data: a key left empty (not null: a run may have another) asks for nothing, so that of the
    run counts, else DataConfig's."""

    path: str = ""
    train_split: str | None = ""
    val_split: str | None = ""
    image_column: str | None = ""
    label_column: str | None = ""
    val_labels: str | None = ""
    cache_dir: str | None = ""
    workers: int | None = None  # type: ignore[assignment]
    max_bad: float | None = None  # type: ignore[assignment]
    timeout: int | None = None  # type: ignore[assignment]
    shapes_n: int | None = None  # type: ignore[assignment]


@dataclass
class InputConfig:
    """Keys that every frozen evaluation shares. Empty model and data keys are those of the run evaluated."""

    backbone: str = ""  # run folder, checkpoint, exported file, timm or NVlabs checkpoint, random or none
    compare: str | None = None  # a second backbone for the same evaluation in the same process
    encoder: str | None = None  # null: the one the objective's paper evaluates
    name: str | None = None  # results go to eval/<name>/
    out: str = ""  # result folder, needed where backbone is no run folder
    model: AskedModel = field(default_factory=AskedModel)
    data: DataConfig = field(default_factory=AskedData)
    crop_pct: float | None = None  # side of the centre crop / side of the resized image; null: the backbone's
    interpolation: str | None = None  # null: the backbone's
    precision: str = field(default="fp32", metadata={"choices": PRECISIONS})
    batch_size: int = 256  # images a process and forward pass
    seed: int = 0
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    allow_env: bool = False


@dataclass
class Inputs:
    """One backbone and the two splits it is judged on."""

    cfg: Any  # an InputConfig
    spec: str
    backbone: Backbone
    info: dict[str, Any]
    train: "Images"
    test: "Images"
    test_name: str
    n_classes: int
    accelerator: "Accelerator"

    @property
    def crop(self) -> Crop:
        """The evaluation crop: what was asked for, else the backbone's own."""
        cfg, info = self.cfg, self.info
        squash = info.get("crop_mode") == "squash" and cfg.crop_pct is None
        pct = float(info["crop_pct"] if cfg.crop_pct is None else cfg.crop_pct)
        return Crop(self.backbone.img_size, pct, cfg.interpolation or info["interpolation"], squash)

    @property
    def options(self) -> ForwardOptions:
        cfg = self.cfg
        return ForwardOptions(cfg.batch_size, cfg.data.workers, cfg.precision, cfg.data.timeout)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The features that this backbone has."""
        blank = torch.zeros(1, 3, *self.crop.size, device=self.accelerator.device)
        with frozen(self.backbone):
            return tuple(self.backbone.pooled(blank))

    def features(
        self, images: "Images", kinds: tuple[str, ...], random: "ViewSpec | None" = None, epoch: int = 0
    ) -> Features:
        """Features of all of `images`; random: of one crop an image, a function of (seed, epoch, index)."""
        crop = dataclasses.replace(self.crop, random=random, seed=self.cfg.seed, epoch=epoch)
        return extract(
            self.backbone,
            images,
            np.arange(len(images)),
            self.accelerator,
            crop,
            self.options,
            kinds,
            quiet=epoch > 0,
        )


# ---------------------------------------------------------------------------------------------------- opening


def run_config(spec: str) -> dict[str, Any] | None:
    """config.yaml of the run folder `spec`, or None when it is no run folder."""
    path = Path(spec) / "config.yaml"
    if spec in FRESH or not path.is_file():
        return None
    config = read_yaml(path)
    if not isinstance(config.get("model"), dict):
        raise UserError(f"{path}: is no config of a run (no model section)")
    return config


def _given(cfg: Any, blank: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from those of `blank`."""
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    return {key: value for key, value in values.items() if value != getattr(blank, key)}


def data_of(cfg: Any, run: dict[str, Any] | None) -> DataConfig:
    """The data asked for; without data.path, or with the run's own, the run's keys with those given laid over them."""
    asked = _given(cfg.data, AskedData())
    if cfg.data.path and not is_own(cfg.data.path, run):
        return DataConfig(**asked)
    if run is None or not isinstance(run.get("data"), dict):
        raise UserError(f"data.path: not given, and backbone={cfg.backbone} is no run folder; pass data.path=<images>")
    data = dataclasses.replace(from_dict(DataConfig, run["data"]), **asked)
    if not cfg.data.path:
        say(f"data.path not given: the run's own, {data.path}")
    return data


def is_own(path: str, run: dict[str, Any] | None) -> bool:
    """Whether a run was trained on the images of `path`."""
    trained = ((run or {}).get("data") or {}).get("path")
    return trained is not None and Path(path).resolve() == Path(trained).resolve()


def model_of(cfg: Any, run: dict[str, Any] | None) -> ModelConfig:
    """The model asked for; of a run, the run's own at the img_size asked for: other wishes are refused."""
    if cfg.model.weights is not None:
        told = "an evaluation takes its weights from backbone=; leave it out"
        raise UserError(f"model.weights={cfg.model.weights}: {told}")
    if run is None and cfg.backbone not in FRESH:
        return cfg.model
    asked = _given(cfg.model, AskedModel())
    if run is None:
        return dataclasses.replace(ModelConfig(), **asked)
    model = dataclasses.replace(from_dict(ModelConfig, run["model"]), drop_path=0.0, weights=None)
    for key, value in asked.items():
        if key != "img_size" and value != getattr(model, key):
            raise UserError(f"model.{key}={value}: the run {cfg.backbone} has {getattr(model, key)}; leave it out")
    return dataclasses.replace(model, **asked)


def check_specs(backbone: str, compare: str | None) -> None:
    """UserError for a backbone not given, or a path to nothing: said before anything is opened."""
    if not backbone:
        raise UserError("backbone: not given; pass a run folder, a checkpoint, random, or none in finetune")
    for key, spec in (("backbone", backbone), ("compare", compare)):
        if spec:
            check_exists(spec, key)


def result_path(cfg: Any, task: str, run: dict[str, Any] | None) -> Path:
    """<run>/eval/[<name>/]<task>.json, or <out>/[<name>/]<task>.json where out is given; UserError if not writable."""
    if not cfg.out and run is None:
        told = f"backbone={cfg.backbone} is no run folder (it has no config.yaml)"
        within = next(Path(cfg.backbone).glob("*/config.yaml"), None) if Path(cfg.backbone).is_dir() else None
        such = f", such as {within.parent}" if within else ""
        raise UserError(f"out: not given, and {told}; give a run folder{such}, or out=<folder> for the result")
    if cfg.name is not None and (not cfg.name or Path(cfg.name).name != cfg.name or cfg.name in (".", "..")):
        raise UserError(f"name: {cfg.name!r} given, expected one word (it names a folder)")
    folder = Path(cfg.out) if cfg.out else Path(cfg.backbone) / "eval"
    check_writable(str(folder))
    return folder / cfg.name / f"{task}.json" if cfg.name else folder / f"{task}.json"


def open_splits(
    data: DataConfig, size: tuple[int, int], only_test: bool = False, trained_on: str | None = None
) -> tuple["Images", "Images", str]:
    """Labelled train and test images and the test split's name; without one, train's held-out slice.

    only_test: a test split, or a set of one split, will do, and stands in for train; but for its held-out slice where
    `trained_on`, the fingerprint of what a model has learnt from, says that it was trained on the rest.
    """
    if only_test:
        images = open_data(data, size, only_test=True).train
        rest, held = held_out(images)
        if trained_on == images.select(rest).fingerprint:
            images = images.select(held, f"held-out slice of {images.name}")
        elif trained_on == images.fingerprint:
            say(f"{data.path}: {images.name} holds the images that it was trained on: what follows is no test")
        return images, images, images.name
    splits = open_data(data, size)
    train, test = splits.train, splits.test
    labels_of(train)  # refuses a set without
    if test is not None:
        return train, test, test.name
    rest, held = hold_out(train, "give a test split or more images")
    told = f"no test split: {len(held)} images of {train.name} are held out as the test, {len(rest)} remain"
    say(f"{told}; a backbone pretrained on this data has seen them, without their labels")
    name = f"held-out slice of {train.name}"
    return train.select(rest), train.select(held, name), name


def hold_out(train: "Images", advice: str) -> tuple[np.ndarray, np.ndarray]:
    """held_out, or UserError with `advice` where nothing can be held out."""
    rest, held = held_out(train)
    if not len(held):
        raise UserError(f"data.path: with one image a class in {train.name} none can be held out; {advice}")
    return rest, held


def count_classes(*splits: "Images") -> int:
    return max(len(images.classes or ()) or int(labels_of(images).max()) + 1 for images in splits)


def labels_of(images: "Images") -> np.ndarray:
    """int64 N; UserError for a split without labels."""
    if images.labels is None:
        if isinstance(images.reader, Files):
            why = f"{images.reader.root} does not hold one folder of images a class, two classes at least"
            told = f"data.path: split {images.name} has no labels, and evaluations need them: {why}"
            raise UserError(f"{told}; give data.path=<a labelled set>")
        raise UserError(f"data.label_column: split {images.name} has no labels, and evaluations need them")
    return images.labels


def open_inputs(cfg: InputConfig, accelerator: "Accelerator", only_test: bool = False) -> Inputs:
    """Loads cfg.backbone, then opens the data. UserError in one line for whatever does not fit."""
    run = run_config(cfg.backbone)
    model, data = model_of(cfg, run), data_of(cfg, run)
    backbone, info = load_backbone(cfg.backbone, model, cfg.encoder)
    with main_process_first(accelerator):  # it fills the caches
        # of its own set, a run without a test split has trained on all but the held-out slice
        alone = only_test and not is_own(data.path, run)
        train, test, name = open_splits(data, backbone.img_size, alone, info.get("trained_on"))
    cfg = dataclasses.replace(cfg, data=data)
    n_classes = count_classes(train, test)
    say(describe_test(labels_of(test), name))
    seen = info.get("class_names")
    if not only_test and seen and train.classes and list(seen) != list(train.classes):
        say(f"{cfg.backbone} was trained on other classes than those of {data.path}; frozen features do not mind")
    backbone = _ready(backbone, accelerator)
    return Inputs(cfg, cfg.backbone, backbone, info, train, test, name, n_classes, accelerator)


def describe_test(labels: np.ndarray, name: str) -> str:
    """Which images judge, how coarse they are, and what the commonest class alone would score."""
    counts = np.unique(labels, return_counts=True)[1]
    n, most = len(labels), counts.max()
    coarse = f", so each is {100 / n:.1f} points" if n < FEW else ""
    uneven = f"; {100 * most / n:.1f} % of them are of one class" if most > 1.5 * n / len(counts) else ""
    if len(counts) == 1:
        return f"judged on {name}: {n} images, all of one class: what follows says nothing of the others"
    return f"judged on {name}: {n} images of {len(counts)} classes{coarse}{uneven}"


def _ready(backbone: Backbone, accelerator: "Accelerator") -> Backbone:
    return backbone.to(accelerator.device).requires_grad_(False).eval()


def other_inputs(inputs: Inputs, spec: str) -> Inputs:
    """The same data for another backbone; random and none are built like the one evaluated, and see what it sees."""
    if spec in FRESH:
        backbone, info = load_backbone(spec, built_model(inputs.info, list(inputs.crop.size)))
        info |= {key: inputs.info[key] for key in ("crop_pct", "crop_mode", "interpolation") if key in inputs.info}
        backbone.mean, backbone.std = inputs.backbone.mean, inputs.backbone.std
    else:
        size = AskedModel(img_size=inputs.cfg.model.img_size)
        backbone, info = load_backbone(spec, size, inputs.cfg.encoder)
    return dataclasses.replace(inputs, spec=spec, backbone=_ready(backbone, inputs.accelerator), info=info)


def built_model(info: dict[str, Any], img_size: list[int]) -> ModelConfig:
    """The config that builds the backbone which `info` describes, for img_size [H, W]."""
    args = info["model_args"]
    same = {key: args[key] for key in ("in_chans", "window_ratio", "bias_resize") if key in args}
    return ModelConfig(name=info["name"], img_size=img_size, **same)


# ---------------------------------------------------------------------------------------------------- running


def common_notes(inputs: Inputs, precision: str, seed: int) -> dict[str, Any]:
    """What every result says about how it came about."""
    crop, info = inputs.crop, inputs.info
    return {
        "backbone": inputs.spec,
        "model": info.get("name") or getattr(inputs.backbone, "name", None),
        "encoder": info.get("encoder"),
        "step": info.get("step"),
        "data": inputs.cfg.data.path,
        "test_split": inputs.test_name,
        "test_fingerprint": inputs.test.fingerprint,
        "classes": inputs.n_classes,
        "crop": {
            "size": list(crop.size),
            **({"squash": True} if crop.squash else {"crop_pct": crop.crop_pct}),
        },
        "interpolation": crop.interpolation,
        "mean": [float(v) for v in inputs.backbone.mean],
        "std": [float(v) for v in inputs.backbone.std],
        "precision": precision,
        "seeds": [seed],
    }


def asked_result(task: str, cfg: Any) -> tuple[Any, dict[str, Any] | None, Path, dict[str, Any]]:
    """(cfg with its data named, config of the run evaluated, the result's path, its settings), before any work.

    UserError where a backbone or the data are missing, or where the path holds a result of other settings.
    """
    check_specs(cfg.backbone, cfg.compare)
    run = run_config(cfg.backbone)
    path = result_path(cfg, task, run)
    cfg = dataclasses.replace(cfg, data=data_of(cfg, run))  # the result's settings name the data that was judged
    settings = settings_of(config_dict(cfg))
    check_result(path, settings)
    return cfg, run, path, settings


def report(task: str, cfg: Any, path: Path, settings: dict[str, Any], result: dict[str, Any], main: bool) -> None:
    """Print the table of the result, and write it (the main process does)."""
    for line in result_table(result, cfg.backbone, cfg.compare):
        say(line)
    if main:
        try:
            write_result(path, result, settings)
        except OSError as error:
            raise Failure(f"{path}: cannot be written ({error.strerror}); what was measured stands above") from None
    say(f"{task}: {result['n_test']} test images, {result['seconds']:.1f} s, written to {path}")


def evaluate(
    task: str,
    cfg: Any,
    accelerator: "Accelerator",
    judge: Callable[[Inputs, Any], dict[str, Any]],
    only_test: bool = False,
) -> dict[str, Any]:
    """Runs judge(inputs, cfg) for cfg.backbone and cfg.compare, writes <task>.json and prints the table.

    judge returns {"metrics": {name: percent}, "notes": {...}, "paired": a metric's name,
    "correct": N bool under that metric, "index": N} of the test images.
    """
    begin = time.perf_counter()
    for key, spec in (("backbone", cfg.backbone), ("compare", cfg.compare)):
        if spec == "none":
            raise UserError(f"{key}=none: from scratch, as only finetune trains; an untrained one is {key}=random")
    cfg, _, path, settings = asked_result(task, cfg)
    inputs = open_inputs(cfg, accelerator, only_test)
    other = other_inputs(inputs, cfg.compare) if cfg.compare else None  # before any work is done
    ours = judge(inputs, inputs.cfg)
    result = {**ours["metrics"], **common_notes(inputs, cfg.precision, cfg.seed), **ours["notes"]}
    result["correct"] = packed(ours, len(inputs.test))
    if other is not None:
        theirs = judge(other, other.cfg)
        theirs["notes"] = {**common_notes(other, cfg.precision, cfg.seed), **theirs["notes"]}
        result["compare"] = comparison(cfg.compare, ours, theirs)
    result["seconds"] = round(time.perf_counter() - begin, 2)
    report(task, cfg, path, settings, result, accelerator.is_main_process)
    accelerator.wait_for_everyone()
    return result


def program(schema: type[T], run: Callable[[T, Any], dict[str, Any]], argv: list[str]) -> None:
    """The command line of an evaluation: [yaml] key=value ..."""
    cfg: Any = load_config(schema, argv)
    accelerator = make_accelerator(TrainConfig(precision=cfg.precision), cfg.runtime)
    run(cfg, accelerator)
