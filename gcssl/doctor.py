"""Check a pretraining run before hours are spent on it.

    python -m gcssl.doctor configs/pretrain/x.yaml [key=value ...]                one row a check; exit 2 if one fails
    python -m gcssl.doctor verify-resume configs/pretrain/x.yaml [key=value ...]  kill -9, resume, compare every bit
    python -m gcssl.doctor replay RUN/incidents/after_step_123 [key=value ...]    the step that stopped a run

It takes the command line of pretrain.py, doctor.scan (images looked at, of each split; 0: all), doctor.minutes (of
real training) and doctor.processes (that the run will have). It writes nothing into `out`.
"""

import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gcssl.config import load_config
from gcssl.data import held_out
from gcssl.dryrun import DoctorConfig, DryRun, examine
from gcssl.errors import UserError
from gcssl.eval.knn import search
from gcssl.keys import nearest
from gcssl.log import say
from gcssl.models.gcvit import GCViT
from gcssl.models.hidden import upsample_mask
from gcssl.rng import MODEL, seed_torch
from gcssl.runtime import entry
from gcssl.ssl.objectives import SCHEMAS
from gcssl.state import checkpoint_bytes
from gcssl.trial import changed, first_minutes, first_steps, rate, replay, verify_resume

MOST_BAD = 5  # images that cannot be decoded, of those named
ALIKE = 0.999  # cosine of two centred thumbnails that show the same picture


@dataclass
class Finding:
    verdict: str  # ok | warn | FAIL
    told: str


# ---- images


def check_images(dry: DryRun) -> Finding:
    parts, worst = [], 0.0
    for name, seen in dry.seen.items():
        looked = len(seen.index) + len(seen.bad)
        whole = len(dry.data.train if name == "train" else dry.data.test or [])
        share = len(seen.bad) / looked
        worst = max(worst, share)
        low, middle, high = (np.quantile(seen.sides.min(1), q) for q in (0, 0.5, 1)) if len(seen.sides) else (0, 0, 0)
        told = f"{name}: {looked} of {whole} looked at, shorter side {low:.0f} to {high:.0f} px (median {middle:.0f})"
        if seen.bad:
            first = [f"{where} ({why})" for where, why in seen.bad[:MOST_BAD]]
            more = f" and {len(seen.bad) - MOST_BAD} more" if len(seen.bad) > MOST_BAD else ""
            told += f", {len(seen.bad)} cannot be decoded: {', '.join(first)}{more}"
        parts.append(told)
    if worst > dry.cfg.data.max_bad:
        parts.append(f"more than data.max_bad={dry.cfg.data.max_bad}")
    if dry.refused:
        parts.append(f"evaluations will refuse the test split: {dry.refused}")
    verdict = "FAIL" if worst > dry.cfg.data.max_bad else "warn" if worst or dry.refused else "ok"
    return Finding(verdict, "; ".join(parts))


def check_classes(dry: DryRun) -> Finding:
    labels, classes = dry.data.train.labels, dry.data.train.classes
    if labels is None or classes is None:
        return Finding("ok", "no labels: pretraining needs none")
    counts = np.bincount(labels, minlength=len(classes))
    told = f"{len(classes)} classes of {counts.min()} to {counts.max()} images"
    cases = Counter(name.casefold() for name in classes)
    if doubled := [name for name in classes if cases[name.casefold()] > 1]:
        return Finding("warn", f"{told}; {' and '.join(doubled[:3])} are two classes, by case alone")
    if counts.min() < 20:
        return Finding("warn", f"{told}; {classes[int(counts.argmin())]} has few: its kNN and probe say little")
    return Finding("ok", told)


