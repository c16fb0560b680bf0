"""Tables of encoded images, opened by the datasets library: parquet, Arrow, save_to_disk, webdataset, Hub.

Images are never decoded here. Arrow is memory-mapped where it lies, parquet up to 2 GiB is read into memory;
what has to be copied into a cache is announced with its size.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcssl.config import DataConfig
from gcssl.errors import UserError, first_of, one_line
from gcssl.folders import is_image
from gcssl.log import say
from gcssl.sources import LISTS, TEST_NAMES, TRAIN_NAMES, Found, Raw

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

TABLES = (".parquet", ".arrow", ".tar")
PACKED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")  # of which load_dataset reads the first
IMAGE_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "pixels")
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target", "category", "y")
TAR_END = bytes(1024)
IN_MEMORY = 2 * 2**30  # bytes of parquet that are read rather than cached
SHARD = re.compile(r"[-_.]?\d+([-_.]?of[-_.]?\d+)?$")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Rows:
    """The image column of a table."""

    def __init__(self, table: "datasets.Dataset", column: str, name: str, root: Path) -> None:
        self.table, self.column, self.name, self.root = table.select_columns([column]), column, name, root

    def __len__(self) -> int:
        return len(self.table)

    def read(self, i: int) -> bytes | Path:
        cell = self.table[i][self.column]
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
        if isinstance(cell, str):
            return self.root / cell  # an absolute path stays itself
        if cell is None:
            raise ValueError(f"column {self.column} is empty in this row")
        if not isinstance(cell, bytes):
            raise ValueError(f"the cell holds {type(cell).__name__}, expected encoded bytes")
        return cell

    def where(self, i: int) -> str:
        return f"{self.name} row {i}"


def find_tables(cfg: DataConfig, root: Path) -> Found:
    """The splits of tables in a folder or one below it (or of one file), opened on demand; empty when there is none."""
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _from_disk(cfg, root)
    found = table_files(root)
    for suffix, opener in ((".parquet", _parquet), (".arrow", _arrow), (".tar", _webdataset)):
        files = [file for file in found if file.suffix.lower() == suffix]
        if files:
            shards = _by_split(files, cfg)
            for split, paths in shards.items():
                _in_one_folder(split, paths)
            return {k: partial(_raw, cfg, root, k, partial(opener, cfg, paths)) for k, paths in shards.items()}
    return {}


def table_files(root: Path) -> list[Path]:
    """Tables in a folder or one below it, or the one file that root is; sorted."""
    below = [root] if root.is_file() else [f for pattern in ("*", "[!.]*/*") for f in root.glob(pattern)]
    return sorted(f for f in below if f.suffix.lower() in TABLES)


def find_hub(cfg: DataConfig) -> Found:
    """The splits of a dataset on the Hub, copied into its cache, or found there when it is out of reach."""
    import datasets
    import huggingface_hub

    reason = ""
    try:
        huggingface_hub.HfApi().dataset_info(cfg.path, timeout=5)  # load_dataset retries for half a minute
    except Exception as error:  # the client raises a dozen types
        reason = one_line(error)
    try:
        with _offline(bool(reason)):
            builder = datasets.load_dataset_builder(cfg.path, cache_dir=cfg.cache_dir)
            size = builder.info.download_size
            size_text = _size(size) if size else "size unknown"
            say(f"data: {cfg.path} ({size_text}) is copied once into {builder.cache_dir}")
            tables = datasets.load_dataset(cfg.path, cache_dir=cfg.cache_dir)
    except Exception as error:
        raise UserError(
            f"data.path: given {cfg.path}, no such folder, and no such dataset on the Hub or in its cache "
            f"({reason or one_line(error)})"
        ) from error
    return {name: partial(_raw, cfg, Path(), name, partial(_same, table)) for name, table in tables.items()}


@contextmanager
def _offline(yes: bool) -> Iterator[None]:
    """Let the Hub client look into its cache alone; it reads its environment only once, at import."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = yes or module.HF_HUB_OFFLINE
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def find_other(cfg: DataConfig, root: Path) -> Found:
    """Images named or packed by other files that load_dataset opens: csv, json, zip."""
    expected = "images, or parquet, arrow or tar files in it or one folder below"
    if root.is_file():
        told = "is one file, expected parquet, arrow or tar, or a folder of images"
        hints = dict.fromkeys(PACKED, "; unpack it") | dict.fromkeys(LISTS, "; give the folder of the images it names")
        raise UserError(f"data.path: {root} {told}{hints.get(root.suffix.lower(), '')}")
    kinds = {file.suffix.lower() for file in root.iterdir()}
    if kinds & {*PACKED[1:]}:
        raise UserError(f"data.path: {root} holds compressed files, expected {expected}; unpack them")
    if not kinds & {*LISTS, PACKED[0]}:
        raise UserError(f"data.path: no images in {root}, expected {expected}; give the folder that holds them")
    return load_other(cfg, root)


