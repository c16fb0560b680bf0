"""Linear probe: a grid of linear classifiers on frozen features, trained at once, judged once on test.

`accelerate launch -m gcssl.eval.linear_probe backbone=runs/a [protocol=augmented] [key=value ...]`

`cached` computes the features of the evaluation crop once; `augmented` those of a new random crop and flip in
every epoch (what published figures use). Features are standardised without learned scale
(arXiv:2111.06377, appendix A.1). The setting is chosen on the held-out slice of train, the head is then one
trained on all of train with that setting, and the test split is read once.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gcssl.augment import ViewSpec
from gcssl.errors import UserError
from gcssl.eval.features import GRID_KINDS, KINDS, Features
from gcssl.eval.inputs import InputConfig, Inputs, evaluate, hold_out, program
from gcssl.eval.metrics import best, hits, percent
from gcssl.loader import epoch_order
from gcssl.log import say
from gcssl.runfolder import broadcast

if TYPE_CHECKING:
    from accelerate import Accelerator

PROTOCOLS = ("cached", "augmented")
EPOCHS = {"cached": 100, "augmented": 90}
MOMENTUM = 0.9
LR_BASE = 256  # the lr of the grid is for this batch


@dataclass
class LinearProbeConfig(InputConfig):
    protocol: str = field(default="cached", metadata={"choices": PROTOCOLS})
    epochs: int | None = None  # null: 100 cached, 90 augmented
    head_batch: int = 1024  # images a step of the heads, capped at the images there are
    lrs: list[float] = field(default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3])  # at a batch of 256
    weight_decays: list[float] = field(default_factory=lambda: [0.0, 1e-3])
    features: list[str] = field(default_factory=lambda: list(GRID_KINDS), metadata={"choices": KINDS})
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # augmented: crop area / image area


# ----------------------------------------------------------------------------------------------------- heads


@dataclass(frozen=True)
class Setting:
    features: str
    lr: float  # at a batch of 256
    weight_decay: float


class Standardise:
    """Batch norm without scale and shift, its statistics taken once over the features of the training images.

    The epsilon is relative (1e-6 of the mean variance), so that features times 100 give the same numbers.
    """

    def __init__(self, x: dict[str, Tensor], rows: Tensor) -> None:
        self.mean, self.std = {}, {}
        for kind, value in x.items():  # N D; in slices, since float64 copies of all features may not fit
            parts = rows.split(65_536)
            zero = torch.zeros(value.shape[1], dtype=torch.float64, device=value.device)
            mean = sum((value[part].double().sum(0) for part in parts), zero) / len(rows)  # D
            var = sum(((value[part].double() - mean).square().sum(0) for part in parts), zero) / len(rows)
            self.mean[kind] = mean.float()
            self.std[kind] = (var + 1e-6 * var.mean()).sqrt().clamp_min(1e-30).float()

    def __call__(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """{kind: B D} -> the same, on x's device."""
        return {
            kind: (value - self.mean[kind].to(value.device)).div_(self.std[kind].to(value.device))
            for kind, value in x.items()
        }


