"""From a split to batches on the device: what a batch holds is a function of the seed and the step.

order = f(seed, epoch); global batch s holds order[s * G : (s + 1) * G], and each process takes its slice; a
view is f(seed, epoch, image, view). No worker holds state, so any worker count and any resume give the same
batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcssl.augment import View, ViewSpec, colour, crop_resize
from gcssl.config import AugmentConfig, TrainConfig
from gcssl.data import BadImage, Images
from gcssl.errors import UserError
from gcssl.log import say
from gcssl.optim import scaled_lr
from gcssl.rng import AUGMENT, ORDER, REPLACE, rng
from gcssl.runtime import batch_layout
from gcssl.workers import ReportingSet, WorkerLoader

REPLACEMENTS = 20  # bad images in a row before the set is called broken

Key = tuple[int, int, int]  # epoch, image, position in the global batch
Drawn = tuple[list[tuple[ViewSpec, View]], list[np.ndarray | None]]
Draw = Callable[[np.random.Generator, tuple[int, int]], Drawn]
Make = Callable[[np.ndarray, int | None, tuple[int, ...]], dict[str, Any]]
Pixels = Callable[[np.ndarray, int], np.ndarray]  # uint8 H W 3, its index -> uint8 3 H W


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n images that one epoch runs through: int64 n."""
    return rng(seed, ORDER, epoch).permutation(n)


@dataclass(frozen=True)
class Sizes:
    """Batch and step counts of a run, derived once."""

    batch_size: int  # per process and micro-batch
    accumulate: int
    world: int
    global_batch: int
    steps_per_epoch: int
    total_steps: int

    def layout(self) -> str:
        return f"{self.global_batch} = {self.batch_size} x {self.world} processes x {self.accumulate} accumulated"

    def describe(self, train: TrainConfig) -> str:
        epochs, warmup = self.total_steps / self.steps_per_epoch, train.warmup_epochs
        rises = f"; train.warmup_epochs={warmup:g} is longer than the run's {epochs:.3g} epochs: the lr only rises"
        rule = "as given" if train.lr_rule == "none" else f"{train.lr_rule} rule, base {train.lr_base}"
        return (
            f"global batch {self.layout()}; lr {scaled_lr(train, self.global_batch):.3g} ({rule});"
            f" {self.total_steps} steps, {self.steps_per_epoch} an epoch{rises if warmup > epochs else ''}"
        )


@dataclass(frozen=True)
class BatchPlan:
    """A batch sampler: the micro-batches of n images that are left to one process after `start_step` steps.

    Micro-batch a of a step on process `rank` holds positions [(a * world + rank) * batch_size, + batch_size)
    of the global batch. The ragged end of an epoch is dropped; the permutations differ, so other images miss
    each time.
    """

    n: int
    sizes: Sizes
    rank: int
    seed: int
    start_step: int = 0

    def __len__(self) -> int:
        return max(0, self.sizes.total_steps - self.start_step) * self.sizes.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        sizes, order, order_epoch = self.sizes, np.empty(0, np.int64), -1
        for step in range(self.start_step, sizes.total_steps):
            epoch, batch = divmod(step, sizes.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.n, self.seed, epoch), epoch
            for micro in range(sizes.accumulate):
                first = (micro * sizes.world + self.rank) * sizes.batch_size
                start = batch * sizes.global_batch + first
                chosen = order[start : start + sizes.batch_size].tolist()
                yield [(epoch, index, first + i) for i, index in enumerate(chosen)]


def run_sizes(train: TrainConfig, n_images: int, world: int) -> Sizes:
    batch_size, accumulate, global_batch = batch_layout(train, world)
    steps_per_epoch = n_images // global_batch
    if steps_per_epoch == 0:
        given = "global_batch" if train.global_batch is not None else "accumulate" if accumulate > 1 else "batch_size"
        lower = [f"train.{given}"]
        if given == "accumulate" and batch_size * world > n_images:  # lowering `given` alone would not do
            lower.append("train.batch_size")
        raise UserError(
            f"train.{given}={getattr(train, given)}: the global batch of {global_batch} exceeds the {n_images}"
            f" training images; lower {' and '.join(lower)}"
        )
    if (left := n_images % global_batch) > n_images / 10:
        say(f"an epoch leaves out {left} of {n_images} images, others each time: batches of {global_batch} are whole")
    total = train.steps if train.steps is not None else train.epochs * steps_per_epoch
    return Sizes(batch_size, accumulate, world, global_batch, steps_per_epoch, total)


