"""Every layout opens with the right labels, every mistake is one line."""

import csv
import errno
import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import gcssl.data
import gcssl.tables
from gcssl.config import DataConfig
from gcssl.data import BadImage, Images, held_out, open_data
from gcssl.errors import Failure, UserError
from gcssl.loader import TrainSet, train_loader
from gcssl.tables import find_tables

COLOURS = {"cat": (200, 30, 40), "ant": (20, 190, 60), "dog": (30, 40, 210)}  # not in alphabetical order


def encoded(colour: tuple[int, int, int], side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "png")
    return file.getvalue()


def write_tree(root: Path, n: int = 3, classes: tuple[str, ...] = ("cat", "ant", "dog")) -> None:
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(n):
            (root / name / f"{name}_{i}.png").write_bytes(encoded(COLOURS[name]))


def table(n: int = 6, label: str = "label", image: str = "image", named: bool = True) -> datasets.Dataset:
    names = sorted(COLOURS)
    features = datasets.Features(
        {
            image: datasets.Image(),
            "caption": datasets.Value("string"),
            label: datasets.ClassLabel(names=names) if named else datasets.Value("int64"),
        }
    )
    rows = [{"bytes": encoded(COLOURS[names[i % 3]]), "path": f"{i}.png"} for i in range(n)]
    columns = {image: rows, "caption": ["x"] * n, label: [i % 3 for i in range(n)]}
    return datasets.Dataset.from_dict(columns, features=features)


def opened(path: Path | str, **changes: object) -> gcssl.data.Splits:
    return open_data(DataConfig(path=str(path), **changes))  # type: ignore[arg-type]


def assert_labels_match_pixels(images: Images | None) -> None:
    assert images is not None and images.labels is not None and images.classes is not None
    for i in range(len(images)):
        assert tuple(images.load(i)[0, 0]) == COLOURS[images.classes[images.labels[i]]], images.where(i)


def refused(path: Path | str, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        _ = opened(path, **changes).test
    text = str(caught.value)
    assert "\n" not in text and text.startswith("data.")
    return text


# --- layouts


@pytest.mark.parametrize("val", ["val", "validation", "valid", "test"])
def test_torchvision_layout(tmp_path: Path, val: str) -> None:
    write_tree(tmp_path / "train")
    write_tree(tmp_path / val, classes=("dog", "ant"))  # a missing class must not shift the ids
    splits = opened(tmp_path)
    assert len(splits.train) == 9 and splits.train.classes == ["ant", "cat", "dog"]
    assert splits.test is not None and splits.test.classes == ["ant", "cat", "dog"] and len(splits.test) == 6
    assert_labels_match_pixels(splits.train)
    assert_labels_match_pixels(splits.test)
    assert splits.train.where(0).endswith("ant/ant_0.png")


def test_nested_and_foreign_files_in_class_folders(tmp_path: Path) -> None:
    write_tree(tmp_path / "train")
    (tmp_path / "train" / "cat" / "more").mkdir()
    (tmp_path / "train" / "cat" / "more" / "x.PNG").write_bytes(encoded(COLOURS["cat"]))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / "._cat_0.png").write_text("what macOS leaves beside a file")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / ".cache" / "y.png").write_bytes(b"")
    (tmp_path / "annotations").mkdir()
    splits = opened(tmp_path)
    assert len(splits.train) == 10 and splits.test is None
    assert_labels_match_pixels(splits.train)


def test_one_tree_of_classes_and_flat_folders(tmp_path: Path) -> None:
    write_tree(tmp_path / "a")
    splits = opened(tmp_path / "a")
    assert len(splits.train) == 9 and splits.test is None
    assert_labels_match_pixels(splits.train)
    write_tree(tmp_path / "b")
    for file in (tmp_path / "b").glob("*/*.png"):
        shutil.move(file, tmp_path / "b" / file.name)
    flat = opened(tmp_path / "b")
    assert len(flat.train) == 9 and flat.train.labels is None and flat.train.classes is None and flat.test is None
    write_tree(tmp_path / "c" / "train", classes=("cat",))
    assert opened(tmp_path / "c").train.labels is None  # one class says nothing


def test_a_class_that_is_called_train(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(encoded((1, 2, 3)))
    splits = opened(tmp_path)
    assert splits.train.classes == ["bus", "train"] and splits.test is None


def test_a_folder_beside_train_and_val_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "val")
    (tmp_path / "unlabeled").mkdir()
    (tmp_path / "unlabeled" / "1.png").write_bytes(encoded((1, 2, 3)))
    splits = opened(tmp_path)
    assert len(splits.train) == 9 and splits.train.classes == ["ant", "cat", "dog"]
    assert_labels_match_pixels(splits.test)
    assert "splits train, val; not used beside them: unlabeled\n" in capsys.readouterr().out
    chosen = opened(tmp_path, train_split="unlabeled")
    assert len(chosen.train) == 1 and chosen.train.classes is None