class HeadGrid:
    """G linear heads a kind of features, all trained by one batched step of SGD with momentum from zero.

    The gradient is written out: for softmax cross-entropy it is x^T (p - y) / B. Weight decay is SGD's (added
    to the gradient, weights only). A head whose lr is too high may become infinite, alone.
    """

    def __init__(self, dims: dict[str, int], n_classes: int, settings: Sequence[Setting], device: torch.device) -> None:
        self.device = device
        self.settings = {kind: [s for s in settings if s.features == kind] for kind in dims}
        self.weight, self.bias, self.lr, self.wd = {}, {}, {}, {}
        for kind, dim in dims.items():
            g = len(self.settings[kind])
            self.weight[kind] = torch.zeros(2, dim, g, n_classes, device=device)  # weights, their momentum
            self.bias[kind] = torch.zeros(2, g, n_classes, device=device)
            self.lr[kind] = torch.tensor([s.lr for s in self.settings[kind]], device=device)[:, None]
            self.wd[kind] = torch.tensor([s.weight_decay for s in self.settings[kind]], device=device)[:, None]

    def logits(self, kind: str, x: Tensor) -> Tensor:
        """x B D -> B G C."""
        return torch.einsum("bd,dgc->bgc", x, self.weight[kind][0]).add_(self.bias[kind][0])

    def step(self, x: dict[str, Tensor], y: Tensor, factor: float) -> None:
        """One update on a batch; x {kind: B D}, y B; factor scales every lr (batch rule and cosine)."""
        for kind, value in x.items():
            error = self.logits(kind, value).softmax(2)  # B G C
            error[torch.arange(len(y), device=y.device), :, y] -= 1
            weight, bias, rate = self.weight[kind], self.bias[kind], factor * self.lr[kind]
            weight[1].flatten(1).addmm_(value.T, error.flatten(1), beta=MOMENTUM, alpha=1 / len(y))
            weight[1].addcmul_(weight[0], self.wd[kind])
            bias[1].mul_(MOMENTUM).add_(error.sum(0), alpha=1 / len(y))
            weight[0].addcmul_(weight[1], rate, value=-1)
            bias[0].addcmul_(bias[1], rate, value=-1)

    def scores(self, x: dict[str, Tensor], y: Tensor, norm: Standardise) -> dict[Setting, tuple[float, float]]:
        """{setting: (top-1 in percent, -cross-entropy)} on x {kind: N D}, y N; -inf where not finite."""
        out, y = {}, y.to(self.device)
        for kind, settings in self.settings.items():
            right = loss = torch.zeros(len(settings), device=self.device)
            for rows, target in zip(x[kind].split(1024), y.split(1024), strict=True):  # all logits may be too many
                logits = self.logits(kind, norm({kind: rows.to(self.device)})[kind])  # B G C
                targets = target[:, None].expand(-1, len(settings))
                right = right + (logits.argmax(2) == targets).sum(0)
                loss = loss + cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(0)
            for setting, n_right, total in zip(settings, right.tolist(), loss.tolist(), strict=True):
                found = 100 * n_right / len(y), -total / len(y)
                out[setting] = found if math.isfinite(total) else (-math.inf, -math.inf)
        return out

    def head(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """Weight D C and bias C of one setting, on the CPU."""
        g = self.settings[setting.features].index(setting)
        return self.weight[setting.features][0][:, g].cpu(), self.bias[setting.features][0][g].cpu()


@dataclass(frozen=True)
class Plan:
    """How long and in which order heads are trained."""

    epochs: int
    batch: int  # images a step, capped at the images there are
    seed: int


@torch.no_grad()
def train_epoch(
    grid: HeadGrid, x: dict[str, Tensor], y: Tensor, rows: Tensor, norm: Standardise, plan: Plan, epoch: int
) -> None:
    """One epoch over x[rows], y[rows] ({kind: N D}, N, on any one device), ordered by (seed, epoch) alone."""
    size = min(plan.batch, len(rows))
    steps = len(rows) // size
    order = rows[torch.from_numpy(np.array(epoch_order(len(rows), plan.seed, epoch))).to(rows.device)]
    for step in range(steps):
        take = order[step * size : (step + 1) * size]
        done = (epoch * steps + step) / (plan.epochs * steps)
        factor = size / LR_BASE * 0.5 * (1 + math.cos(math.pi * done))
        batch = norm({kind: x[kind].index_select(0, take).to(grid.device) for kind in grid.settings})
        grid.step(batch, y[take].to(grid.device), factor)


def train_heads(
    x: dict[str, Tensor],
    y: Tensor,
    rows: Tensor,
    settings: Sequence[Setting],
    n_classes: int,
    plan: Plan,
    device: torch.device,
) -> tuple[HeadGrid, Standardise]:
    """A trained grid on the fixed features x[rows] ({kind: N D}), y[rows], and their standardisation."""
    grid = make_grid(x, settings, n_classes, device)
    norm = Standardise({kind: x[kind] for kind in grid.settings}, rows)
    for epoch in range(plan.epochs):
        train_epoch(grid, x, y, rows, norm, plan, epoch)
    return grid, norm


def make_grid(x: dict[str, Tensor], settings: Sequence[Setting], n_classes: int, device: torch.device) -> HeadGrid:
    kinds = list(dict.fromkeys(s.features for s in settings))
    return HeadGrid({kind: x[kind].shape[1] for kind in kinds}, n_classes, settings, device)


def choose(scores: dict[Setting, tuple[float, float]], n: int) -> Setting:
    """The lowest loss within one standard error of the best top-1 of n images; UserError when every head diverged.

    On a few hundred images the best of a grid is often the luckiest: by its loss the choice varies less.
    """
    best = max(top1 for top1, _ in scores.values())
    if best == -math.inf:
        raise UserError("every linear head diverged: pass smaller lrs=[...]")
    error = math.sqrt(best * (100 - best) / n)
    return max((s for s in scores if scores[s][0] >= best - error), key=lambda s: scores[s][1])


# ------------------------------------------------------------------------------------------------ protocols


@dataclass
class Probe:
    """What a protocol hands over: the chosen setting, how the held-out slice scored it, and its head."""

    setting: Setting
    held_top1: float  # percent
    weight: Tensor  # D C
    bias: Tensor  # C
    norm: Standardise
    n_train: int
    n_held: int
    seconds: float  # of head training

    def best(self, features: Features) -> Tensor:
        """The head's highest scores and their classes, N 2 5 on the CPU."""
        kind, parts = self.setting.features, features.x[self.setting.features].split(1024)
        return torch.cat([best(self.norm({kind: part})[kind] @ self.weight + self.bias) for part in parts])


def _place(features: Features, device: torch.device) -> torch.device:
    """Where features lie while heads train: on `device` where half of its free memory holds them, else on the CPU."""
    size = sum(x.numel() * 4 for x in features.x.values())
    fits = device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] / 2
    return device if fits else torch.device("cpu")


