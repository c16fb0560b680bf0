"""No key of an objective is idle: changing it changes something that training computes."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gcssl.config import AugmentConfig
from gcssl.loader import ViewMaker, batch_to_device, collate
from gcssl.models.gcvit import GCViT
from gcssl.ssl.base import Setup
from gcssl.ssl.joint import MASKED, VIEW, JointConfig, part_config
from gcssl.ssl.objectives import OBJECTIVES

Size = tuple[int, int]
EXCEPTIONS = {("mae", "dense")}  # the slow way to equal numbers (tests/models/test_visible.py compares the two)
STEPS = (3, 25)  # early, and past the warm-ups; an epoch has ten
SIZES = {"mae": (64, 128), "ibot": (64, 128)}  # else too few units of 32 px for another unit, another ratio
PLAIN = {  # small, and with the parts of which other keys speak
    "hidden_dim": 32, "bottleneck_dim": 16, "out_dim": 16, "local_crops": 1, "local_size": 32, "decoder_dim": 32,
    "decoder_depth": 1, "queue": 8, "teacher_temp": 0.08, "warmup_teacher_temp_epochs": 2.0,
    "mask_prob": 1.0,
}  # fmt: skip
OTHER = {
    "decoder_dim": 64, "local_size": 64, "mask_unit": 16, "mae.mask_unit": 64, "mae.mask_ratio": 0.75,
    "ibot.mask_ratio": 0.5, "mask_ratio_var": 0.0, "freeze_last_layer_epochs": 0.0, "target": "hog",
    "fill": "learned", "masked": "localmim", "view": "byol", "joint.weights": [1.0, 0.5],
}  # fmt: skip
KEYS = [
    (name, f.name)
    for name, (_, schema) in OBJECTIVES.items()
    for f in dataclasses.fields(schema)
    if f.name != "name" and (name, f.name) not in EXCEPTIONS and not (name == "joint" and f.default is None)
]


def plain(name: str) -> dict[str, Any]:
    """The small config from which a key is changed."""
    schema = OBJECTIVES["mocov3" if name == "joint" else name][1]
    known = {f.name for f in dataclasses.fields(schema)}
    small = {key: value for key, value in PLAIN.items() if key in known}
    return small | ({"mask_ratio": 0.4} if name == "mae" else {})


def other(name: str, key: str) -> Any:
    """Another value of the key than `plain` or the default has."""
    if (given := OTHER.get(f"{name}.{key}", OTHER.get(key))) is not None:
        return given
    value = getattr(OBJECTIVES[name][1](**plain(name)), key)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 or 0.7
    assert isinstance(value, list), f"{name}.{key}: give it another value in OTHER"
    return [v / 2 for v in value]


@cache
def small_encoder(size: Size) -> GCViT:
    """Shared: no optimizer moves it."""
    torch.manual_seed(0)
    return GCViT(16, (2, 1, 1, 1), (1, 1, 2, 2), img_size=size, window_ratio=(16, 16, 16, 32))


@cache
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (80, 90, 3), dtype=np.uint8) for _ in range(4)]


def stir(objective: Any) -> None:
    """As some way into a run: a teacher unlike the student, centres unlike zero."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in objective.parameters():
            if not p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
        for key, buffer in objective.named_buffers():
            if key.endswith("center.mean"):
                buffer.normal_(0, 0.1, generator=g)


def training(name: str, **changed: Any) -> Iterator[dict[str, Tensor]]:
    """What training computes, in order: weights; views and masks; of each step loss and gradients, then weights."""
    cls, schema = OBJECTIVES[name]
    size = SIZES.get(name, (64, 64))
    encoder, setup = small_encoder(size), Setup(AugmentConfig(), size, 100, 10)
    torch.manual_seed(0)
    objective = cls(schema(**{**plain(name), **changed}), encoder, setup).train()
    stir(objective)
    yield {key: value.clone() for key, value in objective.state_dict().items()}
    make = ViewMaker(objective.draw, size)
    items = [make(image, None, (0, i)) for i, image in enumerate(pictures())]
    batch = batch_to_device(collate(items), "cpu", (0.5,) * 3, (0.2,) * 3)
    masks = {f"mask {i}": mask for i, mask in enumerate(batch["masks"]) if mask is not None}
    yield {f"view {i}": x for i, x in enumerate(batch["views"])} | masks
    for step in STEPS:
        objective.zero_grad()
        loss = objective(batch, step)["loss"]
        loss.backward()
        objective.freeze(step)
        grads = {key: p.grad.clone() for key, p in objective.named_parameters() if p.grad is not None}
        yield {"loss": loss.detach(), **grads}
        objective.after_step(step)
        yield {key: value.clone() for key, value in objective.state_dict().items()}


@cache
def unchanged(name: str) -> list[dict[str, Tensor]]:
    return list(training(name))


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() != b.keys() or any(not torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_keys_compute_equal_numbers(name: str) -> None:
    """Else the next test would say nothing."""
    assert not any(differ(a, b) for a, b in zip(unchanged(name), training(name), strict=True))


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_each_key_changes_what_training_computes(name: str, key: str) -> None:
    changed = training(name, **{key: other(name, key)})
    assert any(differ(a, b) for a, b in zip(unchanged(name), changed, strict=True)), f"objective.{key} does nothing"


def test_each_key_of_a_part_reaches_it_in_joint() -> None:
    for name, (_, schema) in (MASKED | VIEW).items():
        for field in dataclasses.fields(schema):
            if field.name != "name" and (name, field.name) not in EXCEPTIONS:
                value = other(name, field.name)
                assert getattr(part_config(JointConfig(**{field.name: value}), schema), field.name) == value
