"""What a layout on disk hands to data.py: a reader and the labels as they were found."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

LISTS = (".csv", ".json", ".jsonl")  # files that may hold labels
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("validation", "valid", "val", "dev", "test", "testing")  # in order of preference


class Reader(Protocol):
    """The images of one split; `read` gives encoded bytes, a file or an image, `where` a name."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> bytes | Path | np.ndarray: ...

    def where(self, i: int) -> str: ...


@dataclass
class Raw:
    """One split as found: `labels` are ids into `classes`, or names or numbers where `classes` is None."""

    reader: Reader
    labels: Sequence[str] | Sequence[int] | np.ndarray | None = None
    classes: list[str] | None = None


Found = dict[str, Callable[[], Raw]]  # split name -> open it


class Files:
    """Image files below one folder; the names lie in one Arrow buffer, which workers share."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, pa.array(map(os.fsencode, names), pa.large_binary())  # a name may be no UTF-8

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> Path:
        return self.root / os.fsdecode(self.names[i].as_py())

    def where(self, i: int) -> str:
        return str(self.read(i))
