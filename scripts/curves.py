"""A picture of runs' metrics.jsonl against their epochs, one line a run (needs matplotlib).

python -m scripts.curves runs/mocov3 runs/joint out=curves.png [metrics=loss,online_knn/top1@20]
"""

import json
import sys
from pathlib import Path

from gcssl.errors import UserError
from gcssl.runtime import entry

METRICS = "loss,online_knn/top1@20"


def read(run: Path, metric: str) -> tuple[list[float], list[float]]:
    """Epochs and values of a metric."""
    path = run / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run}: no metrics.jsonl there; expected a run folder")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    per_step = next((line["epoch"] / line["step"] for line in lines if line.get("epoch")), 0.0)
    points = [(line["step"] * per_step, line[metric]) for line in lines if metric in line]
    return [epoch for epoch, _ in points], [value for _, value in points]


def main(argv: list[str]) -> None:
    options = dict(word.split("=", 1) for word in argv if "=" in word)
    runs = [Path(word) for word in argv if "=" not in word]
    if not runs or not options.keys() <= {"out", "metrics"} or "out" not in options:
        raise UserError(f"given {' '.join(argv) or 'nothing'}, expected run folders and out=<file>.png")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing; pip install matplotlib") from None
    metrics = options.get("metrics", METRICS).split(",")
    figure = Figure(figsize=(5.5 * len(metrics), 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for run in runs:
            epochs, values = read(run, metric)
            axes.plot(epochs, values, marker="o" if len(epochs) < 50 else "", label=run.name)
        axes.set(xlabel="epoch", ylabel=metric)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(options["out"], dpi=100)
    sys.stdout.write(f"{options['out']}\n")


if __name__ == "__main__":
    entry(main)
