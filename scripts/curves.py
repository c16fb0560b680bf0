"""A picture of runs' metrics.jsonl, one line a run, against epochs or minutes of training (needs matplotlib).

python -m scripts.curves runs/mocov3 runs/joint out=curves.png [metrics=loss,online_knn/top1@20] [x=minutes]

Minutes are those of the steps: probes and checkpoints between them do not count.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gcssl.errors import UserError
from gcssl.runfolder import check_writable
from gcssl.runtime import entry

METRICS = ("loss", "online_knn/top1@20")  # where none are asked for: those that every run has


def epochs(lines: list[dict[str, Any]], run: Path) -> list[float]:  # noqa: ARG001
    """Of every line, that of an evaluation too."""
    per_step = next((line["epoch"] / line["step"] for line in lines if line.get("epoch")), 0.0)
    return [line["step"] * per_step for line in lines]


def minutes(lines: list[dict[str, Any]], run: Path) -> list[float]:
    """Of every line: what its steps, and all before them, took at the speed recorded."""
    if not (run / "env.json").exists():
        raise UserError(f"{run}: no env.json there, which tells the batch; x=epochs does without")
    batch = json.loads((run / "env.json").read_text())["facts"]["global_batch"]
    timed = [line for line in lines if line.get("images_per_s")]
    steps = np.array([0, *(line["step"] for line in timed)])
    spent = np.diff(steps) * batch / np.array([line["images_per_s"] for line in timed])
    return np.interp([line["step"] for line in lines], steps, [0, *(spent.cumsum() / 60)]).tolist()


AXES = {"epochs": epochs, "minutes": minutes}


def read(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run}: no metrics.jsonl there; expected a run folder")
    return [json.loads(line) for line in path.read_text().splitlines()]


def chosen(options: dict[str, str], runs: list[list[dict[str, Any]]]) -> list[str]:
    """The metrics asked for, else those of METRICS that every run has."""
    if "metrics" in options:
        return options["metrics"].split(",")
    return [metric for metric in METRICS if all(any(metric in line for line in lines) for lines in runs)]


def curve(run: Path, lines: list[dict[str, Any]], metric: str, x: str) -> tuple[list[float], list[float]]:
    """Places on the axis and values of a metric."""
    if not any(metric in line for line in lines):
        known = ", ".join(sorted({key for line in lines for key in line} - {"step", "time"}))
        raise UserError(f"{run}: no {metric} in its metrics; one of {known}")
    points = [(at, line[metric]) for at, line in zip(AXES[x](lines, run), lines, strict=True) if metric in line]
    return [at for at, _ in points], [value for _, value in points]


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & {*argv}:
        sys.stdout.write(str(__doc__))
        return
    options = dict(word.split("=", 1) for word in argv if "=" in word)
    runs = [Path(word) for word in argv if "=" not in word]
    x, out = options.get("x", "epochs"), Path(options.get("out", ""))
    if not runs or not options.keys() <= {"out", "metrics", "x"} or x not in AXES:
        expected = f"expected run folders, out=<file>.png, x={' or '.join(AXES)} and metrics=loss,..."
        raise UserError(f"given {' '.join(argv) or 'nothing'}, {expected}")
    if out.suffix != ".png":
        given = f"given {out}" if out.name else "not given"
        raise UserError(f"out: {given}, expected the name of a .png, written over if it is there")
    check_writable(str(out.parent))
    told = {run: read(run) for run in runs}
    metrics = chosen(options, list(told.values()))
    curves = {metric: [curve(run, lines, metric, x) for run, lines in told.items()] for metric in metrics}
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing; pip install matplotlib") from None
    figure = Figure(figsize=(5.5 * len(metrics), 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for run, (places, values) in zip(told, curves[metric], strict=True):
            axes.plot(places, values, marker="o" if len(places) < 50 else "", label=run.name)
        axes.set(xlabel=x, ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    entry(main)