def test_images_beside_folders_are_a_set_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "tree")
    write_tree(tmp_path / "split" / "train")
    (tmp_path / "tree" / "logo.png").write_bytes(encoded((1, 2, 3)))
    (tmp_path / "split" / "logo.png").write_bytes(encoded((1, 2, 3)))
    (tmp_path / "tree" / "cat" / "trip").mkdir()
    (tmp_path / "tree" / "cat" / "trip" / "1.png").write_bytes(encoded((1, 2, 3)))
    tree = opened(tmp_path / "tree").train
    assert len(tree) == 11 and tree.labels is None
    told = "holds images (logo.png) beside folders of images (ant): all are taken, without classes\n"
    assert told in capsys.readouterr().out
    assert "beside folders of images (train)" in refused(tmp_path / "split")
    write_tree(tmp_path / "split" / "val")
    splits = opened(tmp_path / "split")
    assert len(splits.train) == 9 and splits.train.classes == ["ant", "cat", "dog"]
    assert "not used beside them: logo.png" in capsys.readouterr().out


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_links_that_lead_back_add_no_image_and_no_class(tmp_path: Path, target: str) -> None:
    write_tree(tmp_path / "set" / "train")
    (tmp_path / "set" / "train" / "cat" / "loop").symlink_to(target)
    (tmp_path / "set" / "train" / "up").symlink_to(target)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "set" / "train" / "dog", tmp_path / "elsewhere" / "dog")
    (tmp_path / "set" / "train" / "dog").symlink_to("../../elsewhere/dog")  # this one is meant
    splits = opened(tmp_path / "set")
    assert len(splits.train) == 9 and splits.train.classes == ["ant", "cat", "dog"]
    assert_labels_match_pixels(splits.train)


def test_what_was_found_is_told(tmp_path: Path) -> None:
    write_tree(tmp_path / "train")
    assert opened(tmp_path).train.describe("x") == "data: x: train, 9 images in 3 classes (ant, cat, dog)"
    assert opened(tmp_path / "train" / "ant").train.describe("ant") == "data: ant: train, 3 images without labels"


def kaggle(root: Path) -> Path:
    """Kaggle's unpacked archive: flat validation files in another order than their classes."""
    inner = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_tree(inner / "train")
    (inner / "val").mkdir()
    (inner / "test").mkdir()
    (inner / "test" / "t.png").write_bytes(encoded((0, 0, 0)))
    rows = [("ILSVRC_val_3", "ant"), ("ILSVRC_val_1", "dog"), ("ILSVRC_val_2", "cat")]
    for stem, name in rows:
        (inner / "val" / f"{stem}.png").write_bytes(encoded(COLOURS[name]))
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("ImageId", "PredictionString"), *((a, f"{b} 1 2 3 4 ") for a, b in rows)])
    return inner


def test_kaggle_and_official_imagenet_with_a_flat_val(tmp_path: Path) -> None:
    inner = kaggle(tmp_path)
    for splits in (opened(tmp_path), opened(inner, val_labels=str(tmp_path / "LOC_val_solution.csv"))):
        assert splits.test is not None and splits.test.name == "val"
        assert_labels_match_pixels(splits.train)
        assert_labels_match_pixels(splits.test)
    (tmp_path / "ground_truth.txt").write_text("dog\ncat\nant\n")
    assert_labels_match_pixels(opened(inner, val_labels=str(tmp_path / "ground_truth.txt")).test)


def test_labels_that_cannot_be_had_from_a_folder_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "classes")
    for key in ("label_column", "image_column"):
        assert f"data.{key}: given foo" in refused(tmp_path / "classes", **{key: "foo"})
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(encoded(COLOURS["cat"]))
    (tmp_path / "flat" / "labels.csv").write_text("file,label\na.png,cat\n")
    assert opened(tmp_path / "flat").train.labels is None
    assert "labels.csv is not read; labels come from one folder" in capsys.readouterr().out
    assert refused(tmp_path / "flat" / "labels.csv").endswith("give the folder of the images it names")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.fault("file and folder names that are no UTF-8", "read as any other; shown with \\udce9 and the like")
def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "dog").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    (tmp_path / "cat/cat_0.png").rename(tmp_path / "cat" / os.fsdecode(b"t\xeate.png"))
    images = opened(tmp_path).train
    assert len(images) == 9 and images.classes == ["ant", os.fsdecode(b"caf\xe9"), "cat"]
    for i in range(9):
        images.load(i)
    assert images.where(8) == str(tmp_path / "cat" / os.fsdecode(b"t\xeate.png"))


def test_a_folder_one_level_too_high_is_refused(tmp_path: Path) -> None:
    """It would train on the validation images, without labels."""
    write_tree(tmp_path / "up/set/train")
    write_tree(tmp_path / "up/set/val")
    assert refused(tmp_path / "up").endswith(
        f"holds one folder, set, with train and val in it; give {tmp_path / 'up/set'}"
    )
    assert opened(tmp_path / "up/set").train.classes == ["ant", "cat", "dog"]


def test_a_flat_val_without_or_with_wrong_labels_is_refused(tmp_path: Path) -> None:
    inner = kaggle(tmp_path)
    assert "data.val_labels: not given" in refused(inner)
    with pytest.raises(UserError, match=r"data\.val_labels: given .*none\.csv, no such file"):
        opened(inner, val_labels=str(tmp_path / "none.csv"))  # before the test split is asked for
    labels = tmp_path / "labels.txt"
    labels.write_text("dog\ncat\n")
    assert "2 lines" in refused(inner, val_labels=str(labels))
    labels.write_text("1\n2\n3\n")
    assert "numbers" in refused(inner, val_labels=str(labels))
    labels.write_text("dog\ncat\nyak\n")
    assert "class yak of split val" in refused(inner, val_labels=str(labels))
    files = sorted(file.name for file in (inner / "val").iterdir())
    labels.write_text("".join(f"{name} dog\n" for name in files))
    assert f"names a file in each line ({files[0]} dog)" in refused(inner, val_labels=str(labels))
    (tmp_path / "some.csv").write_text("ImageId,PredictionString\nILSVRC_val_1,dog 1 2 3 4\n")
    assert "no row for 2 of 3" in refused(inner, val_labels=str(tmp_path / "some.csv"))
    for name in ("latin.csv", "latin.txt"):
        (tmp_path / name).write_bytes(b"caf\xe9,caf\xe9\n" * 3)
        assert f"{name} cannot be read as text: UnicodeDecodeError" in refused(inner, val_labels=str(tmp_path / name))


