"""Fine-tune a pretrained backbone, or train the supervised baseline (`backbone=none`), and judge it on the test split.

    accelerate launch -m gcssl.eval.finetune backbone=runs/a data.path=/data/imagenet

The same run as pretraining (`gcssl.pretrain.fit`: resume, preemption, numbers) with a supervised objective: timm's
transforms, Mixup, RandomErasing and ModelEmaV3, seeded from (seed, epoch, sample) and (seed, step), a layer decay of
our own grouping by block, and drop path. The last epoch counts; the test split is read once, at the end.
"""

import dataclasses
import hashlib
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from timm.data import Mixup, create_transform
from timm.utils import ModelEmaV3
from torch import Tensor

from gcssl.checkpoint import write_backbone
from gcssl.config import CheckpointConfig, DataConfig, LogConfig, RuntimeConfig, TrainConfig, load_config
from gcssl.errors import UserError
from gcssl.eval.features import options_within
from gcssl.eval.inputs import (
    AskedData,
    Inputs,
    asked_result,
    built_model,
    common_notes,
    count_classes,
    describe_test,
    hold_out,
    labels_of,
    model_of,
    open_splits,
    report,
)
from gcssl.eval.metrics import percent
from gcssl.eval.results import comparison, packed
from gcssl.eval.validate import classify
from gcssl.loader import TrainSet, run_sizes
from gcssl.log import say
from gcssl.models.build import Backbone, backbone_info, from_config_on_meta
from gcssl.models.load import FRESH, AskedModel, load_backbone
from gcssl.optim import groups_table, param_groups
from gcssl.pretrain import fit
from gcssl.rng import INIT, MIXUP, drop_noise, seed_host, seed_torch
from gcssl.runfolder import RunFolder
from gcssl.runtime import batch_layout, entry, main_process_first, make_accelerator
from gcssl.ssl.base import Objective

OF_FULL = ("auto_augment", "color_jitter", "reprob", "mixup", "cutmix")
LEFT_OUT = {"none": ("scale", *OF_FULL), "light": OF_FULL, "full": ()}  # by finetune.augment


@dataclass
class FinetuneOptions:
    augment: str = "full"  # none: flip | light: crop, flip | full: crop, flip, RandAugment, erasing, mixup, cutmix
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # area of the random crop
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"  # timm's name of a policy; null: color_jitter instead
    color_jitter: float = 0.4  # where auto_augment is null, as in timm
    reprob: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    ema_decay: float = 0.9998
    layer_decay: float | None = None  # null: 0.95 for a pretrained backbone, none for backbone=none
    holdout: bool = False  # train without the held-out slice of train and judge on it: for choosing settings


@dataclass
class FinetuneConfig:
    backbone: str = ""  # run folder, checkpoint, exported file, timm or NVlabs checkpoint, random, or none: supervised
    compare: str | None = None  # random | none: the same budget again from there
    encoder: str | None = None
    name: str | None = None  # the run and its result go to eval/<name>/
    out: str = ""  # result folder, needed where backbone is no run folder
    crop_pct: float = 1.0
    interpolation: str | None = None  # of the test images; null: the backbone's
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    model: AskedModel = field(default_factory=lambda: AskedModel(drop_path=0.1))
    data: DataConfig = field(default_factory=AskedData)
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(blr=5e-4, min_lr=1e-6, warmup_epochs=5, clip_grad=5.0)
    )
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    allow_env: bool = False


class Classifier(Objective):
    """Backbone with its head, cross-entropy, and the moving average of the weights that is judged."""

    def __init__(self, backbone: Backbone, options: FinetuneOptions) -> None:
        super().__init__()
        self.encoder = backbone
        # warmed up, so that the average of a short run is not its initial weights
        self.ema = ModelEmaV3(backbone, decay=options.ema_decay, use_warmup=True).requires_grad_(False)
        self.smoothing = options.smoothing

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:  # noqa: ARG002
        noise = batch.get("noise", [None])[0]
        logits = self.encoder(batch["image"], noise).float()  # B classes
        hard = batch["target"].ndim == 1  # soft targets carry their smoothing already
        loss = F.cross_entropy(logits, batch["target"], label_smoothing=self.smoothing if hard else 0.0)
        return {"loss": loss}

    def after_step(self, step: int) -> None:
        self.ema.update(self.encoder, step + 1)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        self.ema.eval()
        return self


class TransformMaker:
    """A training sample from a PIL image through timm's transform, seeded by (seed, epoch, sample)."""

    def __init__(self, options: FinetuneOptions, size: tuple[int, int], mean: tuple, std: tuple) -> None:
        full, crop = options.augment == "full", options.augment != "none"
        try:
            self.transform = create_transform(
                size,
                is_training=True,
                scale=(options.scale[0], options.scale[1]) if crop else (1.0, 1.0),
                ratio=(3 / 4, 4 / 3) if crop else (1.0, 1.0),
                color_jitter=options.color_jitter if full else None,  # type: ignore[arg-type]
                auto_augment=options.auto_augment if full else None,
                re_prob=options.reprob if full else 0.0,
                re_mode="pixel",
                interpolation="random" if full else "bicubic",
                mean=mean,
                std=std,
            )
        except (AssertionError, KeyError, ValueError) as error:  # what timm says of a string it cannot read
            raise UserError(
                f"finetune.auto_augment: given {options.auto_augment}, which timm cannot read ({error});"
                " expected one of its policies, such as rand-m9-mstd0.5-inc1"
            ) from None

    def __call__(self, image: np.ndarray, label: int | None, key: tuple[int, ...]) -> dict[str, Tensor]:  # noqa: ARG002
        seed_host(*key)
        return {"image": self.transform(Image.fromarray(image))}


