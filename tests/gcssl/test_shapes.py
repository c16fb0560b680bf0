"""The generated set: the same bytes on every machine, any size and count, classes that colour and place do not tell."""

import hashlib

import numpy as np
import pytest
import torch

from gcssl.config import DataConfig
from gcssl.data import Images, open_data
from gcssl.errors import UserError
from gcssl.eval.knn import knn_accuracy
from gcssl.shapes import CLASSES

HASHES = {
    ("train", 0, (64, 64)): "5dd831621d3e8b80",
    ("train", 7, (64, 64)): "1d92065c75c5c9f8",
    ("test", 0, (64, 64)): "b522d6c35d4ac420",
    ("train", 3, (96, 160)): "1ead3ae7173d0585",
    ("train", 4, (224, 224)): "85e3987ecf618ac8",
}


def split(name: str, n: int = 600, size: tuple[int, int] = (64, 64)) -> Images:
    splits = open_data(DataConfig(path="shapes", shapes_n=n), size)
    return splits.train if name == "train" else splits.test


def pixels(images: Images, count: int | None = None) -> np.ndarray:
    return np.stack([images.load(i) for i in range(count or len(images))])  # N H W 3


@pytest.mark.parametrize("key", HASHES)
def test_bytes_are_the_same_on_every_machine(key: tuple[str, int, tuple[int, int]]) -> None:
    name, i, size = key
    image = split(name, size=size).load(i)
    assert image.shape == (*size, 3) and image.dtype == np.uint8
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == HASHES[key]


def test_count_changes_no_image_and_splits_never_meet() -> None:
    a, b = pixels(split("train", 100), 40), pixels(split("train", 1000), 40)
    assert np.array_equal(a, b)
    assert not any(np.array_equal(x, y) for x in pixels(split("test", 100)) for y in a)


def test_labels_come_in_equal_parts_and_a_fifth_more_is_for_testing() -> None:
    train, test = split("train", 200), split("test", 200)
    assert (len(train), len(test), train.classes) == (200, 40, CLASSES)
    assert np.bincount(train.labels).tolist() == [20] * 10 and np.bincount(test.labels).tolist() == [4] * 10
    with pytest.raises(UserError, match="data.shapes_n"):
        split("train", 3)


def test_class_is_hard_to_read_from_colour_or_place() -> None:
    """kNN on the mean colour, and on where the objects are, is right for less than a quarter (chance: a tenth)."""
    train, test = pixels(split("train")) / 255.0, pixels(split("test")) / 255.0
    y, z = (torch.from_numpy(split(name).labels) for name in ("train", "test"))

    def place(x: np.ndarray) -> np.ndarray:
        """Share of each 8 px cell that is far from the image's commonest colour: N 64."""
        ground = np.median(x.reshape(len(x), -1, 3), axis=1)[:, None, None]
        return (abs(x - ground).sum(-1) > 0.5).reshape(len(x), 8, 8, 8, 8).mean((2, 4)).reshape(len(x), -1)

    for name, feature in (("colour", lambda x: x.mean((1, 2))), ("place", place)):
        a, b = (torch.from_numpy(feature(x)).float() for x in (train, test))
        top1 = knn_accuracy(a - a.mean(0), y, b - a.mean(0), z, ks=(20,), backend="torch")[20]
        assert top1 < 25, f"{name}: {top1}"
