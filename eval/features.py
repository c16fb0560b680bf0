"""Frozen features: each image counts once, whatever the number of processes and the batch size."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gcssl.augment import INTERPOLATIONS, ViewSpec, crop_resize, draw_view, normalize, resize_center_crop
from gcssl.errors import NotFinite, UserError
from gcssl.loader import eval_loader
from gcssl.log import say
from gcssl.rng import PROBE, rng

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gcssl.config import DataConfig, TrainConfig
    from gcssl.data import Images
    from gcssl.models.build import Backbone

GRID_KINDS = ("last", "last4", "stages34")  # which the linear probe chooses from
KINDS = (*GRID_KINDS, "stage1", "stage2", "stage3")  # what a backbone has of them: its `pooled`
PRECISIONS = ("fp32", "bf16")


@dataclass
class Features:
    """Features of the images that could be decoded, in the order of the indices asked for."""

    x: dict[str, Tensor]  # kind -> N D float32, on the CPU
    y: Tensor  # N int64, -1 where there is no label
    index: Tensor  # N int64, the image's place in its split
    n_bad: int = 0  # images left out because they could not be decoded


@dataclass(frozen=True)
class Crop:
    """How an image becomes an input: the centre crop of the resized image, squashed, or one random crop."""

    size: tuple[int, int]  # height, width in pixels
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    squash: bool = False  # the whole image resized to the size, sides apart, whatever crop_pct
    random: ViewSpec | None = None  # when set, a crop drawn from (seed, epoch, index) instead of the centre
    seed: int = 0
    epoch: int = 0

    def __call__(self, image: np.ndarray, index: int) -> np.ndarray:
        """uint8 H W 3 -> uint8 3 H W; index: the image's place in its split."""
        if self.random is not None:
            spec = dataclasses.replace(self.random, size=self.size)
            return crop_resize(image, draw_view(rng(self.seed, PROBE, self.epoch, index), spec), spec)
        if not self.squash:
            return resize_center_crop(image, self.size, self.crop_pct, self.interpolation)
        height, width = self.size
        squashed = Image.fromarray(image).resize((width, height), INTERPOLATIONS[self.interpolation])
        return np.ascontiguousarray(np.asarray(squashed).transpose(2, 0, 1))


@dataclass(frozen=True)
class ForwardOptions:
    """How a pass over images is cut and guarded; of these, precision alone touches the numbers."""

    batch_size: int = 256  # images a process and forward pass
    workers: int = 0
    precision: str = "fp32"
    timeout: int = 300  # seconds that a loader worker may take for one batch


