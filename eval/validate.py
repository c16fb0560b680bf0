"""Top-1 and top-5 of a classifier as it is: its own head, input size, crop, interpolation and normalisation.

`accelerate launch -m gcssl.eval.validate backbone=<fine-tuned run, timm or NVlabs checkpoint> data.path=...`
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gcssl.errors import UserError
from gcssl.eval.features import count_bad, forward_all
from gcssl.eval.inputs import FRESH, InputConfig, Inputs, evaluate, program
from gcssl.eval.metrics import percent, topk_correct

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


def judge(inputs: Inputs, _cfg: InputConfig) -> dict[str, Any]:
    """Validation of one classifier, each test image once."""
    check_classes(inputs)
    images = inputs.test
    indices = np.arange(len(images))
    out = forward_all(
        inputs.backbone,
        lambda x: {"logits": inputs.backbone(x)},
        images,
        indices,
        inputs.accelerator,
        inputs.crop,
        inputs.options,
    )
    n_bad = count_bad(out, images, indices)
    top = topk_correct(out.x["logits"][out.ok], out.y[out.ok], (1, 5))
    notes = {"protocol": "own head", "features": "logits", "n_test": int(out.ok.sum()), "n_bad": n_bad}
    return {
        "metrics": {"validate/top1": percent(top[1]), "validate/top5": percent(top[5])},
        "notes": notes,
        "paired": "validate/top1",
        "correct": top[1],
        "index": torch.arange(len(images))[out.ok],
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