def test_one_class_folder_is_a_labelled_val_if_it_is_trained_on(tmp_path: Path) -> None:
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "val", classes=("cat",))
    test = opened(tmp_path).test
    assert test is not None and test.labels is not None and test.labels.tolist() == [1, 1, 1]
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "yak")
    assert f"holds 3 files in one folder, yak, which is no class of {tmp_path / 'train'}; expected" in refused(tmp_path)


def test_an_empty_val_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "train")
    (tmp_path / "val").mkdir()
    assert opened(tmp_path).test is None
    assert f"data: {tmp_path / 'val'} holds no images, so it is no test split\n" in capsys.readouterr().out


def test_links_that_lead_nowhere_are_bad_images_and_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "flat.png").write_bytes(encoded(COLOURS["cat"]))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    images = opened(tmp_path).train
    assert len(images) == 2
    with pytest.raises(BadImage, match="No such file"):
        images.load(1)


def test_a_test_split_that_cannot_be_opened_hinders_no_pretraining(tmp_path: Path) -> None:
    splits = opened(kaggle(tmp_path / "flat"))  # a flat val/ without its label file
    assert len(splits.train) == 9
    (tmp_path / "flat/LOC_val_solution.csv").unlink()
    write_tree(tmp_path / "other/train", classes=("ant", "dog"))
    write_tree(tmp_path / "other/val")
    assert len(opened(tmp_path / "other").train) == 6