def load_other(cfg: DataConfig, root: Path) -> Found:
    """The splits that load_dataset finds in a folder: of images beside a metadata file, csv, json, zip."""
    import datasets

    listed = any([*root.glob("metadata.*"), *root.glob("*/metadata.*")])
    try:
        tables = datasets.load_dataset(str(root), cache_dir=cfg.cache_dir)
    except Exception as error:
        told = f"data.path: {root} cannot be opened by the datasets library ({one_line(error.__cause__ or error)})"
        if any(root.glob("*.zip")):
            told += "; unpack the zip"
        elif (root / "status.json").is_file():
            told += "; it is the folder of a run, give that of its images"
        elif listed:
            told += "; a metadata file needs the column file_name, a csv commas, and every split a file of its own"
        raise UserError(told) from error
    images = sum(is_image(path.name) for path in root.rglob("*")) if listed else 0
    if (left := images - sum(map(len, tables.values()))) > 0:
        say(f"data: {left} of the {images} images in {root} are not used: its metadata file does not list them")
    return {name: partial(_raw, cfg, root, name, partial(_same, table)) for name, table in tables.items()}


def _same(table: "datasets.Dataset") -> "datasets.Dataset":
    return table


def _raw(cfg: DataConfig, root: Path, split: str, opener: Callable[[], "datasets.Dataset"]) -> Raw:
    import datasets

    table = opener()
    image, label = pick_columns(table.features, cfg, f"{split} of {cfg.path}")
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    folder = root if root.is_dir() else root.parent
    rows = Rows(table, image, f"{root} {split}" if str(root) != "." else f"{cfg.path} {split}", folder)
    if label is None:
        return Raw(rows)
    feature = table.features[label]
    values = table.select_columns([label])[:][label]
    if isinstance(feature, datasets.ClassLabel):
        return Raw(rows, values, list(feature.names))
    return Raw(rows, values, None)


def pick_columns(features: dict[str, Any], cfg: DataConfig, where: str) -> tuple[str, str | None]:
    """(image column, label column or None): those the config names, else found by type and name."""
    import datasets

    columns = ", ".join(features)
    for key in ("image_column", "label_column"):
        name = getattr(cfg, key)
        if name is not None and name not in features:
            raise UserError(f"data.{key}: given {name}, expected one of the columns {columns} of {where}")
    images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    image = cfg.image_column or next((c for c in IMAGE_NAMES if c in (images or features)), None)
    if image is None and len(images) == 1:
        image = images[0]
    if image is None:
        what = "several image columns" if images else "no image column"
        able = ", ".join(c for c, f in features.items() if _can_hold_images(f))
        expected = f"expected one of {able}" if able else f"and none of {columns} can hold images (bytes or paths)"
        raise UserError(f"data.image_column: {what} found by name in {where}, {expected}")
    if not _can_hold_images(features[image]):
        held = getattr(features[image], "dtype", type(features[image]).__name__)
        raise UserError(
            f"data.image_column: {image} of {where} holds {held}, expected an image a row, as bytes or a path"
        )
    label = cfg.label_column or next((c for c in LABEL_NAMES if _is_label(features.get(c))), None)
    if label is None:
        labels = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
        if len(labels) > 1:
            raise UserError(f"data.label_column: several in {cfg.path}, expected one of {', '.join(labels)}")
        label = labels[0] if labels else None
        if label is None and (named := [c for c in LABEL_NAMES if c in features]):
            say(f"data: column {named[0]} holds {features[named[0]]}, no integers or names, and is not used as labels")
        elif label is None and (others := [c for c, f in features.items() if c != image and _is_label(f)]):
            say(f"data: no column is taken for labels; data.label_column= names one: {first_of(others)}")
    elif not _is_label(features[label]):
        raise UserError(f"data.label_column: {label} holds {features[label]}, expected integers or names")
    return image, label


def _can_hold_images(feature: Any) -> bool:
    """Images; bytes or a path; or a struct of the two."""
    held = ("PIL.Image.Image", "binary", "large_binary", "string", "large_string")
    struct = isinstance(feature, dict) and not {"bytes", "path"}.isdisjoint(feature)
    return struct or getattr(feature, "dtype", None) in held


def _is_label(feature: Any) -> bool:
    dtype = getattr(feature, "dtype", "")
    return isinstance(dtype, str) and ("int" in dtype or "string" in dtype)


