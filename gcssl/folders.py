"""Folders of image files: torchvision's layout, one tree of classes, flat, official and Kaggle ImageNet."""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

from gcssl.config import DataConfig
from gcssl.errors import UserError, one_line
from gcssl.log import say
from gcssl.sources import LISTS, TEST_NAMES, TRAIN_NAMES, Files, Found, Raw

SUFFIXES = tuple(".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .jp2 .j2k .avif".split())
NO_CLASSES = {*TRAIN_NAMES, *TEST_NAMES, "images", "image", "imgs", "img", "masks", "mask", "labels", "annotations"}
KAGGLE = Path("ILSVRC/Data/CLS-LOC")  # below the folder that Kaggle's archive unpacks into
KAGGLE_LABELS = "LOC_val_solution.csv"


def find_folders(cfg: DataConfig, root: Path) -> Found:
    """The splits of a folder of images, opened on demand; empty when there is no image at all.

    Sub-folders with a split's name are splits, others are classes (ids in the order of the sorted names), or
    not used beside a training split: one that has a test split beside it, or was asked for. A folder without classes
    is unlabelled. The ids of every split are those of the training folder.
    """
    for key in ("image_column", "label_column"):
        if getattr(cfg, key) is not None:
            raise UserError(f"data.{key}: given {getattr(cfg, key)}, but {root} holds files of images; leave it out")
    splits, others = _names(cfg, _base(root)[0])
    if not splits and len(others) == 1 and (inner := split_folders(cfg, root / others[0])):
        told = f"{root} holds one folder, {others[0]}, with {' and '.join(inner)} in it"
        raise UserError(f"data.path: {told}; give {root / others[0]}")
    return _splits(cfg, *_base(root))


def has_folders(cfg: DataConfig, root: Path) -> bool:
    """Whether folders of images tell splits or classes apart; one other folder may be the pictures of a readme."""
    splits, others = _names(cfg, _base(root)[0])
    return bool(splits) or len(others) > 1


def split_folders(cfg: DataConfig, root: Path) -> list[str]:
    """Folders of images in root that are named as splits."""
    return _names(cfg, root)[0] if root.is_dir() else []


def _base(root: Path) -> tuple[Path, str | None]:
    """(the folder of the splits, the labels of a flat val/ in it): below root in Kaggle's archive."""
    for inner in (KAGGLE, Path("Data/CLS-LOC")):
        if (root / inner / "train").is_dir():
            labels = root / KAGGLE_LABELS
            return root / inner, str(labels) if labels.is_file() else None
    return root, None


def _splits(cfg: DataConfig, root: Path, default_labels: str | None) -> Found:
    splits, others = _names(cfg, root)
    train = next((n for n in splits if n == cfg.train_split), None)
    train = train or next((n for n in splits if n.lower() in TRAIN_NAMES), None)
    tests = [n for n in splits if n != train and (n == cfg.val_split or n.lower() in TEST_NAMES)]
    images = _images(root)
    others += images
    folders = [name for name in others if name not in images]
    if train and folders and not (tests or images or train == cfg.train_split) and len(_classes(root / train)) > 1:
        raise UserError(
            f"data.path: {root} holds {train} with classes in it beside {folders[0]}, so {train} may be a split or a "
            f"class; say data.train_split={train}, or rename it"
        )
    if train and (empty := [n for n in _folders(root) if n.lower() in TEST_NAMES and n not in splits]):
        say(f"data: {root / empty[0]} holds no images, so it is no test split")
    if train and (tests or train == cfg.train_split):
        if others:
            rest = f"{others[0]} ({len(others)} in all)" if len(others) > 1 else others[0]
            say(f"data: {root} has the splits {', '.join(splits)}; not used beside them: {rest}")
    elif not splits or others:  # a class may be called train: then its sisters are classes too
        if not splits and not images:
            _check_no_split(root, folders)
        return {"train": partial(_labelled_tree, root)} if _has_image(root) else {}
    if cfg.val_labels is None:
        _tell_unread(root)
    found: Found = {}
    for name in splits:
        if name == train or train is None:
            found[name] = partial(_labelled_tree, root / name)
        else:
            labels = cfg.val_labels or default_labels
            is_val = not name.lower().startswith("test")  # the images of a test split may well have no labels
            found[name] = partial(_test_tree, root / name, root / train, labels, is_val)
    return found