def test_a_flat_test_folder_may_have_no_labels(tmp_path: Path) -> None:
    write_tree(tmp_path / "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "test/1.png").write_bytes(encoded((1, 2, 3)))
    splits = opened(tmp_path)
    assert len(splits.train) == 9 and splits.test is None


def test_a_class_that_train_lacks_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", classes=("ant", "dog"))
    write_tree(tmp_path / "val")
    assert "class cat of split val is none of the 2 training classes" in refused(tmp_path)


def test_parquet_is_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    table(4).to_parquet(folder / "train-00000-of-00002.parquet")
    table(5).to_parquet(folder / "train-00001-of-00002.parquet")
    table(6).to_parquet(folder / "val-00000-of-00001.parquet")
    splits = opened(folder)
    assert len(splits.train) == 9 and splits.test is not None and len(splits.test) == 6
    assert_labels_match_pixels(splits.train)
    assert_labels_match_pixels(splits.test)
    assert not (tmp_path / "cache").exists()


def test_large_parquet_is_cached_and_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    table(6).to_parquet(folder / "train-00000-of-00001.parquet")
    monkeypatch.setattr(gcssl.tables, "IN_MEMORY", 10)
    splits = opened(folder, cache_dir=str(tmp_path / "cache"))
    assert_labels_match_pixels(splits.train)
    said = capsys.readouterr().out
    assert "KiB" in said and str(tmp_path / "cache") in said and any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("size", ["small", "large"])
def test_columns_that_nobody_asks_for_may_be_of_any_type(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other types in each shard; a map, which the datasets library has no type for. They are not copied either."""
    if size == "large":
        monkeypatch.setattr(gcssl.tables, "IN_MEMORY", 10)
    names = ["dog", "ant", "cat"]
    rows = pa.table({"jpg": [encoded(COLOURS[n]) for n in names], "cls": names})
    pairs = pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64()))
    folder = tmp_path / "set"
    folder.mkdir()
    for i, meta in enumerate((pa.array([1, 2, 3]), pa.array(list("xyz")))):
        pq.write_table(rows.append_column("meta", meta).append_column("pairs", pairs), folder / f"train-{i}.parquet")
    train = opened(folder, cache_dir=str(tmp_path / "cache")).train
    assert len(train) == 6
    assert_labels_match_pixels(train)
    assert (tmp_path / "cache").exists() == (size == "large")


def test_arrow_shards_may_differ_in_columns_that_nobody_asks_for(tmp_path: Path) -> None:
    for i, meta in enumerate(([1, 2, 3], list("xyz"))):
        table(3).add_column("meta", meta).save_to_disk(tmp_path / f"part{i}")
        shutil.copy(next((tmp_path / f"part{i}").glob("*.arrow")), tmp_path / f"train-{i}.arrow")
        shutil.rmtree(tmp_path / f"part{i}")
    assert_labels_match_pixels(opened(tmp_path).train)


def test_many_tables_without_a_split_are_told_in_a_short_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Spark names them."""
    for i in range(5):
        table(2).to_parquet(tmp_path / f"part-0000{i}-{i}a9b-c000.parquet")
    assert len(opened(tmp_path).train) == 10
    assert "part-00002-2a9b-c and 2 more are joined as train" in capsys.readouterr().out


def test_parquet_without_huggingface_metadata(tmp_path: Path) -> None:
    names = ["dog", "ant", "cat"]
    rows = pa.table({"jpg": [encoded(COLOURS[n]) for n in names], "cls": names})
    pq.write_table(rows, tmp_path / "train.parquet")
    splits = opened(tmp_path)
    assert splits.train.classes == ["ant", "cat", "dog"]
    assert_labels_match_pixels(splits.train)


def test_a_label_beyond_the_class_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    table(6).to_parquet(path)
    rows = pq.read_table(path)
    wrong = rows.set_column(rows.schema.get_field_index("label"), "label", pa.array([0, 1, 2, 0, 1, 3]))
    pq.write_table(wrong.replace_schema_metadata(rows.schema.metadata), path)
    assert "data.label_column: label 3 in split train of 3 classes" in refused(tmp_path)


def test_splits_in_the_names_of_tables_whatever_their_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table(4).to_parquet(tmp_path / "Train-00000-of-00001.parquet")
    table(3).to_parquet(tmp_path / "TEST.parquet")
    for keys in ({}, {"train_split": "Train"}, {"train_split": "train"}):
        data = opened(tmp_path, **keys)
        assert (len(data.train), len(data.test)) == (4, 3)
    assert "joined" not in capsys.readouterr().out
    (tmp_path / "more").mkdir()
    table(2).to_parquet(tmp_path / "more" / "cats.parquet")
    table(2).to_parquet(tmp_path / "more" / "dogs-1.parquet")
    assert len(opened(tmp_path / "more").train) == 4
    assert "more names a split: cats, dogs are joined as train" in capsys.readouterr().out
    table(2).to_parquet(tmp_path / "extra.PARQUET")
    assert len(opened(tmp_path).train) == 4
    assert "has the splits test, train; not used beside them: extra" in capsys.readouterr().out


def test_a_tables_own_name_counts_before_that_of_its_folder(tmp_path: Path) -> None:
    for root in (tmp_path / "train", tmp_path / "validation"):  # the name of data.path itself counts for nothing
        root.mkdir()
        table(4).to_parquet(root / "train-00000-of-00001.parquet")
        table(3).to_parquet(root / "test-00000-of-00001.parquet")
        assert {name: len(raw().reader) for name, raw in find_tables(DataConfig(path=str(root)), root).items()} == {
            "train": 4,
            "test": 3,
        }
    shards = tmp_path / "val"
    shards.mkdir()
    table(4).to_parquet(shards / "0000.parquet")
    assert set(find_tables(DataConfig(path=str(shards)), shards)) == {"train"}
    inside = tmp_path / "sets" / "train"
    inside.mkdir(parents=True)
    table(4).to_parquet(inside / "0000.parquet")
    table(3).to_parquet(inside / "test.parquet")
    data = opened(tmp_path / "sets")
    assert (len(data.train), len(data.test)) == (4, 3)


def test_the_test_split_is_not_the_training_split(tmp_path: Path) -> None:
    table(4).to_parquet(tmp_path / "train.parquet")
    assert "data.val_split: given train, which is trained on" in refused(tmp_path, val_split="train")
    with pytest.raises(UserError, match="^data.val_split: given nonsense, shapes has test; leave it out$"):
        open_data(DataConfig(path="shapes", val_split="nonsense"))


def test_one_parquet_file_and_shards_without_a_split(tmp_path: Path) -> None:
    table(3).to_parquet(tmp_path / "samples-00000-of-00002.parquet")
    table(3).to_parquet(tmp_path / "samples-00001-of-00002.parquet")
    assert len(opened(tmp_path).train) == 6
    assert len(opened(tmp_path / "samples-00001-of-00002.parquet").train) == 3


def test_tables_of_two_sets_are_not_joined(tmp_path: Path) -> None:
    for name in ("pets", "cars"):
        (tmp_path / name).mkdir()
        table(3).to_parquet(tmp_path / name / "train-0.parquet")
    line = refused(tmp_path)
    assert "train has tables in 2 folders" in line and "pets" in line and "cars" in line
    other = table(3).cast_column("label", datasets.ClassLabel(names=["bus", "car", "van"]))
    other.to_parquet(tmp_path / "pets" / "train-1.parquet")
    line = refused(tmp_path / "pets")
    assert "train-1.parquet has image and label of other types or classes than train-0.parquet" in line


def test_save_to_disk_arrow_and_webdataset(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(6), "test": table(3)}).save_to_disk(tmp_path / "saved")
    splits = opened(tmp_path / "saved")
    assert splits.test is not None and len(splits.test) == 3
    assert_labels_match_pixels(splits.train)
    (tmp_path / "arrow").mkdir()
    for i, file in enumerate(sorted((tmp_path / "saved" / "train").glob("*.arrow"))):
        shutil.copy(file, tmp_path / "arrow" / f"train-{i}.arrow")
    assert_labels_match_pixels(opened(tmp_path / "arrow").train)
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web" / "train-000.tar", "w") as tar:
        for i, name in enumerate(sorted(COLOURS)):
            for suffix, data in (("png", encoded(COLOURS[name])), ("cls", str(i).encode())):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    web = opened(tmp_path / "web", cache_dir=str(tmp_path / "cache")).train
    assert web.labels is not None and web.labels.tolist() == [0, 1, 2]
    assert tuple(web.load(1)[0, 0]) == COLOURS["cat"]


@pytest.mark.parametrize("stray", ["images.tar", "train.parquet", "train/stats.parquet", "notes/deep/x.arrow"])
def test_a_stray_table_hides_no_folders_of_images(
    tmp_path: Path, stray: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "val")
    write_tree(tmp_path / "tree")
    for root in (tmp_path, tmp_path / "tree"):
        (root / stray).parent.mkdir(parents=True, exist_ok=True)
        (root / stray).write_bytes(b"no table")
        splits = opened(root)
        assert splits.train.classes == ["ant", "cat", "dog"]
        assert_labels_match_pixels(splits.train)
        assert ("tables beside them are not used" in capsys.readouterr().out) == ("deep" not in stray)


@pytest.mark.fault("a class folder that cannot be listed", "one line names it; no class is left out silently")
@pytest.mark.parametrize("folder", ["train/cat", "train", ""])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "train")
    scan, bad = os.scandir, str(tmp_path / folder)

    def scandir(path: str | Path) -> object:
        if str(path) == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), bad)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=f"data.path: {bad} cannot be listed: Input/output error"):
        opened(tmp_path)