class TrainSet(ReportingSet):
    """Items by (epoch, image, position). `make(image, label, key)` turns a decoded image into a dict of
    arrays.

    `key` is the item's own stream: `rng(*key)` = f(seed, epoch, image). An image that cannot be decoded is
    replaced by another one, chosen by (image, attempt) alone: the same one in every epoch and on any layout.
    The item reports it.
    """

    def __init__(self, images: Images, make: Make, seed: int) -> None:
        super().__init__(images)
        self.make, self.seed = make, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index, position = key
        image, used, bad = self._load(index)
        label = None if self.images.labels is None else int(self.images.labels[used])
        item = self.make(image, label, (self.seed, AUGMENT, epoch, index))
        label = -1 if label is None else label
        return item | {"index": used, "position": position, "label": label, "bad": bad}

    def examples(self, n: int) -> dict[str, Any]:
        """A batch of n images from all over the set, as epoch 0 draws them: the same at every call."""
        rows = np.linspace(0, len(self) - 1, n).astype(int)
        return collate([self[(0, int(row), 0)] for row in rows])

    def _load(self, index: int) -> tuple[np.ndarray, int, list[tuple[int, str, str]]]:
        """(image, its index, what was bad on the way)."""
        bad: list[tuple[int, str, str]] = []
        used = index
        for attempt in range(REPLACEMENTS):
            try:
                return self.load(used), used, bad
            except BadImage as error:
                bad.append((used, self.images.where(used), str(error)))
                used = int(rng(index, REPLACE, attempt).integers(len(self.images)))
        last = f"the last one {bad[-1][1]} ({bad[-1][2]})"
        raise UserError(f"data.path: {REPLACEMENTS} images in a row cannot be decoded, {last}")


@dataclass
class ViewMaker:
    """The `make` of pretraining: an objective's draw, crop and resize here, colour where `augment.where` says."""

    draw: Draw
    img_size: tuple[int, int]
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __call__(self, image: np.ndarray, _label: int | None, key: tuple[int, ...]) -> dict[str, Any]:
        drawn, masks = self.draw(rng(*key), self.img_size)
        views = [crop_resize(image, view, spec) for spec, view in drawn]
        params = [view.params() for _, view in drawn]
        if self.augment.where == "worker":
            views = [_colour_one(x, p, self.augment.colour == "fast") for x, p in zip(views, params, strict=True)]
        return {"views": views, "params": params, "masks": masks}


def _colour_one(x: np.ndarray, params: dict[str, np.ndarray], fast: bool) -> np.ndarray:
    """`colour` for one image, rounded back to uint8 3 H W so that a batch stays small."""
    one = {name: torch.as_tensor(np.asarray(value))[None] for name, value in params.items()}
    return colour(torch.from_numpy(x)[None], one, fast)[0].mul_(255).round_().to(torch.uint8).numpy()


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: lists of views, params or masks become lists of stacked tensors, `bad` one list."""
    return {key: _stack([item[key] for item in items], key) for key in items[0]}


def _stack(values: list[Any], key: str) -> Any:
    first = values[0]
    if key == "bad":
        return [entry for value in values for entry in value]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: _stack([value[name] for value in values], name) for name in first}
    if isinstance(first, list):
        return [_stack([value[i] for value in values], key) for i in range(len(first))]
    if isinstance(first, Tensor):
        return torch.stack(values)
    return torch.from_numpy(np.stack([np.asarray(value) for value in values]))


def train_loader(dataset: TrainSet, plan: BatchPlan, workers: int, timeout: int) -> WorkerLoader:
    """One loader for the whole rest of the run; a worker that dies or hangs ends it with one line."""
    return WorkerLoader(
        dataset,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=collate,
        timeout=timeout,
    )


class _EvalSet(ReportingSet):
    def __init__(self, images: Images, indices: np.ndarray, size: tuple[int, int], pixels: Pixels) -> None:
        super().__init__(images)
        self.indices, self.size, self.pixels = indices, size, pixels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        index = int(self.indices[i])
        label = -1 if self.images.labels is None else int(self.images.labels[index])
        try:
            pixels, ok = self.pixels(self.load(index), index), True
        except BadImage:
            pixels, ok = np.zeros((3, *self.size), np.uint8), False
        return {"index": index, "image": pixels, "label": label, "ok": ok}


def eval_loader(
    images: Images,
    indices: np.ndarray,
    size: tuple[int, int],
    pixels: Pixels,
    batch_size: int,
    workers: int,
    timeout: int = 300,
) -> WorkerLoader:
    """Images at `indices`, in order: {index B, image uint8 B 3 H W, label B, ok B}.

    pixels: makes the input (3, *size) from (image, index). timeout: seconds that a worker may take for one
    batch. An image that cannot be decoded comes as zeros with ok False; label is -1 where there is none.
    """
    return WorkerLoader(
        _EvalSet(images, np.asarray(indices, np.int64), size, pixels),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        timeout=timeout,
    )


def batch_to_device(
    batch: dict[str, Any],
    device: torch.device | str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: AugmentConfig | None = None,
) -> dict[str, Any]:
    """The batch on `device`, its views normalised floats (coloured here unless augment.where=worker).

    `params` stay on the host, where `colour` reads them, and go no further; `bad` stays a list.
    """
    augment = augment or AugmentConfig()
    out = dict(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor):
            out[key] = value.to(device, non_blocking=True)
    out["masks"] = [m if m is None else m.to(device, non_blocking=True) for m in batch.get("masks", [])]
    views = []
    for i, x in enumerate(batch.get("views", [])):
        params = batch["params"][i] if augment.where == "device" else None
        views.append(colour(x.to(device, non_blocking=True), params, augment.colour == "fast", mean, std))
    out["views"] = views
    out.pop("params", None)  # DDP would copy each of its small tensors to the device
    return out