def _by_split(files: list[Path], cfg: DataConfig) -> dict[str, list[Path]]:
    """Shards grouped by the split that their file names, else its folder in data.path; with no such name all are
    train."""
    known = [n for n in (cfg.train_split, cfg.val_split, *TRAIN_NAMES, *TEST_NAMES) if n]
    groups: dict[str, list[Path]] = {}
    for file in files:
        names = [{file.stem.lower(), *re.split(r"[-_.]", file.stem.lower())}]
        names += [{file.parent.name.lower()}] if file.parent != Path(cfg.path) else []
        name = next((k for words in names for k in known if k.lower() in words), None)
        groups.setdefault(name or SHARD.sub("", file.stem) or "train", []).append(file)
    if not any(name in known for name in groups):
        if len(groups) > 1:
            say(f"data: no table of {cfg.path} names a split: {first_of(list(groups))} are joined as train")
        return {"train": files}
    if cfg.train_split is None and (others := [name for name in groups if name not in known]):
        used = [name for name in groups if name in known]
        say(f"data: {cfg.path} has the splits {', '.join(used)}; not used beside them: {first_of(others)}")
    return groups


def _in_one_folder(split: str, files: list[Path]) -> None:
    """Tables of two data sets side by side would be joined under the classes of the first."""
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        raise UserError(
            f"data.path: {split} has tables in {len(folders)} folders ({folders[0]}, {folders[1]}), expected one; give "
            "the one that is meant, or move the files together"
        )


def _parquet(cfg: DataConfig, files: list[Path]) -> "datasets.Dataset":
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    total = sum(file.stat().st_size for file in files)
    try:
        features = [_features(pq.read_schema(file)) for file in files]
        image, label = pick_columns(features[0], cfg, cfg.path)
        columns = [image] if label is None else [image, label]
        for file, other in zip(files, features, strict=True):
            if any(other.get(column) != features[0][column] for column in columns):
                told = f"{' and '.join(columns)} of other types or classes than {files[0].name}"
                raise UserError(f"data.path: {file} has {told}; shards of one split must agree")
        if total > IN_MEMORY:
            kept = datasets.Features({column: features[0][column] for column in columns})
            return _cached("parquet", cfg, files, total, columns=columns, features=kept)
        tables = [pq.ParquetFile(file).read(columns=columns) for file in files]
        return datasets.Dataset(pa.concat_tables(tables)).select_columns(columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.path: {_damaged(files)} is no sound parquet ({one_line(error)})") from error


def _features(schema: "pa.Schema") -> "datasets.Features":
    """Those of the columns whose type the datasets library knows; a map, for one, it does not."""
    import datasets
    import pyarrow as pa

    try:
        return datasets.Features.from_arrow_schema(schema)
    except ValueError:
        found = datasets.Features()
        for field in schema:
            with suppress(ValueError):
                found |= datasets.Features.from_arrow_schema(pa.schema([field]))
        return datasets.Features(found)


def _arrow(cfg: DataConfig, files: list[Path]) -> "datasets.Dataset":
    import datasets
    import pyarrow as pa

    try:
        tables = [datasets.Dataset.from_file(str(file)) for file in files]
        columns = [column for column in pick_columns(tables[0].features, cfg, cfg.path) if column]
        return datasets.concatenate_datasets([table.select_columns(columns) for table in tables])
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"data.path: {files[0].parent} holds no sound Arrow files ({one_line(error)})") from error


def _webdataset(cfg: DataConfig, files: list[Path]) -> "datasets.Dataset":
    for file in files:
        with file.open("rb") as tar:  # two empty blocks end it; the reader takes a shorter one for a smaller one
            tar.seek(max(0, file.stat().st_size - len(TAR_END)))
            if tar.read() != TAR_END:
                raise UserError(f"data.path: {file} is cut short: a tar ends with {len(TAR_END)} empty bytes")
    return _cached("webdataset", cfg, files, sum(file.stat().st_size for file in files))


def _from_disk(cfg: DataConfig, root: Path) -> Found:
    import datasets

    try:
        tables = datasets.load_from_disk(str(root))
    except Exception as error:  # damaged state.json, missing shards
        raise UserError(f"data.path: {root} is no sound save_to_disk folder ({one_line(error)})") from error
    splits = tables if isinstance(tables, dict) else {"train": tables}
    return {str(k): partial(_raw, cfg, root, str(k), partial(_same, table)) for k, table in splits.items()}


def _cached(kind: str, cfg: DataConfig, files: list[Path], total: int, **columns: Any) -> "datasets.Dataset":
    import datasets

    place = cfg.cache_dir or datasets.config.HF_DATASETS_CACHE
    say(f"data: {kind} of {_size(total)} in {files[0].parent} is copied once as Arrow into {place}, or found there")
    names = [str(file) for file in files]
    try:
        return datasets.load_dataset(kind, data_files=names, split="train", cache_dir=cfg.cache_dir, **columns)
    except Exception as error:  # the builders wrap what the readers raise
        cause = error.__cause__ or error
        raise UserError(f"data.path: {files[0].parent} holds no sound {kind} files ({one_line(cause)})") from error


def _damaged(files: list[Path]) -> Path:
    """The first of the parquet files that cannot be read; their folder when each can be."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            pq.ParquetFile(file).read()
        except (pa.ArrowException, OSError):
            return file
    return files[0].parent


def _size(n: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