def run(cfg: FinetuneConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Fine-tune, or resume the fine-tuning, from cfg.backbone and cfg.compare; writes and returns the result."""
    begin = time.perf_counter()
    cfg, run_cfg, path, settings = asked_result("finetune", cfg)
    if cfg.compare not in (None, *FRESH):
        raise UserError(f"compare={cfg.compare}: fine-tuning compares with {' or '.join(FRESH)}")
    batch_size, _, _ = batch_layout(cfg.train, accelerator.num_processes)
    if mixes(cfg.finetune) and batch_size % 2:
        raise UserError(f"train.batch_size={batch_size}: mixup pairs images, expected an even number")
    if cfg.train.shard:
        raise UserError("train.shard: given true, expected false: it is for pretraining")
    for key in LEFT_OUT[cfg.finetune.augment]:
        if (given := getattr(cfg.finetune, key)) != getattr(FinetuneOptions(), key):
            say(f"finetune.{key}={given}: not used with finetune.augment={cfg.finetune.augment}")
    TransformMaker(cfg.finetune, (32, 32), (0.5,) * 3, (0.5,) * 3)  # refuses a wrong auto_augment before any work
    folder = path.parent if cfg.name else path.parent / "finetune"
    cfg = of_backbone(cfg, run_cfg)
    ours = finetune(cfg, accelerator, folder, cfg.backbone)
    notes = ours["notes"]
    result = {**ours["metrics"], **notes, "correct": packed(ours, notes["n_test"] + notes["n_bad"])}
    if cfg.compare:
        theirs = finetune(cfg, accelerator, folder / cfg.compare, cfg.compare)
        result["compare"] = comparison(cfg.compare, ours, theirs)
    result["seconds"] = round(time.perf_counter() - begin, 2)
    report("finetune", cfg, path, settings, result, accelerator.is_main_process)
    return result


def of_backbone(cfg: FinetuneConfig, run: dict[str, Any] | None) -> FinetuneConfig:
    """cfg with the model that cfg.backbone stands for, all keys filled in, as config.yaml keeps it."""
    rates = {"drop_path": cfg.model.drop_path, "grad_checkpointing": cfg.model.grad_checkpointing}
    plain = dataclasses.replace(cfg.model, drop_path=0.0, grad_checkpointing=False)
    model = model_of(dataclasses.replace(cfg, model=plain), run)
    if cfg.backbone not in FRESH:
        backbone, info = load_backbone(cfg.backbone, model, cfg.encoder)
        model = built_model(info, list(backbone.img_size))
    if cfg.compare:
        from_config_on_meta(model)  # refuses what has no name to build it by
    return dataclasses.replace(cfg, model=dataclasses.replace(model, **rates))  # type: ignore[arg-type]


def finetune(cfg: FinetuneConfig, accelerator: Accelerator, folder: Path, spec: str) -> dict[str, Any]:
    """One run from backbone `spec` in `folder`: {"metrics", "notes", "correct", "index"} of the test images."""
    inputs = open_run(cfg, accelerator, spec)
    train, backbone = inputs.train, inputs.backbone
    objective = Classifier(backbone, cfg.finetune)
    sizes = run_sizes(cfg.train, len(train), accelerator.num_processes)
    facts: dict[str, Any] = {"data": train.fingerprint}
    if spec in FRESH:
        facts["backbone"] = spec
    else:
        facts["weights"] = weights_digest(backbone)  # a run that `spec` names may have trained on since
    if mixes(cfg.finetune):
        facts["train.batch_size"] = sizes.batch_size  # the images that are mixed with each other
    with RunFolder(folder, cfg, sizes.global_batch, accelerator, facts) as run_folder:
        say(f"fine-tuning {spec}: {sizes.describe(cfg.train)}")
        groups = layer_groups(cfg, backbone, spec)
        say(groups_table(groups))
        maker = TransformMaker(cfg.finetune, backbone.img_size, backbone.mean, backbone.std)
        dataset = TrainSet(train, maker, cfg.train.seed)
        place = partial(to_device, cfg=cfg, accelerator=accelerator, backbone=backbone, classes=inputs.n_classes)
        fit(cfg, accelerator, run_folder, objective, groups, dataset, sizes, place)
        if accelerator.is_main_process:
            averaged = objective.ema.module
            told = {"step": sizes.total_steps, "objective": "finetune", "encoder": "ema", "class_names": train.classes}
            told["trained_on"] = train.fingerprint
            crop = {"crop_pct": cfg.crop_pct, "interpolation": inputs.crop.interpolation}
            write_backbone(folder, averaged.state_dict(), backbone_info(averaged, **told, **crop))
        judged = judge(objective, inputs)
    judged["notes"] = {
        **common_notes(inputs, cfg.train.precision, cfg.train.seed), **judged["notes"], "protocol": "fine-tuned",
        "features": "logits", "epochs": sizes.total_steps / sizes.steps_per_epoch, "steps": sizes.total_steps,
        "global_batch": sizes.global_batch, "finetune": in_force(cfg, spec), "blr": cfg.train.blr,
        "drop_path": cfg.model.drop_path,
    }  # fmt: skip
    return judged


def open_run(cfg: FinetuneConfig, accelerator: Accelerator, spec: str) -> Inputs:
    """The backbone before its first step, with a fresh head for the classes of the data, and the data."""
    seed_torch(cfg.train.seed, INIT)
    backbone, info = load_backbone(spec, cfg.model, cfg.encoder)
    with main_process_first(accelerator):  # it fills the caches
        train, test, name = open_splits(cfg.data, backbone.img_size)
    if cfg.finetune.holdout:
        rest, held = hold_out(train, "set finetune.holdout=false")
        train, test, name = train.select(rest), train.select(held), f"held-out slice of {train.name}"
    n_classes = count_classes(train, test)
    say(describe_test(labels_of(test), name))
    seed_torch(cfg.train.seed, INIT, 1)
    backbone.reset_classifier(n_classes)
    return Inputs(cfg, spec, backbone, info, train, test, name, n_classes, accelerator)


def weights_digest(backbone: Backbone) -> str:
    """sha256 of all that a backbone's state dict holds."""
    digest = hashlib.sha256()
    for name, value in backbone.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def layer_groups(cfg: FinetuneConfig, backbone: Backbone, spec: str) -> list[dict[str, Any]]:
    """Parameter groups of the backbone, the lr falling with depth by `layer_decay` per block."""
    named = backbone.named_parameters(prefix="encoder")
    ids = {f"encoder.{name}": depth for name, depth in backbone.layer_ids().items()}
    undecayed = {f"encoder.{name}" for name in backbone.no_weight_decay()}
    return param_groups(named, cfg.train.weight_decay, undecayed, ids, layer_decay(cfg, spec))


def layer_decay(cfg: FinetuneConfig, spec: str) -> float:
    decay = cfg.finetune.layer_decay
    if decay is None:
        decay = 1.0 if spec in FRESH else 0.95
    return decay


def in_force(cfg: FinetuneConfig, spec: str) -> dict[str, Any]:
    """The options of fine-tuning from `spec` as a result tells them: null for what its augmentation leaves out."""
    off = dict.fromkeys(LEFT_OUT[cfg.finetune.augment])
    return {**dataclasses.asdict(cfg.finetune), "layer_decay": layer_decay(cfg, spec), **off}


def mixes(options: FinetuneOptions) -> bool:
    return options.augment == "full" and (options.mixup > 0 or options.cutmix > 0)


def to_device(
    batch: dict[str, Any], step: int, *, cfg: FinetuneConfig, accelerator: Accelerator, backbone: Backbone, classes: int
) -> dict[str, Any]:
    """The batch on the device with its targets, mixed where the recipe mixes.

    One mixing coefficient a step; partners are those of the micro-batch (the first image with the last), so that
    train.batch_size, but not the number of processes or micro-batches, is part of what a mixing run computes.
    """
    options, device = cfg.finetune, accelerator.device
    position, batch["target"] = batch.pop("position"), batch.pop("label")
    for key in ("image", "target", "index"):
        batch[key] = batch[key].to(device, non_blocking=True)
    if mixes(options):
        seed_torch(cfg.train.seed, MIXUP, step)
        mixup = Mixup(options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=classes)
        batch["image"], batch["target"] = mixup(batch["image"], batch["target"])
    if cfg.model.drop_path > 0 and backbone.n_noise:
        batch["noise"] = drop_noise(cfg.train.seed, step, (1, backbone.n_noise), position, device)
    return batch


def judge(objective: Classifier, inputs: Inputs) -> dict[str, Any]:
    """Accuracy of the averaged and the raw weights; every image counts once, whatever the number of processes."""

    def both(x: Tensor) -> dict[str, Tensor]:
        return {"ema": objective.ema.module(x), "raw": objective.encoder(x)}

    precision = "bf16" if inputs.cfg.train.precision == "bf16" else "fp32"
    found = classify(both, inputs, options_within(inputs.cfg.train, inputs.cfg.data, precision))
    ema, raw = found["hits"]["ema"], found["hits"]["raw"]
    metrics = {
        "finetune/top1": percent(ema[1]),
        "finetune/top5": percent(ema[5]),
        "finetune/top1_raw": percent(raw[1]),
    }
    paired = {"paired": "finetune/top1", "correct": ema[1], "index": found["index"]}
    return {"metrics": metrics, "notes": found["notes"], **paired}


def main(argv: list[str]) -> None:
    cfg = load_config(FinetuneConfig, argv)
    run(cfg, make_accelerator(cfg.train, cfg.runtime))


if __name__ == "__main__":
    entry(main)
