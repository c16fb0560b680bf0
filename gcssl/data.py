"""Images on disk -> one RGB image at a time: `open_data` finds the splits, `Images.load` decodes.

Every file is decoded into true colours, as Pillow does; one that cannot be is a `BadImage`, which the loader counts
and replaces. Layouts: folders.py (folders of images), tables.py (parquet, Arrow, webdataset, Hub), shapes.py.
"""

import contextlib
import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from gcssl.config import DataConfig
from gcssl.errors import UserError, check_machine, one_line
from gcssl.folders import entries, find_folders, has_folders, split_folders
from gcssl.log import say
from gcssl.shapes import CLASSES, shapes_split
from gcssl.sources import TEST_NAMES, TRAIN_NAMES, Files, Found, Raw, Reader
from gcssl.tables import HUB_NAME, TABLES, find_hub, find_other, find_tables, load_other

MAX_PIXELS = 178_956_970  # Pillow's own limit; larger files are refused as decompression bombs
# none of these decoders starts a program; that of JPEG opens MPO too
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
WHITE = (255, 255, 255, 255)


class BadImage(Exception):
    """An image that cannot be decoded; the message is one line without the file's name."""


class Images:
    """One split: `load(i)` gives RGB, `labels` int64 N or None (read once, without decoding an image)."""

    def __init__(
        self,
        reader: Reader,
        labels: np.ndarray | None,
        classes: list[str] | None,
        name: str,
        fingerprint: str = "",
    ) -> None:
        self.reader, self.name, self.classes = reader, name, classes
        self.labels = None if labels is None else np.asarray(labels, np.int64)
        self.fingerprint = fingerprint or _fingerprint(self)

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, i: int) -> np.ndarray:
        """Image i in RGB: uint8 H W 3; raises BadImage, or Failure where the machine is at fault."""
        try:
            source = self.reader.read(int(i))
        except Exception as error:  # a corrupt page of a table
            check_machine(error, self.where(i))
            raise BadImage(one_line(error)) from error
        return source if isinstance(source, np.ndarray) else decode(source)

    def describe(self, path: str) -> str:
        """One line: what was found in data.path."""
        kinds = "without labels"
        if self.classes is not None:
            kinds = f"in {len(self.classes)} classes ({_first(self.classes)})"
        generated = " (built in: generated images)" if path == "shapes" else ""
        return f"data: {path}{generated}: {self.name}, {len(self)} images {kinds}"

    def where(self, i: int) -> str:
        """File or row of image i, for messages."""
        return self.reader.where(int(i))

    def select(self, indices: np.ndarray, name: str | None = None) -> "Images":
        """The images at `indices`, in that order, as a split of its own; of booleans, those that are True."""
        indices = np.asarray(indices)
        if indices.dtype == bool and indices.shape == (len(self),):
            indices = np.flatnonzero(indices)
        if indices.size and not np.issubdtype(indices.dtype, np.integer):
            raise ValueError(f"indices: whole numbers expected, or a boolean for each of {len(self)}, got {indices!r}")
        indices = indices.astype(np.int64)
        labels = None if self.labels is None else self.labels[indices]
        digest = hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest()
        return Images(_Selected(self.reader, indices), labels, self.classes, name or self.name, digest)


@dataclass
class _Selected:
    reader: Reader
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> bytes | Path | np.ndarray:
        return self.reader.read(int(self.indices[i]))

    def where(self, i: int) -> str:
        return self.reader.where(int(self.indices[i]))


class Splits:
    """Training images, and the test split (labelled in their classes, or None), opened when it is asked for."""

    def __init__(self, train: Images, open_test: Callable[[], Images | None]) -> None:
        self.train, self._open_test = train, open_test

    @cached_property
    def test(self) -> Images | None:
        return self._open_test()