def check_duplicates(dry: DryRun) -> Finding:
    train, images, judges = dry.seen["train"], dry.data.train, "held-out"
    if "val" in dry.seen and dry.data.test is not None:
        val, images, judges = dry.seen["val"], dry.data.test, "test"
    else:  # what evaluations hold out then
        held = np.isin(train.index, held_out(images)[1])
        train, val = train.part(~held), train.part(held)
    if not len(train.index) or not len(val.index):
        return Finding("warn", "nothing that can be decoded to compare")
    same = set(train.hashes) & set(val.hashes)
    similarity, nearest = search(train.thumbnails, val.thumbnails, 1, dry.cfg.eval.backend)
    alike = (similarity[:, 0] > ALIKE).nonzero().flatten().tolist()
    told = f"of {len(val.index)} {judges} images {len(same)} are pixel by pixel among {len(train.index)} of the "
    told += f"{len(dry.data.train)} training images, {len(alike)} nearly so"
    if not alike and not same:
        return Finding("ok", told)
    if alike:
        one = images.where(int(val.index[alike[0]]))
        other = dry.data.train.where(int(train.index[int(nearest[alike[0], 0])]))
        told += f", such as {one} and {other}"
    return Finding("warn", f"{told}: they flatter every evaluation")


# ---- the model


def check_sizes(dry: DryRun) -> Finding:
    backbone = dry.backbone
    if not isinstance(backbone, GCViT):
        return Finding("ok", f"{backbone.name} at {backbone.img_size}, features at stride {backbone.stride}")
    sides = {view.shape[-2:] for view in dry.batch(1)["views"]}
    told = []
    for side in sorted(sides, reverse=True):
        windows = backbone.windows_at((side[0], side[1]))
        told.append(f"{side[0]}x{side[1]}: " + ", ".join(f"{h}x{w}" for h, w in windows))
    text = f"windows of the four stages, in tokens: {'; '.join(told)}"
    if min(min(window) for window in backbone.windows[:3]) < 3:  # small crops and last stages have no choice
        return Finding("warn", f"{text}; windows of 1 or 2 tokens see little: larger images, or model.window_ratio")
    return Finding("ok", text)


def check_batch_mates(dry: DryRun) -> Finding:
    backbone, x = dry.backbone, dry.batch()["views"][0]
    mode = backbone.training
    backbone.eval()
    with torch.no_grad():
        alone, among = backbone(torch.cat([x[:1], x.flip(0)[1:] + 1])), backbone(torch.cat([x[:1], -x[1:]]))
    backbone.train(mode)
    if torch.equal(alone[0], among[0]):
        return Finding("ok", "in evaluations an image's features do not depend on the other images of its batch")
    return Finding(
        "FAIL", "an image's features change with the other images of its batch: every evaluation would be wrong"
    )


