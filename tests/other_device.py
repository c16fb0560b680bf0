"""Run alone, as it registers a device for the whole process: a training step of each objective, and of fine-tuning, on
a device that is not the CPU and computes nothing.     python -m tests.other_device [simmim finetune ...]

Tensors there have a shape, a type and a device (torch's FakeTensorMode), so an operation that mixes devices raises, and
so does one that needs a value on the host, which would make a GPU wait. Prints a line for each that fails.
"""

import sys
import traceback
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from gcssl.config import AugmentConfig
from gcssl.eval.finetune import Classifier, FinetuneOptions
from gcssl.eval.linear_probe import HeadGrid, Plan, Setting, Standardise, train_epoch
from gcssl.loader import ViewMaker, collate
from gcssl.models.gcvit import GCViT
from gcssl.ssl.base import Objective, Setup
from gcssl.ssl.objectives import OBJECTIVES

DEVICE, STEP = "elsewhere", 25
SMALL = {
    "hidden_dim": 32, "bottleneck_dim": 16, "out_dim": 16, "local_crops": 1, "local_size": 32, "decoder_dim": 32,
    "decoder_depth": 1, "queue": 8, "mask_prob": 1.0, "koleo_weight": 0.1,
}  # fmt: skip
OTHER: dict[str, dict[str, Any]] = {
    "mae": {"mask_ratio": 0.5},
    "simmim": {"fill": "learned"},
    "joint": {"balance": True, "hidden_dim": 32, "out_dim": 16},
}


class Fake(FakeTensorMode):
    avoid_device_init = True  # else torch.zeros and torch.tensor ask for the device that is not there


def small_encoder(size: tuple[int, int]) -> GCViT:
    return GCViT(16, (1, 1, 1, 1), (1, 1, 2, 2), img_size=size, window_ratio=(16, 16, 16, 32), drop_path=0.1)


def moved(module: nn.Module, mode: FakeTensorMode) -> None:
    """`module.to(DEVICE)`: parameters and buffers, and nothing else that it holds."""
    there: dict[int, Tensor] = {}

    def copy(x: Tensor) -> Tensor:
        if id(x) not in there:
            y = mode.from_tensor(x).detach().to(DEVICE)
            there[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
        return there[id(x)]

    with mode, torch.no_grad():
        for part in module.modules():
            for own in (part._parameters, part._buffers):
                own.update({key: copy(x) for key, x in own.items() if x is not None})


def sent(value: Any, mode: FakeTensorMode) -> Any:
    """A batch's tensors on the device."""
    if isinstance(value, dict):
        return {key: sent(x, mode) for key, x in value.items()}
    if isinstance(value, list):
        return [sent(x, mode) for x in value]
    return mode.from_tensor(value).to(DEVICE) if isinstance(value, Tensor) else value


def a_step(objective: Objective, batch: dict[str, Any], mode: FakeTensorMode) -> None:
    """What `fit` asks of an objective."""
    moved(objective, mode)
    objective.train()
    with mode:
        batch = sent(batch, mode)
        out = objective(batch, STEP)
        out |= objective.grad_norms(out, STEP)
        with torch.autograd.set_multithreading_enabled(False):
            out["loss"].backward()
        objective.freeze(STEP)
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        objective.zero_grad()
        objective.after_step(STEP)
        objective.schedules(STEP)
        for key, value in out.items():
            if isinstance(value, Tensor):
                assert value.device.type == DEVICE, f"{key} is on {value.device}"
        objective.eval()
        with torch.no_grad():
            objective.pictures(batch)


def pretraining(name: str) -> None:
    cls, schema = OBJECTIVES[name]
    size = (64, 128) if name in ("mae", "ibot") else (64, 64)
    options = {key: x for key, x in SMALL.items() if key in schema.__dataclass_fields__ and name != "joint"}
    encoder = small_encoder(size)
    objective = cls(schema(**{**options, **OTHER.get(name, {})}), encoder, Setup(AugmentConfig(), size, 100, 10))
    make = ViewMaker(objective.draw, size, AugmentConfig(where="worker"))
    images = np.random.default_rng(0).integers(0, 256, (4, 80, 90, 3), dtype=np.uint8)
    batch = collate([make(image, None, (0, i)) for i, image in enumerate(images)])
    batch["views"] = [x.float() for x in batch["views"]]
    batch["noise"] = [torch.rand(encoder.n_noise, len(images)) for _ in batch["views"]]
    a_step(objective, batch, Fake())


def finetuning() -> None:
    encoder = small_encoder((64, 64))
    encoder.reset_classifier(4)
    batch = {"image": torch.rand(4, 3, 64, 64), "target": torch.arange(4), "noise": [torch.rand(encoder.n_noise, 4)]}
    a_step(Classifier(encoder, FinetuneOptions()), batch, Fake())


def linear_grid() -> None:
    settings = [Setting("last", lr, wd) for lr in (0.1, 1.0) for wd in (0.0, 1e-4)]
    mode = Fake()
    x, y = torch.rand(64, 16), torch.arange(64) % 4
    with mode:
        x, y = sent([x, y], mode)
        rows = torch.arange(64, device=DEVICE)
        grid = HeadGrid({"last": 16}, 4, settings, torch.device(DEVICE))
        norm = Standardise({"last": x}, rows)
        train_epoch(grid, {"last": x}, y, rows, norm, Plan(1, 32, 0), 0)


def failures() -> Iterator[str]:
    runs = {name: partial(pretraining, name) for name in OBJECTIVES}
    runs |= {"finetune": finetuning, "linear_probe": linear_grid}
    for name in sys.argv[1:] or runs:
        try:
            runs[name]()
        except Exception as error:
            ours = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
            yield f"{name}: {ours[-1].filename}:{ours[-1].lineno}: {type(error).__name__}: {str(error)[:300]}"


if __name__ == "__main__":
    backend = backend_registration._DummyBackendModule()
    backend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]  # type: ignore[attr-defined]
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=backend)
    found = list(failures())
    print("\n".join(found) or "all on the device")
    sys.exit(bool(found))