def _check_no_split(root: Path, folders: list[str]) -> None:
    """UserError where all folders are named much as splits are, such as training_set and test_set."""
    train, test = ([name for name in folders if _words(name) & {*names}] for names in (TRAIN_NAMES, TEST_NAMES))
    if train and test and {*train, *test} == {*folders}:
        told = f"{root} holds {', '.join(folders[:3])}, which may be splits or classes"
        raise UserError(f"data.path: {told}; say data.train_split={train[0]} data.val_split={test[0]}, or rename them")


def _names(cfg: DataConfig, root: Path) -> tuple[list[str], list[str]]:
    """(folders with a split's name, other folders) that hold images."""
    named = {cfg.train_split, cfg.val_split, *TRAIN_NAMES, *TEST_NAMES}
    folders = _classes(root)
    splits = [name for name in folders if name in named or name.lower() in named]
    return splits, [name for name in folders if name not in splits]


def _labelled_tree(root: Path) -> Raw:
    """Class folders, or images without labels. One class alone says nothing: unlabelled."""
    names, labels, classes = _tree(root)
    _tell_unread(root)
    if len(classes) < 2:
        return Raw(Files(root, names))
    if odd := [name for name in classes if NO_CLASSES & _words(name)]:
        told = f"data: {root}: folders are taken as classes, {', '.join(odd[:3])} too"
        one = next((name for name in odd if not _words(name) & {*TEST_NAMES}), odd[0])
        say(f"{told}; one of them alone is trained on by data.train_split={one}")
    return Raw(Files(root, names), labels, classes)


def _words(name: str) -> set[str]:
    return set(re.split(r"[-_. ]", name.lower()))


def _tell_unread(root: Path) -> None:
    """A table of labels that is not used."""
    if unread := sorted(entry.name for entry in entries(root) if entry.name.lower().endswith(LISTS)):
        known = "one folder of images a class, or a metadata.csv with the columns file_name and label"
        say(f"data: {root / unread[0]} is not read; labels come from {known}")


def _test_tree(root: Path, train: Path, val_labels: str | None, needs_labels: bool) -> Raw:
    """A test split beside `train`: class folders named as there, or flat files with a label file."""
    names, labels, classes = _tree(root)
    if len(classes) >= 2 or (classes and classes[0] in _classes(train)):
        return Raw(Files(root, names), labels, classes)
    if not needs_labels or len(_classes(train)) < 2:
        return Raw(Files(root, names))
    if val_labels is None:
        where = f"in one folder, {classes[0]}, which is no class of {train}" if classes else "without class folders"
        raise UserError(
            f"data.val_labels: not given, and {root} holds {len(names)} files {where}; "
            f"expected {KAGGLE_LABELS}, or one class name per line in the order of the sorted file names"
        )
    return Raw(Files(root, names), read_label_file(Path(val_labels), names), None)