def open_data(cfg: DataConfig, img_size: tuple[int, int] = (64, 64), only_test: bool = False) -> Splits:
    """Find and open the splits of `cfg.path`; raises UserError in one line. Nothing is decoded yet.

    test: data.val_split, else the first labelled one of validation, val, test (and their other names), else
    None. With `only_test` no training split is needed: both fields are the test split, its class ids its own; a set
    of one split is its own test split.
    The generated set is drawn at img_size (H, W).
    """
    if cfg.path == "shapes":
        for key, only in (("train_split", "train"), ("val_split", "test")):
            if getattr(cfg, key) not in (None, only):
                raise UserError(f"data.{key}: given {getattr(cfg, key)}, shapes has {only}; leave it out")
        train = _images(shapes_split("train", cfg.shapes_n, img_size), "train", None)
        n_test = max(len(CLASSES), cfg.shapes_n // 5)
        test = _images(shapes_split("test", n_test, img_size), "test", train.classes)
        return Splits(test if only_test else train, lambda: test)
    if cfg.val_labels is not None and not Path(cfg.val_labels).is_file():  # read only when the test split is opened
        raise UserError(f"data.val_labels: given {cfg.val_labels}, no such file")
    found = _find(cfg)
    if cfg.val_labels is not None and not any(name.lower() in TEST_NAMES or name == cfg.val_split for name in found):
        raise UserError(f"data.val_labels: given {cfg.val_labels}, but {cfg.path} has no val folder; leave it out")
    if cfg.val_split is not None and cfg.val_split not in found:
        raise UserError(f"data.val_split: given {cfg.val_split}, expected one of {', '.join(found)}")
    if cfg.val_split is not None and not only_test and cfg.val_split == _train_name(cfg, found):
        raise UserError(f"data.val_split: given {cfg.val_split}, which is trained on; expected another split")
    if only_test:
        first = next(iter(found))
        alone = _images(_open(cfg, found, first), first, None) if len(found) == 1 else _test(cfg, found, None)
        if alone is None:
            raise UserError(f"data.val_split: no labelled test split in {cfg.path}: {', '.join(found)}")
        return Splits(alone, lambda: alone)
    name = _train_name(cfg, found)
    train = _images(_open(cfg, found, name), name, None)
    return Splits(train, lambda: _test(cfg, found, train))


def _find(cfg: DataConfig) -> Found:
    """The splits of data.path by layout: split or class folders of images, tables, a flat folder, other files."""
    if not cfg.path:
        raise UserError("data.path: not given, expected a folder of images or tables, a Hub name, or shapes")
    root = Path(cfg.path)
    if not root.exists():
        if HUB_NAME.fullmatch(cfg.path):
            return find_hub(cfg)
        raise UserError(
            f"data.path: given {cfg.path}, no such folder or file; "
            "expected a folder, a parquet, Arrow or tar file, a Hub name, or shapes"
        )
    if root.is_dir() and not entries(root):
        raise UserError(f"data.path: {cfg.path} is empty, expected images, parquet, arrow or tar files")
    listed = [root / part / name for part in ("", "train") for name in METADATA if (root / part / name).is_file()]
    if listed:  # the datasets library pairs images with it
        if listed[0].parent == root and (splits := split_folders(cfg, root)):
            told = f"{listed[0]} beside the folders {', '.join(splits)} would not be read"
            raise UserError(f"data.path: {told}; give each of them one, with the names of its own files")
        return load_other(cfg, root)
    if root.is_dir() and has_folders(cfg, root):
        looked = [folder for folder in (root, root / "train") if folder.is_dir()]
        if any(entry.name.lower().endswith(TABLES) for folder in looked for entry in entries(folder)):
            say(f"data: {root} holds folders of images; the tables beside them are not used")
        return find_folders(cfg, root)
    found = find_tables(cfg, root)
    if not found and root.is_dir():
        found = find_folders(cfg, root)
    return found or find_other(cfg, root)


def _train_name(cfg: DataConfig, found: Found) -> str:
    if cfg.train_split is not None:
        if cfg.train_split not in found:
            raise UserError(f"data.train_split: given {cfg.train_split}, expected one of {', '.join(found)}")
        return cfg.train_split
    name = next((n for n in found if n.lower() in TRAIN_NAMES), None)
    if name is None and len(found) == 1:
        name = next(iter(found))
        if name.lower() in TEST_NAMES:
            say(f"data: {cfg.path} has no training split, so its {name} is trained on")
    if name is None:
        raise UserError(f"data.train_split: no split train in {cfg.path}, expected one of {', '.join(found)}")
    return name


def _test(cfg: DataConfig, found: Found, train: Images | None) -> Images | None:
    """The first candidate that is labelled; None when train is unlabelled, as then nothing can be judged."""
    if train is not None and train.classes is None:
        return None
    rank = {name: i for i, name in enumerate(TEST_NAMES)}
    used = None if train is None else train.name
    names = sorted((n for n in found if n.lower() in rank and n != used), key=lambda n: rank[n.lower()])
    for name in [cfg.val_split] if cfg.val_split is not None else names:
        raw = _open(cfg, found, name)
        images = _images(raw, name, None if train is None else train.classes)
        if images.labels is not None:
            if cfg.val_split is None and (others := [other for other in names if other != name]):
                say(f"data: {name} judges; for {' or '.join(others)} say data.val_split={others[0]}")
            return images
        if cfg.val_split is not None:
            raise UserError(f"data.val_split: {name} of {cfg.path} has no labels, expected a labelled split")
        say(f"data: split {name} has no labels, not used for testing")
    return None


def _open(cfg: DataConfig, found: Found, name: str) -> Raw:
    raw = found[name]()
    if not len(raw.reader):
        raise UserError(f"data.path: split {name} of {cfg.path} holds no images")
    return raw


def _images(raw: Raw, name: str, train_classes: list[str] | None) -> Images:
    labels, classes = _class_ids(raw, name, train_classes)
    return Images(raw.reader, labels, classes, name)


def _class_ids(raw: Raw, name: str, train_classes: list[str] | None) -> tuple[np.ndarray | None, list[str] | None]:
    """(ids int64 N, class names), those of train when given; (None, None) when a label is missing or -1."""
    if raw.labels is None:
        return None, None
    missing = sum(value is None or (not isinstance(value, str) and value < 0) for value in raw.labels)
    if missing:
        if missing < len(raw.labels):
            say(f"data: {missing} of {len(raw.labels)} labels of split {name} are missing, so it counts as unlabelled")
        return None, None
    values = np.asarray(raw.labels)
    classes, ids = raw.classes, values
    if classes is None:
        unique, ids = np.unique(values, return_inverse=True)
        classes = [str(value) for value in unique]
    elif values.max() >= len(classes):
        raise UserError(f"data.label_column: label {values.max()} in split {name} of {len(classes)} classes")
    if train_classes is None:
        return (ids.astype(np.int64), classes) if len(classes) > 1 else (None, None)
    known = {c: i for i, c in enumerate(train_classes)}
    foreign = [classes[i] for i in np.unique(ids) if classes[i] not in known]
    if foreign:
        raise UserError(
            f"data.path: class {foreign[0]} of split {name} is none of the {len(train_classes)} training "
            f"classes ({_first(train_classes)}); expected the same names in both"
        )
    if len(held := np.unique(ids)) < len(train_classes):
        say(f"data: split {name} has images of {len(held)} of the {len(train_classes)} training classes")
    table = np.array([known.get(c, -1) for c in classes], np.int64)
    return table[ids], train_classes


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def held_out(images: Images, share: float = 0.05, cap: int = 25_000) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held): sorted int64 indices that part the images, the same for every seed and machine.

    `held` has `share` of each class (of all images when unlabelled), about `cap` in all at most, and at least one of
    every class that has two images; which ones is decided by a hash of the set's fingerprint and the index.
    """
    n = len(images)
    score = _hash(n, images.fingerprint)
    labels = np.zeros(n, np.int64) if images.labels is None else images.labels
    share = min(share, cap / max(n, 1))
    order = np.argsort(labels, kind="stable")  # no pass a class: 14 million images may have 20,000 of them
    held = np.zeros(n, bool)
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[members[np.argsort(score[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _hash(n: int, text: str) -> np.ndarray:
    """uint64 n: splitmix64 of a text's digest plus the index, the same on every machine."""
    start = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    z = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _fingerprint(images: Images) -> str:
    """sha256 of count, labels, names of classes and files, bytes of three images: the same wherever the set lies."""
    digest = hashlib.sha256(f"{len(images)} {images.classes}".encode())
    if isinstance(images.reader, Files):
        for name in images.reader.names:
            digest.update(name.as_py() + b"\0")
    if images.labels is not None:
        digest.update(images.labels.tobytes())
    for i in sorted({0, len(images) // 2, len(images) - 1}):
        try:
            source = images.reader.read(i)
            if isinstance(source, Path):
                source = source.read_bytes()
            digest.update(source if isinstance(source, bytes) else source.tobytes())
        except Exception as error:  # a damaged one is as good a mark as a sound one
            check_machine(error, images.where(i))
            digest.update(type(error).__name__.encode())
    return digest.hexdigest()


def decode(source: bytes | Path | str) -> np.ndarray:
    """Encoded bytes or a file -> RGB in true colours, uint8 H W 3, turned as EXIF says; its own faults are BadImages.

    16-bit grey is divided by 257 (Pillow's own conversion saturates), float grey is read as 0..1, 0..255 or
    0..65535 by its maximum, transparency is laid on white, of an animation the first frame is taken. ICC
    profiles are ignored.
    """
    try:
        encoded = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS}: refused")
            if (pixels := _jpeg(encoded, image)) is not None:
                return pixels
            image.load()
            _turn_upright(image)
            return np.array(_true_rgb(image))
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its message is the file's name
        raise BadImage(f"none of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow raises a dozen types on damaged files
        check_machine(error, "an image" if isinstance(source, bytes) else str(source))
        raise BadImage(one_line(error)) from error


def _jpeg(encoded: bytes, image: Image.Image) -> np.ndarray | None:
    """A sound upright RGB JPEG by libjpeg-turbo itself: Pillow's pixels in two thirds of its time; None: by Pillow."""
    if image.format != "JPEG" or image.mode != "RGB":
        return None
    with contextlib.suppress(Exception):  # as in _turn_upright
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            return None
    try:
        return simplejpeg.decode_jpeg(encoded)
    except ValueError:  # its warnings too
        return None


def _turn_upright(image: Image.Image) -> None:
    with contextlib.suppress(Exception):  # damaged EXIF in a sound image: it stays as stored
        ImageOps.exif_transpose(image, in_place=True)


def _true_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_bytes(np.asarray(image), image.mode == "F")).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image


def _to_bytes(values: np.ndarray, is_float: bool) -> np.ndarray:
    """16-bit or float grey H W -> uint8 H W."""
    values = values.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0 or high > 65535:
        raise BadImage(f"grey values from {low:g} to {high:g}: expected 0..65535, 0..255 or 0..1")
    scale = 1 / 257 if not is_float or high > 255 else 1 if high > 1 else 255
    return np.round(values * scale).astype(np.uint8)
