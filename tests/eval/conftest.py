"""A small labelled folder of images on disk, and the accelerator of one process."""

from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from gcssl.config import RuntimeConfig, TrainConfig
from gcssl.runtime import make_accelerator

CLASSES = ("blue", "green", "red")
N_TRAIN, N_TEST = 22, 9  # images a class; odd, so that no process count divides them


def write_images(root: Path, seed: int = 0) -> Path:
    """root/{train,val}/<class>/i.png: noise around the class's colour, so that most can be told."""
    g = np.random.default_rng(seed)
    for split, count in (("train", N_TRAIN), ("val", N_TEST)):
        for c, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                mean = np.full(3, 110.0) + 45 * np.eye(3)[2 - c] + g.normal(0, 25, 3)
                pixels = np.clip(mean + g.normal(0, 40, (48, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="session")
def broken_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two training images and one test image that cannot be decoded."""
    root = write_images(tmp_path_factory.mktemp("broken"))
    for name in ("train/blue/03.png", "train/red/21.png", "val/green/04.png"):
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return root


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return make_accelerator(TrainConfig(), RuntimeConfig())