def test_a_file_systems_lost_files_are_no_class(tmp_path: Path) -> None:
    write_tree(tmp_path)
    write_tree(tmp_path / "lost+found")
    assert opened(tmp_path).train.classes == ["ant", "cat", "dog"]


def test_a_training_folder_with_classes_beside_another_is_a_split_only_if_asked_for(tmp_path: Path) -> None:
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "extras")
    with pytest.raises(UserError, match=r"train may be a split or a class; say data.train_split=train"):
        opened(tmp_path)
    assert opened(tmp_path, train_split="train").train.classes == ["ant", "cat", "dog"]


def test_classes_that_a_test_split_lacks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        write_tree(tmp_path / split)
    assert opened(tmp_path).test.classes == ["ant", "cat", "dog"] and "images of" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "val/cat")
    data = opened(tmp_path)
    assert data.test.classes == ["ant", "cat", "dog"] and set(data.test.labels.tolist()) == {0, 2}
    assert "data: split val has images of 2 of the 3 training classes\n" in capsys.readouterr().out


def test_folders_without_images_are_no_classes_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path)
    assert opened(tmp_path).train.classes == ["ant", "cat", "dog"] and "no classes" not in capsys.readouterr().out
    for name in ("bee", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes/readme.txt").write_text("nothing")
    assert opened(tmp_path).train.classes == ["ant", "cat", "dog"]
    assert f"data: {tmp_path}: folders without images are no classes (2): bee, notes\n" in capsys.readouterr().out


def test_a_part_of_a_set_is_named_by_places_or_by_a_mask(tmp_path: Path) -> None:
    write_tree(tmp_path)
    images = opened(tmp_path).train
    part = images.select(images.labels == 1)
    assert len(part) == (images.labels == 1).sum() > 0 and set(part.labels.tolist()) == {1}
    assert part.fingerprint == images.select(np.flatnonzero(images.labels == 1)).fingerprint
    assert len(images.select([])) == 0
    for wrong in ([0.9, 1.9], np.array([True])):
        with pytest.raises(ValueError, match="indices: whole numbers expected"):
            images.select(wrong)


def test_folders_below_class_folders_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path)
    assert opened(tmp_path).train.classes == ["ant", "cat", "dog"] and "below a class" not in capsys.readouterr().out
    (tmp_path / "cat/tabby").mkdir()
    (tmp_path / "cat/tabby/a.png").write_bytes(encoded(COLOURS["cat"]))
    assert opened(tmp_path).train.classes == ["ant", "cat", "dog"]
    assert "folders below a class folder count as that class, cat/tabby as cat\n" in capsys.readouterr().out


def test_a_test_split_alone_is_trained_on_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "test")
    assert opened(tmp_path).train.name == "test"
    assert f"data: {tmp_path} has no training split, so its test is trained on\n" in capsys.readouterr().out
    shutil.move(tmp_path / "test", tmp_path / "train")
    assert opened(tmp_path).train.name == "train" and "no training split" not in capsys.readouterr().out


def test_a_link_to_itself_is_no_folder(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert opened(tmp_path).train.classes == ["ant", "cat", "dog"]


def test_a_training_folder_that_is_asked_for_is_no_class(tmp_path: Path) -> None:
    for name in ("train", "extras"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded(COLOURS["cat"]))
    assert opened(tmp_path).train.classes == ["extras", "train"]
    train = opened(tmp_path, train_split="train").train
    assert train.classes is None and len(train) == 1


def test_tables_in_two_folders_beside_folders_of_images_are_not_used(tmp_path: Path) -> None:
    write_tree(tmp_path)
    for name in ("m1", "m2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.parquet").write_bytes(b"no table")
    assert opened(tmp_path).train.classes == ["ant", "cat", "dog"]


def test_tables_lie_in_the_folder_or_one_below(tmp_path: Path) -> None:
    for folder in ("data", ".cache", "assets"):
        (tmp_path / folder).mkdir()
    table(6).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / ".cache" / "x.parquet").write_bytes(b"no table")
    (tmp_path / "assets" / "logo.png").write_bytes(encoded((1, 2, 3)))  # of a Hub repository's readme
    assert len(opened(tmp_path).train) == 6
    (tmp_path / "other").mkdir()
    shutil.move(tmp_path / "data", tmp_path / "other" / "data")
    (tmp_path / "assets" / "logo.png").unlink()
    assert "give the folder that holds them" in refused(tmp_path)


