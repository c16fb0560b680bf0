"""What an evaluation costs beside the peers': exact kNN, the grid of linear heads, features.

    python -m scripts.bench_eval [--bank 256000] [--queries 1000] [--images 8192] [--rounds 3]

kNN: our exact search (fp32 candidates, checked in float64) beside FAISS's flat index and plain torch, on clustered
random features of 512 numbers; told as core-hours of the whole of ImageNet-1K (1,281,167 x 50,000), which grow with
bank x queries (`auto` takes the faster backend, by a trial on a slice). Heads: an epoch of five of the
whole grid of gcssl.eval.linear_probe for 100 classes beside a loop over its heads, each a torch.nn.Linear under
torch.optim.SGD; features are standardised once, in either way. Features: images/s of gcvit_xxtiny at 224 px, and what
a grid of settings on every kind of features and one head add to them, at 100 epochs for the ImageNet-1K train set.
Fine-tuning: its step (1,000 classes, moving average of the weights) beside SimMIM's pretraining step of the same
backbone and batch. One thread, seconds of this process's CPU (of the wall on a GPU); the ways alternate.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from gcssl.config import AugmentConfig
from gcssl.eval.features import KINDS
from gcssl.eval.finetune import Classifier, FinetuneOptions
from gcssl.eval.knn import search
from gcssl.eval.linear_probe import MOMENTUM, LinearProbeConfig, Plan, Setting, train_heads
from gcssl.models.build import build_backbone
from gcssl.runtime import entry, keep_freed_memory
from gcssl.ssl.base import Setup
from gcssl.ssl.simmim import SimMIM, SimMIMConfig
from scripts.timing import Step, alternate, device, markdown, ratios, write

IMAGENET_TRAIN, IMAGENET_VAL = 1_281_167, 50_000
DIM, CLASSES, K, EPOCHS = 512, 100, 20, 5


def clustered(n: int, seed: int) -> Tensor:
    """n unit vectors around 1,000 centres: kNN features have neighbours."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, DIM, generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(0, 1000, (n,), generator=generator)
    return normalize(centres[chosen] + 1.5 * torch.randn(n, DIM, generator=generator), dim=1).to(device())


def knn_steps(n_bank: int, n_queries: int) -> dict[str, Step]:
    import faiss

    bank, queries = clustered(n_bank, 1), clustered(n_queries, 2)
    index = faiss.IndexFlatIP(DIM)
    index.add(bank.cpu().numpy())
    return {
        "FAISS IndexFlatIP": lambda: index.search(queries.cpu().numpy(), K),
        "torch, matmul and topk": lambda: [(part @ bank.T).topk(K, dim=1) for part in queries.split(256)],
        "gcssl, backend faiss": lambda: search(bank, queries, K, "faiss"),
        "gcssl, backend torch": lambda: search(bank, queries, K, "torch"),
    }


@dataclass
class Heads:
    """Features of n images and the settings of a grid of 12, for one kind of features."""

    x: Tensor
    y: Tensor
    settings: list[Setting]

    def grid(self, settings: list[Setting]) -> None:
        rows = torch.arange(len(self.y), device=self.y.device)
        train_heads({"last": self.x}, self.y, rows, settings, CLASSES, Plan(EPOCHS, 1024, 0), self.x.device)

    def loop(self) -> None:
        """What a user of plain PyTorch writes: features standardised once, then a head at a time."""
        standard = (self.x - self.x.mean(0)) / self.x.std(0)
        for setting in self.settings:
            head = nn.Linear(DIM, CLASSES, device=self.x.device)
            sgd = torch.optim.SGD(head.parameters(), setting.lr, MOMENTUM, weight_decay=setting.weight_decay)
            for x, y in EPOCHS * list(zip(standard.split(1024), self.y.split(1024), strict=True)):
                cross_entropy(head(x), y).backward()
                sgd.step()
                sgd.zero_grad()


def heads(n: int) -> Heads:
    cfg = LinearProbeConfig()
    settings = [Setting("last", lr, decay) for lr in cfg.lrs for decay in cfg.weight_decays]
    y = torch.randint(0, CLASSES, (n,), generator=torch.Generator().manual_seed(3)).to(device())
    return Heads(clustered(n, 4), y, settings)