def read_label_file(path: Path, names: list[str]) -> list[str]:
    """Class names of `names` (sorted file names) from Kaggle's csv or from one name per line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.val_labels: {path} cannot be read as text: {one_line(error)}") from None
    if path.suffix.lower() == ".csv":
        rows = [row for row in csv.reader(text.splitlines()) if len(row) > 1]
        by_image = {row[0]: row[1].split()[0] for row in rows if row[1].split()}
        missing = [name for name in names if Path(name).stem not in by_image]
        if missing:
            lack = f"no row for {len(missing)} of {len(names)} files, first {missing[0]}"
            raise UserError(f"data.val_labels: {path} has {lack}")
        return [by_image[Path(name).stem] for name in names]
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) != len(names):
        raise UserError(f"data.val_labels: {path} has {len(lines)} lines, expected one for each of {len(names)}")
    if all(line.isdigit() for line in lines):
        raise UserError(
            f"data.val_labels: {path} holds numbers, whose order is not that of the class names; expected "
            f"one class name (n01440764, ...) per line, or {KAGGLE_LABELS}"
        )
    if all(line.split()[0] in (name, Path(name).stem) for line, name in zip(sorted(lines), names, strict=True)):
        raise UserError(
            f"data.val_labels: {path} names a file in each line ({lines[0]}); expected one class name per line, in the "
            f"order of the sorted file names, or {KAGGLE_LABELS}"
        )
    return lines


def _tree(root: Path) -> tuple[list[str], list[int], list[str]]:
    """(file names relative to root, class ids, class names), sorted; with images at the top no classes."""
    others: Counter[str] = Counter()
    found = _tree_of_images(root, others)
    if others:
        told = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(3))
        if len(others) > 3:
            told += f", {others.total() - sum(n for _, n in others.most_common(3))} of other suffixes"
        say(f"data: {root}: by their names no images, so not used: {told}")
    return found


def _tree_of_images(root: Path, others: Counter[str]) -> tuple[list[str], list[int], list[str]]:
    """The same; counts the suffixes of `others`, the files that are no images by their names."""
    flat = _images(root)
    if flat:
        beside = _classes(root)
        if not beside:
            _count([e.name for e in entries(root) if _holds(e.is_file)], others)
            return flat, [], []
        mixed = f"{root} holds images ({flat[0]}) beside folders of images ({beside[0]})"
        if any(name.lower() in (*TRAIN_NAMES, *TEST_NAMES) for name in beside):
            raise UserError(f"data.path: {mixed}, expected one or the other; move one of them away")
        say(f"data: {mixed}: all are taken, without classes")
        return _below(root, others), [], []
    names: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    folders = _folders(root)
    for folder in folders:
        files = _below(root / folder, others)
        if files:
            names += [f"{folder}/{file}" for file in files]
            labels += [len(classes)] * len(files)
            classes.append(folder)
    if classes and (empty := sorted(set(folders) - set(classes))):
        say(f"data: {root}: folders without images are no classes ({len(empty)}): {', '.join(empty[:3])}")
    if len(classes) > 1 and (deeper := next((name for name in names if name.count("/") > 1), None)):
        told = f"folders below a class folder count as that class, {Path(deeper).parent} as {deeper.partition('/')[0]}"
        say(f"data: {root}: {told}")
    return names, labels, classes


def _classes(root: Path) -> list[str]:
    """Folders in root that hold images."""
    return [name for name in _folders(root) if _has_image(root / name)]


def _folders(root: Path) -> list[str]:
    return sorted(e.name for e in entries(root) if _is_visible(e.name) and _holds(e.is_dir))


def _images(root: Path) -> list[str]:
    return sorted(e.name for e in entries(root) if is_image(e.name) and not _holds(e.is_dir))  # dead links: bad images


def entries(root: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as found:
            return list(found)
    except OSError as error:
        _refuse(error)


def _holds(test: Callable[[], bool]) -> bool:
    """False for a link that leads nowhere, or to itself."""
    try:
        return test()
    except OSError:
        return False


def _refuse(error: OSError) -> NoReturn:
    """A folder left out would be a class left out, and the others' ids would move."""
    raise UserError(f"data.path: {error.filename} cannot be listed: {error.strerror}; mend it or move it away")


def _below(root: Path, others: Counter[str]) -> list[str]:
    """All image files below root, relative to it, sorted."""
    names = []
    for folder, files in _walk(root):
        prefix = os.path.relpath(folder, root)
        names += [file if prefix == "." else f"{prefix}/{file}" for file in files if is_image(file)]
        _count(files, others)
    return sorted(names)


def _count(files: list[str], others: Counter[str]) -> None:
    """Add the suffixes of files that are no images by their names; those of tables are told apart."""
    names = [file for file in files if not is_image(file) and not file.startswith(".")]
    others.update(Path(name).suffix or "without a suffix" for name in names if not name.lower().endswith(LISTS))


def _has_image(root: Path) -> bool:
    return any(is_image(file) for _, files in _walk(root) for file in files)


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) of root and all below, each real folder once and none that holds root: links may loop."""
    above = Path(os.path.realpath(os.path.dirname(os.path.abspath(root))))
    seen = {str(p) for p in (above, *above.parents, *Path(os.path.realpath(root)).parents)}
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(filter(_is_visible, folders))
        yield folder, files


def _is_visible(folder: str) -> bool:
    return not folder.startswith(".") and folder != "lost+found"  # of a file system's root; its owner's alone


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")
