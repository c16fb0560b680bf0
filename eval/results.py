"""The result file of an evaluation: what it holds, when it may be replaced, how it is printed."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcssl.errors import UserError
from gcssl.eval.metrics import mcnemar
from gcssl.files import atomic_write
from gcssl.keys import flatten, show
from gcssl.log import say
from gcssl.runfolder import FREE_KEYS as FREE_OF_RUNS
from gcssl.runfolder import is_free, provenance

# What may differ between two evaluations that must give the same numbers: where, how fast, how named.
FREE_KEYS = ("name", "batch_size", "data.cache_dir", *(key for key in FREE_OF_RUNS if key != "compare"))


def comparison(spec: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The value of a result's key "compare"; ours and theirs as an evaluation's judge returns them.

    Both hold "metrics", "notes", and of the images counted "index" N and "correct" N bool (metric "paired").
    """
    out = {"backbone": spec, **theirs["metrics"], **theirs["notes"]}
    if torch.equal(ours["index"], theirs["index"]):
        out["mcnemar"] = {"metric": ours["paired"], **mcnemar(ours["correct"], theirs["correct"])}
    return out


def packed(judged: dict[str, Any], n: int) -> dict[str, Any]:
    """The value of a result's key "correct": which of the test split's n images were right, for gcssl.eval.compare.

    judged: as an evaluation's judge returns it. One bit an image, first image in the highest bit of the first byte,
    as hexadecimal digits; an image that could not be decoded counts as wrong.
    """
    correct = torch.zeros(n, dtype=torch.bool)
    correct[judged["index"]] = judged["correct"]
    return {"metric": judged["paired"], "n": n, "bits": np.packbits(correct.numpy()).tobytes().hex()}


def unpacked(correct: dict[str, Any]) -> Tensor:
    """The bool vector that `packed` wrote."""
    data = np.frombuffer(bytes.fromhex(correct["bits"]), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(data, count=correct["n"]).astype(bool))


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """A nested config as {dotted key: value}, without the keys that leave the numbers alone."""
    flat = {key: value for key, value in flatten(config).items() if not is_free(key, FREE_KEYS)}
    places = {key: flat[key].rstrip("/") for key in ("backbone", "compare") if isinstance(flat.get(key), str)}
    return flat | places


def check_result(path: Path, settings: dict[str, Any]) -> None:
    """UserError when `path` holds the result of other settings: call it before any work."""
    if not path.exists():
        return
    try:
        old = settings_of(json.loads(path.read_text())["settings"])  # a key may have become free since
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: exists and is no result of this version; move it away or pass name=") from None
    keys = [key for key in sorted({*old, *settings}) if old.get(key) != json.loads(json.dumps(settings.get(key)))]
    if old.get("compare") is None and "compare" in keys:
        keys.remove("compare")  # the same result with a second one beside it
    if keys:
        diff = ", ".join(f"{key}: {show(old.get(key))} there, {show(settings.get(key))} asked" for key in keys[:4])
        raise UserError(f"{path}: holds a result of other settings ({diff}); pass name=<word> to keep both")


def write_result(path: Path, result: dict[str, Any], settings: dict[str, Any]) -> None:
    """Writes one JSON object, whole or not at all, with what made it; other settings are refused, the same replace."""
    check_result(path, settings)
    if path.exists():
        old = json.loads(path.read_text())
        moved = [name for name in ("step", "test_fingerprint") if old.get(name) != result.get(name)]
        if moved:
            told = ", ".join(f"{name} {show(old.get(name))}" for name in moved)
            say(f"{path}: replaces a result of the same settings and other weights or images ({told})")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({**result, "settings": settings, "made_by": provenance()}, indent=1) + "\n")


def table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Aligned lines, first column left and the others right; floats with two decimals."""
    text = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    lines = []
    for row in text:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def result_table(result: dict[str, Any], label: str, other: str | None = None) -> list[str]:
    """The metrics of a result, beside those of its comparison where there is one."""
    metrics = [key for key, value in result.items() if "/" in key and isinstance(value, float)]
    if other is None or "compare" not in result:
        return table([["", label], *([key, result[key]] for key in metrics)])
    rows = [[key, result[key], result["compare"].get(key, math.nan)] for key in metrics]
    return table([["", label, other], *rows])
