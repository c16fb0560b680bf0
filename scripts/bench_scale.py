"""What a training step costs by image side, batch, depth, prototypes, crops, objective, checkpointing, two processes.

    python -m scripts.bench_scale [--parts growth objectives checkpointing processes] [--rounds 3] [--plot FILE.png]

objectives: forward and backward of each one's nano recipe with the settings of scripts/learning.py, beside SimMIM's.
growth: forward and backward of a whole objective per image, one thing grown at a time from a base. checkpointing: the
backbone's forward and backward at 224 px, with model.grad_checkpointing and without. Both in CPU seconds of one thread
(wall seconds on a GPU), beside MiB that autograd keeps (each storage once, parameters left out). processes: images/s of
the real program on two gloo processes of one thread each over twice that of one, at equal batch a process.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gcssl.config import PretrainConfig, config_dict, load_config, to_yaml
from gcssl.dryrun import DoctorConfig, examine
from gcssl.models.build import build_backbone
from gcssl.plan import saved_mib
from gcssl.runtime import entry, keep_freed_memory
from gcssl.ssl.objectives import SCHEMAS
from scripts.learning import SETTINGS
from scripts.timing import Step, alternate, device, markdown, ratios, write

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["data.shapes_n=64", "data.workers=0", "doctor.scan=1", "eval.online_every=0", "train.batch_size=32"]
WINDOWS = "model.window_ratio=[32,32,16,32]"
# what grows: (objective, what stays, key, values); batch is a key of its own
GROWTH: dict[str, tuple[str, list[str], str, list[Any]]] = {
    "image side": ("simmim", [WINDOWS, "objective.mask_unit=32"], "model.img_size", [64, 96, 128, 160, 192, 224]),
    "batch": ("simmim", [], "batch", [1, 2, 4, 8, 16, 32]),
    "variant": ("simmim", ["model.img_size=128", "objective.mask_unit=32"], "model.name",
                ["gcvit_nano", "gcvit_xxtiny", "gcvit_xtiny", "gcvit_tiny", "gcvit_small"]),
    "prototypes": ("dino", [], "objective.out_dim", [256, 1024, 4096, 16384, 65536]),
    "small crops": ("dino", [], "objective.local_crops", [0, 2, 4, 8, 12]),
}  # fmt: skip
BATCH = 8


def objective_step(objective: str, keys: list[str], batch: int) -> tuple[Step, torch.nn.Module]:
    """Forward and backward on `batch` generated images, and the objective."""
    yaml = ROOT / f"configs/pretrain/{objective}_gcvit_nano.yaml"
    with contextlib.redirect_stdout(sys.stderr):  # what it tells of its mask is no part of the table
        dry = examine(load_config(DoctorConfig, [str(yaml), *SMALL, *keys], SCHEMAS))
    model, images = dry.objective.to(device()).train(), dry.batch(batch)
    images["views"] = [view.to(device()) for view in images["views"]]
    images["masks"] = [mask if mask is None else mask.to(device()) for mask in images["masks"]]

    def run() -> None:
        model.zero_grad()
        model(images, 0)["loss"].backward()

    return run, model


def growth(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for what, (objective, keys, key, values) in GROWTH.items():
        steps, kept, batches = {}, {}, {}
        for value in values:
            batches[value] = value if key == "batch" else BATCH
            own = keys if key == "batch" else [*keys, f"{key}={value}"]
            steps[value], model = objective_step(objective, own, batches[value])
            kept[value] = saved_mib(steps[value], model.parameters()) / batches[value]
        for value, times in alternate(steps, rounds, warm=1).items():
            seconds = statistics.median(times) / batches[value]
            rows.append(
                {"what": what, "objective": objective, "value": value, "ms": 1000 * seconds, "mib": kept[value]}
            )
    return rows


def objectives(rounds: int, batch: int = 32) -> list[dict[str, Any]]:
    steps, kept = {}, {}
    for name, keys in SETTINGS.items():
        steps[name], model = objective_step(name, keys, batch)
        kept[name] = saved_mib(steps[name], model.parameters()) / batch
    times = alternate(steps, rounds, warm=1)
    return [
        {"objective": name, "rate": batch / statistics.median(own), "mib": kept[name], **ratios(times["simmim"], own)}
        for name, own in times.items()
    ]


def checkpointing(rounds: int, batch: int = 2) -> list[dict[str, Any]]:
    rows = []
    x = torch.randn(batch, 3, 224, 224, device=device())
    for variant in ("gcvit_tiny", "gcvit_base", "gcvit_large"):
        model = build_backbone(variant, img_size=224).train().to(device())

        def step(on: bool, model: Any = model) -> None:
            model.set_grad_checkpointing(on)
            model.zero_grad()
            model(x).square().mean().backward()

        mib = {on: saved_mib(lambda on=on: step(on), model.parameters()) / batch for on in (False, True)}
        times = alternate({on: (lambda on=on: step(on)) for on in (False, True)}, rounds, warm=1)
        rows += [
            {"variant": variant, "checkpointing": on, "seconds": statistics.median(own) / batch, "mib": mib[on],
             "share": mib[on] / mib[False], **ratios(times[False], own)}
            for on, own in times.items()
        ]  # fmt: skip
    return rows


def processes(rounds: int, steps: int = 40, batch: int = 32) -> list[dict[str, Any]]:
    """The real program, by torchrun, on one and on two processes in turn."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    keys = [f"train.batch_size={batch}", f"train.steps={steps}", "data.shapes_n=1000", "data.workers=0", "log.every=1"]
    yaml = str(ROOT / "configs/pretrain/joint_gcvit_nano.yaml")
    for _ in range(rounds):
        for world in rates:
            with tempfile.TemporaryDirectory() as folder:
                cfg = load_config(PretrainConfig, [yaml, *keys, "eval.online_every=0", f"out={folder}/run"], SCHEMAS)
                (Path(folder) / "x.yaml").write_text(to_yaml(config_dict(cfg)))
                argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
                argv += ["-m", "gcssl.pretrain", f"{folder}/x.yaml"]
                env = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(argv, env=env, check=True, capture_output=True, cwd=ROOT)
                lines = map(json.loads, (Path(folder) / "run/metrics.jsonl").read_text().splitlines())
                rates[world].append(statistics.median([one["images_per_s"] for one in lines][steps // 4 :]))
    shares = {world: [a / b / world for a, b in zip(own, rates[1], strict=True)] for world, own in rates.items()}
    return [
        {"processes": world, "rate": statistics.median(rates[world]), "efficiency": statistics.median(own),
         "low": min(own), "high": max(own)}
        for world, own in shares.items()
    ]  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(GROWTH), 6), layout="constrained")
    axes = figure.subplots(2, len(GROWTH))
    for column, (what, (objective, _, key, _)) in enumerate(GROWTH.items()):
        own = [row for row in rows if row["what"] == what]
        names = [str(row["value"]).removeprefix("gcvit_") for row in own]
        for row, (number, told) in enumerate((("ms", "ms an image"), ("mib", "MiB kept an image"))):
            axes[row, column].bar(names, [one[number] for one in own], color=("tab:blue", "tab:orange")[row])
            axes[row, column].set(xlabel=f"{what} ({key})", ylabel=told, title=objective if row == 0 else "")
            axes[row, column].grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=80)


