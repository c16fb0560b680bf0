"""Top-1 and top-5 of a classifier as it is: its own head, input size, crop, interpolation and normalisation.

`accelerate launch -m gcssl.eval.validate backbone=<fine-tuned run, timm or NVlabs checkpoint> data.path=...`
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gcssl.errors import UserError
from gcssl.eval.features import ForwardOptions, count_bad, forward_all
from gcssl.eval.inputs import InputConfig, Inputs, evaluate, program
from gcssl.eval.metrics import best, hits, percent
from gcssl.models.load import FRESH

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_classes(inputs: Inputs) -> None:
    """UserError where there is no head, or its classes are not those of the data."""
    info, spec = inputs.info, inputs.spec
    outputs = int(info.get("num_classes") or getattr(inputs.backbone, "num_classes", 0) or 0)
    if not outputs:
        raise UserError(f"{spec}: has no classification head; validate needs a fine-tuned or supervised checkpoint")
    ours, theirs = info.get("class_names"), inputs.test.classes
    if ours and theirs and list(ours) != list(theirs):
        wrong = next(
            (
                f"{i} is {a!r} in the model and {b!r} in the data"
                for i, (a, b) in enumerate(zip(ours, theirs, strict=False))
                if a != b
            ),
            f"{len(ours)} in the model, {len(theirs)} in the data",
        )
        raise UserError(f"{spec}: its classes are not those of {inputs.cfg.data.path} (class {wrong})")
    if outputs != inputs.n_classes:
        raise UserError(f"{spec}: its head has {outputs} classes, {inputs.cfg.data.path} has {inputs.n_classes}")


def classify(logits: Callable[[Tensor], dict[str, Tensor]], inputs: Inputs, options: ForwardOptions) -> dict[str, Any]:
    """What classifiers get right of inputs.test, each image once: logits(x) is {name: B C}.

    Returns "hits" {name: {1: bool M, 5: bool M}} of the M images that could be decoded, their "index" M, and "notes".
    """
    images = inputs.test
    indices = np.arange(len(images))

    def call(x: Tensor) -> dict[str, Tensor]:
        return {name: best(scores) for name, scores in logits(x).items()}

    out = forward_all(inputs.backbone, call, images, indices, inputs.accelerator, inputs.crop, options)
    notes = {"n_test": int(out.ok.sum()), "n_bad": count_bad(out, images, indices)}
    right = {name: hits(top[out.ok], out.y[out.ok]) for name, top in out.x.items()}
    return {"hits": right, "index": torch.from_numpy(indices)[out.ok], "notes": notes}


def judge(inputs: Inputs, _cfg: InputConfig) -> dict[str, Any]:
    """Validation of one classifier."""
    check_classes(inputs)
    found = classify(lambda x: {"own": inputs.backbone(x)}, inputs, inputs.options)
    right = found["hits"]["own"]
    return {
        "metrics": {"validate/top1": percent(right[1]), "validate/top5": percent(right[5])},
        "notes": {"protocol": "own head", "features": "logits", **found["notes"]},
        "paired": "validate/top1",
        "correct": right[1],
        "index": found["index"],
    }


def run(cfg: InputConfig, accelerator: "Accelerator") -> dict[str, Any]:
    """Validates cfg.backbone (and cfg.compare), writes validate.json and returns what it holds."""
    for spec in (cfg.backbone, cfg.compare):
        if spec in FRESH:
            raise UserError(f"validate: {spec} has no trained head; pass a fine-tuned, timm or NVlabs checkpoint")
    return evaluate("validate", cfg, accelerator, judge, only_test=True)


def main(argv: list[str]) -> None:
    program(InputConfig, run, argv)


if __name__ == "__main__":
    from gcssl.runtime import entry

    entry(main)
