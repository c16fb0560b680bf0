"""What the benchmarks share: steps timed in turn, medians of ratios, and the machine they ran on."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from gcssl.runfolder import provenance

Step = Callable[[], object]
Key = TypeVar("Key")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> str:
    """The GPU's name, else the processor's and its cores."""
    found = provenance()["hardware"]
    return found["gpus"][0] if found["gpus"] else f"{found['processor']} {found['cpus']} cores"


def seconds(step: Step, times: int = 1) -> float:
    """Seconds a call: of the wall on a GPU, waited for; else of this process's CPU, so that a load matters less."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    for _ in range(times):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / times


def alternate(steps: dict[Key, Step], rounds: int, times: int = 1, warm: int = 2) -> dict[Key, list[float]]:
    """Seconds a call of each step, one measurement a round, in turn, so that a load falls on all of them."""
    for step in steps.values():
        for _ in range(warm):
            step()
    found: dict[Key, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(seconds(step, times))
    return found


def ratios(base: list[float], own: list[float]) -> dict[str, float]:
    """How many times as fast as `base`, round by round: median, smallest, largest."""
    gains = [a / b for a, b in zip(base, own, strict=True)]
    return {"speedup": statistics.median(gains), "speedup_min": min(gains), "speedup_max": max(gains)}


def peak_mib(step: Step) -> float:
    """GPU memory that a call takes above what lies there before it; NaN on a CPU."""
    if not torch.cuda.is_available():
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def markdown(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A table of `columns`: heading -> format of a row, such as "{speedup:.2f}"."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(form.format(**row) for form in columns.values())} |" for row in rows]
    return "\n".join(lines) + "\n"


def write(path: Path | None, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The rows with all that is needed to repeat them."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in settings.items() if key != "out"}
        path.write_text(json.dumps({**provenance(), "settings": settings, "rows": rows}, indent=1, default=str) + "\n")
