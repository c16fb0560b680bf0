"""Two results on the same test images side by side, with McNemar's paired test.

python -m gcssl.eval.compare runs/a/eval/finetune.json runs/supervised/finetune.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from gcssl.config import HELP
from gcssl.errors import UserError, one_line
from gcssl.eval.metrics import mcnemar
from gcssl.eval.results import table, unpacked
from gcssl.log import say
from gcssl.runtime import entry


def compare(first: Path, second: Path) -> dict[str, float | int]:
    """Top-1 in percent of both result files and McNemar's test of their difference; UserError unless both are of
    the same test images."""
    a, b = read(first), read(second)
    if first.resolve() == second.resolve():
        raise UserError(f"{second}: given twice; expected the results of two evaluations")
    if a["test_fingerprint"] != b["test_fingerprint"]:
        raise UserError(f"{second}: judged on other images ({b['test_split']}) than {first} ({a['test_split']})")
    metric, other = a["correct"]["metric"], b["correct"]["metric"]
    if metric != other:
        raise UserError(f"{second}: {other} cannot be paired with {metric} of {first}")
    pair = mcnemar(a["right"], b["right"])  # an image that one could not decode is wrong there
    for path, result in ((first, a), (second, b)):
        if bad := result.get("n_bad"):
            say(f"{path}: {bad} images could not be decoded: its top-1 leaves them out, the test counts them as wrong")
    return {"a": a[metric], "b": b[metric], **pair}


def read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(f"{path}: a folder; expected a result of an evaluation, such as {path}/eval/knn.json")
    if not path.exists():
        raise UserError(f"{path}: no such file; expected a result of an evaluation, such as <run>/eval/knn.json")
    try:
        result = json.loads(path.read_text())
        if {"correct", "test_split", "test_fingerprint"} <= result.keys():
            return {**result, "right": unpacked(result["correct"])}
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        told = "expected json that an evaluation wrote, such as <run>/eval/knn.json"
        raise UserError(f"{path}: no result of an evaluation ({one_line(error)}); {told}") from None
    raise UserError(f"{path}: does not say which images were right; evaluate again with this version")


def main(argv: list[str]) -> None:
    if HELP & set(argv):
        sys.stdout.write((__doc__ or "").strip() + "\n")
        return
    if len(argv) != 2:
        raise UserError(f"given {len(argv)} files, expected two results: <run>/eval/<task>.json of each")
    first, second = Path(argv[0]), Path(argv[1])
    found = compare(first, second)
    rows: list[list[object]] = [
        ["", "top-1", "only this one right"],
        [first, found["a"], found["only_a"]],
        [second, found["b"], found["only_b"]],
    ]
    sys.stdout.write("\n".join(table(rows)) + f"\nMcNemar's exact test: p = {found['p']:.2g}\n")


if __name__ == "__main__":
    entry(main)