@contextmanager
def outputs_of(encoder: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Inside, what each layer without layers of its own gives, in order."""
    found: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _, __, out: found.append((name, out.detach())) if isinstance(out, Tensor) else None

    layers = [(name, module) for name, module in encoder.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(note(name)) for name, module in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_mask_leak(dry: DryRun) -> Finding:
    """Other pixels behind the masks: no layer of the student's encoder may give another bit."""
    batch = dry.batch()
    masks = batch["masks"]
    if all(mask is None for mask in masks):
        return Finding("ok", f"{dry.cfg.objective.name} hides nothing")
    noisy = {**batch, "views": list(batch["views"])}
    for i, (x, mask) in enumerate(zip(batch["views"], masks, strict=False)):  # ummae's second mask hides what is kept
        if mask is not None:
            hidden = upsample_mask(mask, *x.shape[-2:])[:, None]
            noisy["views"][i] = torch.where(hidden, 3 * torch.randn_like(x), x)
    seen = []
    for one in (batch, noisy):
        seed_torch(0, MODEL)
        with torch.no_grad(), outputs_of(dry.objective.encoder) as outputs:
            dry.objective(one, 0)
        seen.append(outputs)
    for (name, a), (_, b) in zip(*seen, strict=True):
        if not torch.equal(a, b):
            return Finding("FAIL", f"hidden pixels reach the student's {name}: the task can be solved by looking")
    return Finding("ok", f"hidden pixels reach none of the student's {len(seen[0])} layer outputs")


def check_gradients(dry: DryRun) -> Finding:
    objective = dry.objective
    seed_torch(0, MODEL)
    out = objective(dry.batch(), 0)
    out["loss"].backward()
    named = [(name, p.grad) for name, p in objective.named_parameters() if p.requires_grad]
    objective.zero_grad()
    wild = [name for name, grad in named if grad is not None and not grad.isfinite().all()]
    unused = [name for name, grad in named if grad is None]
    if wild or not out["loss"].isfinite():
        return Finding(
            "FAIL", f"loss {out['loss'].item():.4g}; gradients that are not finite: {', '.join(wild[:3]) or 'none'}"
        )
    if unused:
        return Finding("FAIL", f"{len(unused)} parameters get no gradient ({', '.join(unused[:3])}): DDP would stop")
    return Finding("ok", f"loss {out['loss'].item():.4g}; all {len(named)} trainable tensors get a finite gradient")


# ---- the run


def check_batch(dry: DryRun) -> Finding:
    cfg, sizes = dry.cfg, dry.sizes
    told = sizes.describe(cfg.train)
    return Finding("warn" if cfg.train.warmup_epochs * sizes.steps_per_epoch > sizes.total_steps else "ok", told)


def check_disk(dry: DryRun) -> Finding:
    cfg = dry.cfg
    weights, moments = checkpoint_bytes(dry.objective, cfg.train.optimizer)
    epochs = dry.sizes.total_steps // dry.sizes.steps_per_epoch
    for_ever = epochs // cfg.checkpoint.keep_every if cfg.checkpoint.keep_every else 0
    needed = (weights + moments) * (cfg.checkpoint.keep + 1 + for_ever)  # the newest is whole before the oldest goes
    folder = next(p for p in [Path(cfg.out or ".").absolute(), *Path(cfg.out or ".").absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    told = f"checkpoints of {(weights + moments) / 1e6:.0f} MB take {needed / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
    return Finding("FAIL" if needed > free else "ok", told)


def check_first_steps(dry: DryRun) -> Finding:
    if not dry.cfg.doctor.minutes:
        return Finding("ok", "not run: doctor.minutes=0")
    how = (dry.cfg.doctor.minutes, dry.sizes)
    try:
        cfg = changed(dry.cfg, {"data.max_bad": 1.0})  # of which `images` tells
        found = Finding(*first_minutes(cfg, *how))
        if dry.cfg.train.compile and found.verdict != "FAIL":
            eager = rate(first_steps(changed(dry.cfg, {"train.compile": False}), *how))
            found.told += f"; without train.compile {eager:.0f} images/s"
        return found
    except UserError as error:
        return Finding("FAIL", str(error))


CHECKS: dict[str, Callable[[DryRun], Finding]] = {
    "images": check_images,
    "classes": check_classes,
    "duplicates": check_duplicates,
    "sizes": check_sizes,
    "batch-mates": check_batch_mates,
    "mask leak": check_mask_leak,
    "gradients": check_gradients,
    "batch and lr": check_batch,
    "disk": check_disk,
    "first steps": check_first_steps,
}


def main(argv: list[str]) -> None:
    if argv and argv[0] == "replay":
        replay(argv[1:])
        return
    asked = bool(argv) and argv[0] == "verify-resume"
    if argv and not asked and (near := nearest(argv[0], ["replay", "verify-resume"])):
        raise UserError(f"{argv[0]}: no such check{near}")
    cfg = load_config(DoctorConfig, argv[1:] if asked else argv, SCHEMAS)
    if asked:
        verify_resume(cfg, cfg.doctor.processes)
        return
    dry = examine(cfg)
    say(dry.data.train.describe(cfg.data.path))
    failed = []
    for name, check in CHECKS.items():
        found = check(dry)
        say(textwrap.fill(f"{found.verdict:<5} {name:<13} {found.told}", 118, subsequent_indent=" " * 20))
        failed += [name] if found.verdict == "FAIL" else []
    if failed:
        raise UserError(f"{len(failed)} of {len(CHECKS)} checks failed: {', '.join(failed)}")


if __name__ == "__main__":
    entry(main)