def test_images_beside_a_metadata_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = ["file_name,label"]
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(encoded(colour))
        lines.append(f"{name}.png,{name}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    (folder / "unlisted.png").write_bytes(encoded((9, 9, 9)))
    train = opened(folder, cache_dir=str(tmp_path / "cache")).train
    assert len(train) == len(COLOURS)
    assert_labels_match_pixels(train)
    listed = len(COLOURS)
    assert f"1 of the {listed + 1} images in {folder} are not used: its metadata" in capsys.readouterr().out
    (folder / "unlisted.png").unlink()
    assert len(opened(folder, cache_dir=str(tmp_path / "cache")).train) == listed
    assert "metadata" not in capsys.readouterr().out


def test_the_test_split_is_the_first_labelled_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = table(3).remove_columns("label").add_column("label", [-1] * 3)
    table(6).to_parquet(tmp_path / "train.parquet")
    table(4).to_parquet(tmp_path / "test.parquet")
    hidden.to_parquet(tmp_path / "validation.parquet")
    splits = opened(tmp_path)
    assert splits.test is not None and splits.test.name == "test" and len(splits.test) == 4
    assert "validation has no labels" in capsys.readouterr().out
    assert "no labels" in refused(tmp_path, val_split="validation")
    chosen = opened(tmp_path, val_split="train", train_split="test")
    assert chosen.test is not None and (len(chosen.train), len(chosen.test)) == (4, 6)
    assert "expected one of" in refused(tmp_path, val_split="nope")
    assert "expected one of" in refused(tmp_path, train_split="nope")


def test_only_the_test_split(tmp_path: Path) -> None:
    write_tree(tmp_path / "val")
    splits = open_data(DataConfig(path=str(tmp_path)), only_test=True)
    assert splits.test is not None and len(splits.test) == 9
    assert_labels_match_pixels(splits.test)


def test_columns_are_found_or_asked_for(tmp_path: Path) -> None:
    table(6, label="fine_label", image="img").to_parquet(tmp_path / "train.parquet")
    assert_labels_match_pixels(opened(tmp_path).train)
    two = table(6).rename_column("label", "kind").add_column("colour", [0, 1, 2, 0, 1, 2])
    two = two.cast_column("colour", datasets.ClassLabel(names=["a", "b", "c"]))
    two.to_parquet(tmp_path / "train.parquet")
    assert "expected one of kind, colour" in refused(tmp_path)
    two.select_columns(["image", "kind"]).rename_column("image", "photo").to_parquet(tmp_path / "train.parquet")
    assert_labels_match_pixels(opened(tmp_path, label_column="kind").train)  # whatever its name
    two.to_parquet(tmp_path / "train.parquet")
    assert_labels_match_pixels(opened(tmp_path, label_column="kind").train)
    assert "expected one of the columns image, caption, kind, colour" in refused(tmp_path, image_column="nope")
    assert "expected one of the columns" in refused(tmp_path, label_column="nope")
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "train.parquet")
    assert "no image column" in refused(tmp_path) and refused(tmp_path).endswith("expected one of text")
    pq.write_table(pa.table({"m": [2], "n": [1]}), tmp_path / "train.parquet")
    assert refused(tmp_path).endswith("and none of m, n can hold images (bytes or paths)")
    pq.write_table(pa.table({"photos": [[b"a"]], "n": [1]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": [{"x": 1}]}), tmp_path / "other.parquet")
    assert "image of" in refused(tmp_path / "other.parquet") and "holds dict" in refused(tmp_path / "other.parquet")
    (tmp_path / "other.parquet").unlink()
    assert "none of photos, n" in refused(tmp_path) and "photos" in refused(tmp_path, image_column="photos")


def test_a_label_column_of_another_type_is_refused(tmp_path: Path) -> None:
    table(3).add_column("weight", [0.5, 1.0, 2.0]).to_parquet(tmp_path / "train.parquet")
    told = refused(tmp_path, label_column="weight")
    assert told.startswith("data.label_column: weight holds Value('float") and "expected integers or names" in told


def test_labels_are_read_without_decoding_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(6).to_parquet(tmp_path / "train.parquet")
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
    splits = opened(tmp_path)
    assert splits.train.labels is not None and splits.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert_labels_match_pixels(splits.train)


# --- mistakes


def test_missing_and_empty_paths(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nothing" / "here")
    assert "no such folder" in refused("nothing_here")
    assert "not given" in refused("")
    assert "is empty" in refused(tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    assert "no images" in refused(tmp_path)


@pytest.mark.fault(
    "damaged parquet and Arrow files",
    "refused in one line, never silently short",
)
def test_damaged_containers(tmp_path: Path) -> None:
    table(6).to_parquet(tmp_path / "train-0.parquet")
    sound = (tmp_path / "train-0.parquet").read_bytes()
    (tmp_path / "train-1.parquet").write_bytes(sound[: len(sound) // 2])
    assert "train-1.parquet is no sound parquet" in refused(tmp_path)
    (tmp_path / "train-1.parquet").write_bytes(b"")
    assert "train-1.parquet" in refused(tmp_path)
    (tmp_path / "disk").mkdir()
    table(6).save_to_disk(tmp_path / "disk/train")
    [arrow] = (tmp_path / "disk/train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:-200])
    assert "save_to_disk" in refused(tmp_path / "disk/train")
    (tmp_path / "arrow").mkdir()
    arrow.rename(tmp_path / "arrow/train-0.arrow")
    assert "no sound Arrow files" in refused(tmp_path / "arrow")


@pytest.mark.fault("a webdataset tar that was cut short", "refused in one line, never silently short")
def test_a_tar_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "train-0.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(6):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(content, "PNG")
            member = tarfile.TarInfo(f"{i:02d}.png")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    sound = path.read_bytes()
    assert len(opened(tmp_path, cache_dir=str(tmp_path / "cache")).train) == 6
    for kept in (3 * 1024, 4 * 1024, 5 * 1024 + 700, 700, 0):  # between two images, or inside of one
        path.write_bytes(sound[:kept])
        assert "train-0.tar is cut short" in refused(tmp_path, cache_dir=str(tmp_path / "cache"))


def test_a_hub_name_that_is_not_there(tmp_path: Path) -> None:
    assert "no such dataset on the Hub or in its cache" in refused(
        "gcssl-nobody/gcssl-nothing", cache_dir=str(tmp_path)
    )


# --- held-out slice


def images_of(labels: np.ndarray | None, n: int = 0, fingerprint: str = "f") -> Images:
    class Nothing:
        def __len__(self) -> int:
            return n if labels is None else len(labels)

        def read(self, _i: int) -> bytes:
            return b""

        def where(self, i: int) -> str:
            return str(i)

    classes = None if labels is None else [str(i) for i in range(int(labels.max()) + 1)]
    return Images(Nothing(), labels, classes, "train", fingerprint)


def test_the_held_out_slice_is_stratified_and_a_part() -> None:
    labels = np.repeat([0, 1, 2, 3], [1000, 200, 3, 1])
    rest, held = held_out(images_of(labels))
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(1204))
    assert np.bincount(labels[held], minlength=4).tolist() == [50, 10, 1, 0]  # a lone image stays in train
    assert len(held_out(images_of(labels), cap=20)[1]) <= 22
    assert np.array_equal(held, held_out(images_of(labels))[1])
    assert not np.array_equal(held, held_out(images_of(labels, fingerprint="g"))[1])
    assert not np.array_equal(np.diff(held[:50]), np.full(49, held[1] - held[0]))
    assert len(held_out(images_of(None, 1000))[1]) == 50
    assert len(held_out(images_of(None, 600_000))[1]) == 25_000


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write_tree(tmp_path / name / "train")
    (tmp_path / "c" / "train" / "ant" / "ant_0.png").write_bytes(encoded((9, 9, 9)))
    (tmp_path / "d" / "train" / "ant" / "ant_1.png").rename(tmp_path / "d" / "train" / "ant" / "ant_17.png")
    a, b, c, d = (opened(tmp_path / name).train.fingerprint for name in ("a", "b", "c", "d"))
    assert a == b and len({a, c, d}) == 3  # its three images are others, not the one that has another name


def test_select_keeps_labels_and_images_together(tmp_path: Path) -> None:
    write_tree(tmp_path / "train")
    part = opened(tmp_path).train.select(np.array([8, 0, 4]))
    assert len(part) == 3 and part.labels is not None and part.labels.tolist() == [2, 0, 1]
    assert_labels_match_pixels(part)
    assert part.where(0).endswith("dog_2.png")


def test_a_metadata_file_a_split_gives_labels_and_one_for_all_is_refused(tmp_path: Path) -> None:
    """The datasets library reads only those in the folders of the splits."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name, colour in COLOURS.items():
            (tmp_path / split / f"{name}.png").write_bytes(encoded(colour))
        rows = [f"{name}.png,{name}" for name in COLOURS]
        (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    splits = opened(tmp_path, cache_dir=str(tmp_path / "cache"))
    assert_labels_match_pixels(splits.train)
    assert_labels_match_pixels(splits.test)
    for split in ("train", "val"):
        (tmp_path / split / "metadata.csv").unlink()
    rows = [f"{split}/{name}.png,{name}" for split in ("train", "val") for name in COLOURS]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert "metadata.csv beside the folders train, val would not be read; give each" in refused(tmp_path)


def test_files_that_are_no_images_by_their_names_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path / "tree")
    for name in ("1.heic", "2.heic", "bare", "._x.heic", "t.csv"):
        (tmp_path / "tree/ant" / name).write_bytes(b"")
    (tmp_path / "tree/dog/3.jfif").write_bytes(encoded(COLOURS["dog"]))
    assert len(opened(tmp_path / "tree").train) == 10
    assert "tree: by their names no images, so not used: 2 .heic, 1 without a suffix\n" in capsys.readouterr().out
    assert len(opened(tmp_path / "tree/ant").train) == 3
    assert "ant: by their names no images, so not used: 2 .heic, 1 without a suffix\n" in capsys.readouterr().out
    for name in ("1.npy", "2.npy", "3.npy", "4.npy", "1.dcm", "2.dcm", "3.dcm", "1.txt"):
        (tmp_path / "tree/ant" / name).write_bytes(b"")
    opened(tmp_path / "tree/ant")
    assert "so not used: 4 .npy, 3 .dcm, 2 .heic, 2 of other suffixes\n" in capsys.readouterr().out


def test_folders_that_may_be_no_classes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, classes=("cat", "ant"))
    opened(tmp_path)
    assert capsys.readouterr().out == ""
    os.rename(tmp_path / "cat", tmp_path / "train_images")
    (tmp_path / "train.csv").write_text("x")
    opened(tmp_path)
    told = capsys.readouterr().out
    assert "train_images too; one of them alone is trained on by data.train_split=train_images" in told
    assert "train.csv is not read; labels come from one folder of images a class" in told
    assert len(opened(tmp_path, train_split="train_images").train) == 3
    assert "has no val folder; leave it out" in refused(tmp_path, val_labels=str(tmp_path / "train.csv"))


def test_two_folders_named_as_splits_are_no_classes(tmp_path: Path) -> None:
    write_tree(tmp_path / "training_set")
    write_tree(tmp_path / "test_set")
    assert "say data.train_split=training_set data.val_split=test_set, or rename them" in refused(tmp_path)
    splits = opened(tmp_path, train_split="training_set", val_split="test_set")
    assert splits.train.classes == ["ant", "cat", "dog"] and splits.test is not None and splits.test.name == "test_set"
    write_tree(tmp_path / "lorry")  # beside it they may be classes: a train, and a test bench
    assert opened(tmp_path).train.classes == ["lorry", "test_set", "training_set"]
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("train-1.png", "test-1.png"):  # images may be called so
        (flat / name).write_bytes(encoded((0, 0, 0)))
    assert len(opened(flat).train) == 2
    for name in ("test_a", "test_b"):
        write_tree(tmp_path / "tests" / name)
    assert opened(tmp_path / "tests").train.classes == ["test_a", "test_b"]


def test_which_of_two_test_splits_judges_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val", "test"):
        write_tree(tmp_path / split)
    splits = opened(tmp_path)
    assert splits.test is not None and splits.test.name == "val"
    assert "data: val judges; for test say data.val_split=test\n" in capsys.readouterr().out
    chosen = opened(tmp_path, val_split="test")
    assert chosen.test is not None and chosen.test.name == "test" and "judges" not in capsys.readouterr().out


def test_a_vanished_file_is_a_bad_image(tmp_path: Path) -> None:
    write_tree(tmp_path / "train")
    images = opened(tmp_path).train
    (tmp_path / "train" / "ant" / "ant_0.png").unlink()
    with pytest.raises(BadImage):
        images.load(0)
    images.load(1)


@pytest.mark.fault("a file server that is away, no open files left", "the run ends in one line, no image is replaced")
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EMFILE])
def test_a_fault_of_the_machine_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    write_tree(tmp_path / "train")
    images = opened(tmp_path).train
    loader = train_loader(TrainSet(images, lambda image, *_: {"image": image}, 0), [[(0, 4, 0)]], 1, 60)

    def away(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", away)
    with pytest.raises(Failure, match=rf"^\S*cat_1.png cannot be read: {os.strerror(number)}; this says nothing"):
        next(iter(loader))  # raised in its worker
    table = images_of(np.array([0, 1]))
    monkeypatch.setattr(type(table.reader), "read", away)
    with pytest.raises(Failure, match=r"^1 cannot be read"):
        table.load(1)
    with pytest.raises(Failure, match=r"^0 cannot be read"):
        Images(table.reader, None, None, "train")  # else it would be another set of images


def test_what_is_packed_is_to_be_unpacked(tmp_path: Path) -> None:
    for name in ("train.tar.gz", "train.zip"):
        (tmp_path / name).write_bytes(b"x")
        assert refused(tmp_path / name).endswith("unpack it")
    assert refused(tmp_path).endswith("unpack them")
    (tmp_path / "train.tar.gz").unlink()
    assert refused(tmp_path).endswith("unpack the zip")


def test_a_table_without_rows_holds_no_images(tmp_path: Path) -> None:
    table(0).to_parquet(tmp_path / "train.parquet")
    assert refused(tmp_path).endswith("holds no images")


def test_labels_that_are_missing_here_and_there_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(6).to_pandas()
    rows["label"] = ["a", "b", None, "b", None, "a"]
    rows.to_parquet(tmp_path / "train.parquet")
    assert opened(tmp_path).train.labels is None
    assert "2 of 6 labels of split train are missing, so it counts as unlabelled" in capsys.readouterr().out


def test_a_label_column_of_another_type_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(6).to_pandas()
    rows["label"] = [0.5, 1.0, 0.5, 1.0, 0.5, 1.0]
    rows.to_parquet(tmp_path / "train.parquet")
    assert opened(tmp_path).train.labels is None
    assert "column label holds Value('float64')" in capsys.readouterr().out


def test_a_metadata_file_with_other_columns_is_told_which_it_needs(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(COLOURS["ant"]))
    (tmp_path / "metadata.csv").write_text("file;label\na.png;1\n")
    assert refused(tmp_path).endswith("needs the column file_name, a csv commas, and every split a file of its own")


def test_a_folder_that_is_a_run_and_an_empty_cell_are_named(tmp_path: Path) -> None:
    for name in ("status.json", "env.json"):
        (tmp_path / name).write_text("[1")
    assert "it is the folder of a run, give that of its images" in refused(tmp_path)
    pq.write_table(pa.table({"jpg": [encoded((1, 2, 3)), None]}), tmp_path / "train.parquet")
    with pytest.raises(BadImage, match="column jpg is empty in this row"):
        opened(tmp_path / "train.parquet").train.load(1)


@pytest.mark.parametrize("others, told", [({"breed": ["pug"], "age": [3], "price": [1.5]}, "breed, age\n"), ({}, "")])
def test_columns_that_may_hold_labels_are_named_where_none_does_by_name(
    others: dict[str, list[object]], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"jpg": [encoded((1, 2, 3))], **others}), tmp_path / "train.parquet")
    assert opened(tmp_path).train.labels is None
    line = "data: no column is taken for labels; data.label_column= names one: "
    assert capsys.readouterr().out == (line + told if told else "")