def options_within(train: "TrainConfig", data: "DataConfig", precision: str = "fp32") -> ForwardOptions:
    """Those of a pass inside a run: where a step fits, twice its images fit without gradients."""
    return ForwardOptions(min(256, 2 * train.batch_size), data.workers, precision, data.timeout)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and not compiled: a graph a batch size costs more than it saves; each mode back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def gather_rows(rows: Tensor, n: int, accelerator: "Accelerator", chunk: int = 16_384) -> Tensor:
    """The rows of all processes, joined in order, on the CPU and on every process.

    rows: those of this process, every world-th of `n` from its rank on, on the CPU. They travel in slices of `chunk`
    rows in all, so that what lies on a device does not grow with the number of processes.
    """
    world = accelerator.num_processes
    if world == 1:
        return rows
    most = -(-n // world)
    padded = torch.zeros(most, *rows.shape[1:], dtype=rows.dtype)
    padded[: len(rows)] = rows
    out = torch.empty(most, world, *rows.shape[1:], dtype=rows.dtype)
    chunk = max(1, chunk // world)
    for start in range(0, most, chunk):
        part = padded[start : start + chunk].to(accelerator.device)
        joined = accelerator.gather(part).reshape(world, *part.shape)  # world m ...
        out[start : start + chunk] = joined.transpose(0, 1).cpu()
    return out.flatten(0, 1)[:n]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} given, an evaluation takes {' or '.join(PRECISIONS)}")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@dataclass
class Outputs:
    """What `forward_all` returns: one row an image asked for, undecodable ones included with ok False."""

    x: dict[str, Tensor]
    y: Tensor
    ok: Tensor


def forward_all(
    model: "Backbone",
    call: Any,
    images: "Images",
    indices: np.ndarray,
    accelerator: "Accelerator",
    crop: Crop,
    options: ForwardOptions,
) -> Outputs:
    """call(x) -> {name: B D} over every image of `indices` exactly once; float32 on the CPU, everywhere.

    A process takes every world-th index and results are joined in index order. x is normalised by
    model.mean and model.std. Raises UserError when no image could be decoded, or an output is not finite.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if not len(indices):
        raise UserError("no images to evaluate: the split is empty")
    device, done = accelerator.device, 0
    mine = indices[accelerator.process_index :: accelerator.num_processes]
    rows: dict[str, np.ndarray] = {}
    labels, good = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.bool)]
    loader = eval_loader(images, mine, crop.size, crop, options.batch_size, options.workers, options.timeout)
    with frozen(model), autocast(device, options.precision), loader:
        if not len(mine):  # a process without images still knows the shapes
            probe = torch.zeros(1, 3, *crop.size, device=device)
            rows = {name: out[:0].float().cpu().numpy() for name, out in call(probe).items()}
        for batch in loader:
            x = batch["image"].to(device, non_blocking=True).float().div_(255)
            for name, out in call(normalize(x, model.mean, model.std)).items():
                if name not in rows:  # once in memory: those of a large set are gigabytes
                    rows[name] = np.empty((len(mine), *out.shape[1:]), np.float32)
                rows[name][done : done + len(out)] = out.float().cpu().numpy()
            done += len(x)
            labels.append(batch["label"])
            good.append(batch["ok"])

    joined = partial(gather_rows, n=len(indices), accelerator=accelerator)
    found = {name: joined(torch.from_numpy(rows.pop(name))) for name in list(rows)}
    out = Outputs(found, joined(torch.cat(labels)), joined(torch.cat(good)))
    if not out.ok.any():
        raise UserError(f"{images.name}: none of the {len(indices)} images could be decoded; see data.path")
    for name, x in out.x.items():
        wild = int((~x.isfinite()).flatten(1).any(1)[out.ok].sum())
        if wild:
            raise NotFinite(
                f"{images.name}: the backbone's outputs ({name}) are not finite for {wild} of {len(indices)} images; "
                f"its training diverged or its weights are damaged (precision={options.precision})"
            )
    return out


def count_bad(out: Outputs, images: "Images", indices: np.ndarray, quiet: bool = False) -> int:
    """How many of images[indices], which gave `out`, could not be decoded, told in one line with the first of them."""
    n_bad = int((~out.ok).sum())
    if n_bad and not quiet:
        first = images.where(int(indices[int((~out.ok).nonzero()[0])]))
        say(f"{images.name}: {n_bad} of {len(out.ok)} images cannot be decoded and are left out, the first {first}")
    return n_bad


def extract(
    backbone: "Backbone",
    images: "Images",
    indices: np.ndarray,
    accelerator: "Accelerator",
    crop: Crop | None = None,
    options: ForwardOptions = ForwardOptions(),  # noqa: B008  (frozen)
    kinds: tuple[str, ...] = ("last",),
    quiet: bool = False,
) -> Features:
    """Pooled features of images[indices]; crop None: the backbone's own size, crop and interpolation.

    Undecodable images are left out, counted and told in one line. The backbone keeps its mode and every bit.
    """
    if crop is None:
        crop = Crop(backbone.img_size, backbone.crop_pct, backbone.interpolation)

    def call(x: Tensor) -> dict[str, Tensor]:
        pooled = backbone.pooled(x)
        missing = [kind for kind in kinds if kind not in pooled]
        if missing:
            raise UserError(f"features: {', '.join(missing)} asked, this backbone has {', '.join(pooled)}")
        return {kind: pooled[kind] for kind in kinds}

    out = forward_all(backbone, call, images, indices, accelerator, crop, options)
    ok, n_bad = out.ok, count_bad(out, images, indices, quiet)
    index = torch.as_tensor(np.asarray(indices, dtype=np.int64))
    if not n_bad:
        return Features(out.x, out.y, index, 0)
    return Features({kind: x[ok] for kind, x in out.x.items()}, out.y[ok], index[ok], n_bad)