def feature_step(batch: int) -> Step:
    model = build_backbone("gcvit_xxtiny", img_size=224).eval().to(device())
    x = torch.randn(batch, 3, 224, 224, device=device())

    def run() -> object:
        with torch.inference_mode():
            return model(x)

    return run


def training_steps(batch: int) -> dict[str, Step]:
    """Forward, backward and what follows a step, without the optimizer, which both have."""
    x, side = torch.randn(batch, 3, 224, 224, device=device()), 224 // 32
    masks = torch.rand(batch, side, side, device=device()).argsort(-1) < round(0.6 * side)  # 4 of each row hidden
    student, tuned = (build_backbone("gcvit_xxtiny", 224, classes) for classes in (0, 1000))
    objectives: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "SimMIM's pretraining": (
            SimMIM(SimMIMConfig(mask_unit=32), student, Setup(AugmentConfig(), (224, 224), 1, 1)),
            {"views": [x], "masks": [masks]},
        ),
        "fine-tuning": (
            Classifier(tuned, FinetuneOptions()),
            {"image": x, "target": torch.arange(batch, device=device())},
        ),
    }

    def step(objective: Any, given: dict[str, Any]) -> Step:
        objective.to(device()).train()

        def run() -> None:
            objective(given, 0)["loss"].backward()
            objective.after_step(0)
            objective.zero_grad()

        return run

    return {name: step(*both) for name, both in objectives.items()}


def rows_of(base: str, times: dict[str, list[float]], unit: str, scale: float) -> list[dict[str, Any]]:
    return [
        {"way": way, "seconds": statistics.median(own), "told": scale * statistics.median(own), "unit": unit,
         **ratios(times[base], own)}
        for way, own in times.items()
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench_eval", description=__doc__.split("\n")[0])
    parser.add_argument("--bank", type=int, default=256_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--images", type=int, default=8192, help="images of the heads' epoch, a multiple of 1024")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a json file for the rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    pairs = IMAGENET_TRAIN * IMAGENET_VAL / (args.bank * args.queries)
    knn = alternate(knn_steps(args.bank, args.queries), args.rounds, warm=1)
    rows = rows_of("FAISS IndexFlatIP", knn, "core-hours of ImageNet-1K", pairs / 3600)

    work = heads(args.images)
    probe: dict[str, Step] = {
        "a loop over 12 heads": work.loop,
        "gcssl, the grid of 12": lambda: work.grid(work.settings),
        "gcssl, one head": lambda: work.grid(work.settings[:1]),
    }
    epoch = alternate(probe, args.rounds, warm=1)
    rows += rows_of("a loop over 12 heads", epoch, "s an epoch", 1 / EPOCHS)

    forward = statistics.median(alternate({"": feature_step(args.batch)}, args.rounds, warm=1)[""]) / args.batch
    of_100 = 100 / EPOCHS / args.images  # seconds -> those of 100 epochs an image
    cost = {name: of_100 * statistics.median(epoch[name]) for name in probe}
    whole = {name: IMAGENET_TRAIN * (forward + kinds * cost[name]) / 3600 for name, kinds in
             (("gcssl, one head", 1), ("gcssl, the grid of 12", len(KINDS)))}  # fmt: skip
    training = alternate(training_steps(args.batch), args.rounds, warm=1)
    rows += rows_of("SimMIM's pretraining", training, "s an image", 1 / args.batch)
    columns = {"way": "{way}", "seconds": "{seconds:.3f}", "": "{told:.2f} {unit}"}
    columns["ratio to the first (min-max)"] = "{speedup:.2f} ({speedup_min:.2f}-{speedup_max:.2f})"
    sys.stdout.write(f"bank {args.bank}, {args.queries} queries, {args.images} images, {device()}\n")
    sys.stdout.write(f"{markdown(rows[:4], columns)}\n{markdown(rows[4:7], columns)}\n{markdown(rows[7:], columns)}\n")
    one, grid = whole["gcssl, one head"], whole["gcssl, the grid of 12"]
    sys.stdout.write(
        f"features of gcvit_xxtiny, 224 px: {1 / forward:.1f} images/s; ImageNet-1K with one head of 100 epochs"
        f" {one:.1f} hours, with the grid on all {len(KINDS)} kinds of features {grid:.1f}: {grid / one:.2f} times\n"
    )
    write(args.out, {**vars(args), "features_per_s": 1 / forward}, rows)


if __name__ == "__main__":
    entry(main)