COLUMNS = {
    "growth": {"what": "{what}", "objective": "{objective}", "value": "{value}", "ms an image": "{ms:.1f}",
               "MiB kept an image": "{mib:.1f}"},
    "objectives": {"objective": "{objective}", "images/s": "{rate:.0f}",
                   "speed (min-max)": "{speedup:.2f} ({speedup_min:.2f}-{speedup_max:.2f})",
                   "MiB kept an image": "{mib:.1f}"},
    "checkpointing": {"variant": "{variant}", "checkpointing": "{checkpointing}", "s an image": "{seconds:.2f}",
                      "speed (min-max)": "{speedup:.2f} ({speedup_min:.2f}-{speedup_max:.2f})",
                      "MiB kept an image": "{mib:.0f}", "share": "{share:.2f}"},
    "processes": {"processes": "{processes}", "images/s": "{rate:.1f}",
                  "efficiency (min-max)": "{efficiency:.2f} ({low:.2f}-{high:.2f})"},
}  # fmt: skip
PARTS = {"growth": growth, "objectives": objectives, "checkpointing": checkpointing, "processes": processes}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench_scale", description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="a picture of the growth (needs matplotlib)")
    parser.add_argument("--out", type=Path, help="a json file for the rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    found = {}
    for part in args.parts:
        found[part] = PARTS[part](args.rounds)
        sys.stdout.write(f"\n{part}, {device()}, {args.rounds} rounds\n\n{markdown(found[part], COLUMNS[part])}")
        sys.stdout.flush()
    if args.plot and "growth" in found:
        plot(found["growth"], args.plot)
    write(args.out, vars(args), [{"part": part, **row} for part, rows in found.items() for row in rows])


if __name__ == "__main__":
    entry(main)