def _moved(features: Features, place: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    return {kind: x.to(place) for kind, x in features.x.items()}, features.y.to(place)


def _where(features: Features, wanted: np.ndarray) -> Tensor:
    """Rows whose image is among `wanted`."""
    return torch.from_numpy(np.isin(features.index.numpy(), wanted)).nonzero()[:, 0]


def _cached(inputs: Inputs, settings: list[Setting], plan: Plan, held: np.ndarray) -> Probe:
    """Features of the evaluation crop once; the grid on all but the held-out slice, then one head on all."""
    device, kinds = inputs.accelerator.device, tuple(dict.fromkeys(s.features for s in settings))
    train = inputs.features(inputs.train, kinds)
    begin = time.perf_counter()
    slice_rows, (x, y) = _where(train, held), _moved(train, _place(train, device))
    del train  # on a GPU x is a copy
    keep = torch.ones(len(y), dtype=torch.bool)
    keep[slice_rows] = False
    rows, slice_rows = keep.nonzero()[:, 0].to(y.device), slice_rows.to(y.device)
    grid, norm = train_heads(x, y, rows, settings, inputs.n_classes, plan, device)
    scores = grid.scores({kind: value[slice_rows] for kind, value in x.items()}, y[slice_rows], norm)
    setting = broadcast(choose(scores, len(slice_rows)))
    everything = torch.arange(len(y), device=y.device)
    grid, norm = train_heads(x, y, everything, [setting], inputs.n_classes, plan, device)
    seconds = time.perf_counter() - begin
    return Probe(setting, scores[setting][0], *grid.head(setting), _on_cpu(norm), len(y), len(slice_rows), seconds)


def _augmented(inputs: Inputs, settings: list[Setting], plan: Plan, held: np.ndarray, spec: ViewSpec) -> Probe:
    """Features of fresh crops in every epoch, for two grids at once: one that never sees the held-out slice,
    which chooses, and one on everything, whose head of the chosen setting is the result."""
    device, kinds = inputs.accelerator.device, tuple(dict.fromkeys(s.features for s in settings))
    grids: list[tuple[HeadGrid, Standardise]] = []
    place, rows = device, []
    seconds, told, begin = 0.0, time.perf_counter(), time.perf_counter()
    for epoch in range(plan.epochs):
        crops = inputs.features(inputs.train, kinds, random=spec, epoch=epoch)
        start = time.perf_counter()
        if epoch == 0:
            place = _place(crops, device)  # once: what an epoch frees, torch keeps, and it counts as taken
        x, y = _moved(crops, place)
        inside = torch.from_numpy(np.isin(crops.index.numpy(), held)).to(place)  # an image may fail in one epoch alone
        rows = [(~inside).nonzero()[:, 0], torch.arange(len(y), device=place)]
        if epoch == 0:
            grids = [(make_grid(x, settings, inputs.n_classes, device), Standardise(x, some)) for some in rows]
        for (grid, norm), some in zip(grids, rows, strict=True):
            train_epoch(grid, x, y, some, norm, plan, epoch)
        del crops, x  # before those of the next epoch take as much memory
        seconds += time.perf_counter() - start
        if time.perf_counter() - told > 30:
            told = time.perf_counter()
            left = (told - begin) / (epoch + 1) * (plan.epochs - epoch - 1)
            say(f"linear probe: epoch {epoch + 1} of {plan.epochs}, about {left / 60:.0f} min left")
    slice_ = inputs.features(inputs.train.select(np.sort(held)), kinds)
    scores = grids[0][0].scores(slice_.x, slice_.y, grids[0][1])
    setting = broadcast(choose(scores, len(slice_.y)))
    grid, norm = grids[1]
    return Probe(setting, scores[setting][0], *grid.head(setting), _on_cpu(norm), len(rows[1]), len(slice_.y), seconds)


def _on_cpu(norm: Standardise) -> Standardise:
    norm.mean = {kind: value.cpu() for kind, value in norm.mean.items()}
    norm.std = {kind: value.cpu() for kind, value in norm.std.items()}
    return norm


# -------------------------------------------------------------------------------------------------- program


def probe(inputs: Inputs, cfg: LinearProbeConfig) -> dict[str, Any]:
    """The linear probe of one backbone: "metrics", "notes", and "correct" and "index" of the test images."""
    epochs = cfg.epochs or EPOCHS[cfg.protocol]
    plan = Plan(epochs, cfg.head_batch, cfg.seed)
    kinds = [kind for kind in cfg.features if kind in inputs.kinds]
    if len(kinds) < len(cfg.features) and tuple(cfg.features) != GRID_KINDS:
        raise UserError(f"features: {', '.join(cfg.features)} asked, this backbone has {', '.join(inputs.kinds)}")
    settings = [Setting(kind, lr, wd) for kind in kinds for lr in cfg.lrs for wd in cfg.weight_decays]
    _, held = hold_out(inputs.train, "the probe chooses its setting on those: give more images, or use knn")
    if cfg.protocol == "cached":
        found = _cached(inputs, settings, plan, held)
    else:
        spec = ViewSpec(scale=(cfg.scale[0], cfg.scale[1]), interpolation=inputs.crop.interpolation)
        found = _augmented(inputs, settings, plan, held, spec)
    if len(cfg.lrs) > 1 and found.setting.lr in (min(cfg.lrs), max(cfg.lrs)):
        edge = f"lr {found.setting.lr:g} is at the edge of the grid"
        say(f"linear probe of {inputs.spec}: the chosen {edge}; lrs=[...] widens it")
    test = inputs.features(inputs.test, (found.setting.features,))  # the one time that the test split is read
    top = hits(found.best(test), test.y)
    chosen = {
        "features": found.setting.features,
        "lr": found.setting.lr,
        "weight_decay": found.setting.weight_decay,
    }
    notes = {
        "protocol": cfg.protocol,
        "features": found.setting.features,
        "chosen": {**chosen, "lr_base": LR_BASE, "held_out_top1": found.held_top1, "of": len(settings)},
        "epochs": epochs,
        "n_train": found.n_train,
        "n_held_out": found.n_held,
        "n_test": len(test.y),
        "n_bad": test.n_bad,
        "head_seconds": round(found.seconds, 2),
    }
    metrics = {"linear/top1": percent(top[1]), "linear/top5": percent(top[5])}
    paired = {"paired": "linear/top1", "correct": top[1], "index": test.index}
    return {"metrics": metrics, "notes": notes, **paired}


def run(cfg: LinearProbeConfig, accelerator: "Accelerator") -> dict[str, Any]:
    """Probes cfg.backbone (and cfg.compare), writes linear_probe.json and returns what it holds."""
    if cfg.protocol == "cached" and cfg.scale != LinearProbeConfig().scale:
        say(f"scale={cfg.scale}: of the crops of protocol=augmented, not used with protocol=cached")
    return evaluate("linear_probe", cfg, accelerator, probe)


def main(argv: list[str]) -> None:
    program(LinearProbeConfig, run, argv)


if __name__ == "__main__":
    from gcssl.runtime import entry

    entry(main)
