"""Bad input ends in one line that names what was given and what is expected, exit 2, with nothing written over."""

import hashlib
import io
import json
import pickle
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gcssl import pretrain
from gcssl.checkpoint import save_checkpoint
from gcssl.config import TrainConfig
from gcssl.errors import UserError
from gcssl.eval import compare, finetune, knn, linear_probe
from gcssl.loader import run_sizes
from gcssl.runtime import entry

ROOT = Path(__file__).resolve().parent.parent
YAML = str(ROOT / "configs/pretrain/simmim_gcvit_nano.yaml")
TINY = ["data.shapes_n=32", "data.workers=0", "train.batch_size=16", "train.steps=1", "eval.online_every=0"]


class Canary:
    """Pickles into a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a program's main; returns its one line of complaint."""

    def run(module, *argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, getattr(sys, name))  # which entry replaces
        with pytest.raises(SystemExit) as stop:
            entry(module.main)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        stderr = capsys.readouterr().err
        assert stop.value.code == 2, stderr
        assert stderr.startswith("gcssl: ") and stderr.count("\n") == 1, stderr
        return stderr

    return run


def folder(path: Path) -> dict[str, str]:
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name != ".lock"]
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.epoch=3", ["train.epoch", "did you mean train.epochs?"]),
        ("train.epochs=many", ["train.epochs", "many", "whole number"]),
        ("model.name=gcvit_tinny", ["gcvit_tinny", "gcvit_tiny"]),
        ("objective.name=simmin", ["simmin", "did you mean simmim?"]),
        ("objectiv.name=simmim", ["objectiv.name", "did you mean objective.name?"]),
        ("model.img_size=100", ["100", "32", "96", "128"]),
        ("objective.mask_unit=12", ["mask_unit=12", "8"]),
        ("objective.mask_ratio=1.5", ["mask_ratio=1.5", "0 and 1"]),
        ("objective.mask_unit=32 objective.mask_ratio=0.9", ["mask_ratio=0.9", "hides all of the 4 mask units"]),
        ("train.steps=0", ["train.steps", "given 0", "at least 1"]),
        ("train.epochs=-1", ["train.epochs", "given -1", "at least 1"]),
        ("model.name=vgg11 model.window_ratio=null model.drop_path=0.1", ["model.drop_path=0.1", "has no drop path"]),
        ("data.path=no/such/folder", ["data.path", "no/such/folder"]),
        ("train.global_batch=17", ["train.global_batch", "17", "16"]),
        ("train.precision=fp8", ["train.precision", "fp8", "bf16"]),
        ("model.weights=no/such/run", ["no/such/run", "run"]),
        ("train.shard=true train.compile=true", ["train.shard", "train.compile=true"]),
        ("checkpoint.keep=1", ["checkpoint.keep", "1", "2"]),
        ("log.every=0", ["log.every", "0", "at least 1"]),
        ("encoder=teacher", ["encoder=teacher", "simmim has no teacher"]),
        ("out=/dev/null/run data.path=no/such/folder", ["out: given /dev/null/run", "/dev/null is a file"]),
        ("out=gcssl/ data.path=gcssl", ["out: given gcssl/, the folder of the images"]),
        ("objective.mask_unit=12 data.path=no/such/folder", ["mask_unit=12"]),  # before any image is listed
    ],
)
def test_pretraining_refuses(argument: str, words: list[str], tmp_path: Path, refused) -> None:
    line = refused(pretrain, YAML, *TINY, f"out={tmp_path / 'run'}", *argument.split())
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("mocov3", []),
        ("joint", []),
        ("dino", ["objective.koleo_weight=0.1"]),
    ],
)
def test_objectives_that_compare_images_refuse_accumulation_and_a_batch_of_one(
    objective: str, more: list[str], tmp_path: Path, refused
) -> None:
    yaml = YAML.replace("simmim", objective)
    more = [*TINY, *more, f"out={tmp_path / 'run'}"]
    line = refused(pretrain, yaml, *more, "train.global_batch=32")
    assert "train.accumulate=2" in line and objective in line and "processes" in line
    assert all(key in line for key in more if "koleo" in key)
    line = refused(pretrain, yaml, *more, "train.batch_size=1", "train.global_batch=1")
    assert "batch_size=1" in line and "two at least" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "key", "lower"),
    [
        ({"batch_size": 1024}, "train.batch_size=1024", "train.batch_size"),
        ({"batch_size": 128, "accumulate": 8}, "train.accumulate=8", "train.accumulate"),
        ({"batch_size": 128, "global_batch": 2048}, "train.global_batch=2048", "train.global_batch"),
        ({"batch_size": 1024, "global_batch": 2048}, "train.global_batch=2048", "train.global_batch"),
        ({"batch_size": 512, "accumulate": 2}, "train.accumulate=2", "train.accumulate and train.batch_size"),
    ],
)
def test_a_batch_larger_than_the_set_names_the_keys_to_lower(given: dict[str, int], key: str, lower: str) -> None:
    with pytest.raises(UserError) as refused:
        run_sizes(TrainConfig(**given), 703, 2)
    line = str(refused.value)
    assert line.startswith(f"{key}: the global batch of 2048") and line.endswith(f"703 training images; lower {lower}")


@pytest.mark.parametrize(("n_images", "said"), [(250, True), (1290, False), (256, False)])
def test_images_that_an_epoch_leaves_out_are_told(
    n_images: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run_sizes(TrainConfig(batch_size=128), n_images, 1)
    assert ("leaves out 122 of 250 images" in capsys.readouterr().out) == said


def test_a_warm_up_longer_than_the_run_is_said() -> None:
    for warmup, said in ((10, True), (3, False), (0, False)):
        train = TrainConfig(epochs=3, batch_size=8, warmup_epochs=warmup)
        line = run_sizes(train, 80, 1).describe(train)
        assert line.endswith("; train.warmup_epochs=10 is longer than the run's 3 epochs: the lr only rises") == said
        assert "\n" not in line


def test_one_image_a_class_leaves_none_for_the_probe(tmp_path: Path, refused) -> None:
    for i in range(16):
        (tmp_path / f"data/{i}").mkdir(parents=True)
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"data/{i}/a.png")
    argv = [YAML, *TINY, f"out={tmp_path / 'run'}", f"data.path={tmp_path / 'data'}", "eval.online_every=1"]
    line = refused(pretrain, *argv)
    assert "eval.online_every=0" in line and "one image a class" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "test_split", "argv", "words"),
    [
        (linear_probe, True, [], "the probe chooses its setting"),
        (finetune, True, ["finetune.holdout=true", "train.batch_size=2", "train.steps=1"], "finetune.holdout=false"),
        (knn, False, [], "give a test split"),
    ],
)
def test_one_image_a_class_leaves_none_for_an_evaluation(
    module, test_split: bool, argv: list[str], words: str, tmp_path: Path, refused
) -> None:
    for split in ("train", "val") if test_split else ("train",):
        for i in range(4):
            (tmp_path / f"data/{split}/{i}").mkdir(parents=True)
            Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"data/{split}/{i}/a.png")
    argv = ["backbone=random", f"data.path={tmp_path / 'data'}", f"out={tmp_path / 'e'}", "data.workers=0", *argv]
    line = refused(module, *argv, "model.img_size=64")
    assert "one image a class" in line and words in line
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(("module", "task"), [(knn, "knn"), (linear_probe, "linear_probe"), (finetune, "finetune")])
def test_a_result_of_other_settings_is_told_before_anything_is_opened(module, task, tmp_path: Path, refused) -> None:
    (tmp_path / f"{task}.json").write_text(json.dumps({"settings": {"old": 5}}))
    line = refused(module, "backbone=random", "model.name=gcvit_nano", "data.path=no/such/folder", f"out={tmp_path}")
    assert "holds a result of other settings" in line


def test_empty_folder_and_folder_without_images(tmp_path: Path, refused) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/notes.txt").write_text("no image")
    for name in ("empty", "text"):
        line = refused(pretrain, YAML, *TINY, f"out={tmp_path / 'run'}", f"data.path={tmp_path / name}")
        assert "data." in line and name in line and "image" in line


def test_table_without_an_image_column(tmp_path: Path, refused) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a", "b"], "number": [1, 2]}).to_parquet(tmp_path / "train-0.parquet")
    line = refused(pretrain, YAML, *TINY, f"out={tmp_path / 'run'}", f"data.path={tmp_path}")
    assert "data.image_column" in line and line.strip().endswith("expected one of text")  # integers hold no images
    line = refused(
        pretrain, YAML, *TINY, f"out={tmp_path / 'run'}", f"data.path={tmp_path}", "data.image_column=number"
    )
    assert "data.image_column: number" in line and "holds int64, expected an image a row" in line


def test_used_run_folder_with_another_config_is_left_alone(tmp_path: Path, refused) -> None:
    out = tmp_path / "run"
    pretrain.main([YAML, *TINY, f"out={out}"])
    before = folder(out)
    line = refused(pretrain, YAML, *TINY, f"out={out}", "train.blr=0.5")
    assert "train.blr" in line and "0.5" in line
    assert folder(out) == before


def test_checkpoint_of_another_architecture(tmp_path: Path, refused) -> None:
    pretrain.main([YAML, *TINY, f"out={tmp_path / 'a'}"])
    size = ["model.name=gcvit_xxtiny"]
    line = refused(pretrain, YAML, *TINY, *size, f"out={tmp_path / 'b'}", f"model.weights={tmp_path / 'a'}")
    assert str(tmp_path / "a") in line and "gcvit_xxtiny" in line


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".bin", ".pt"])
@pytest.mark.fault(
    "a malicious pickle as .pth, .pth.tar, .bin, .pt",
    "refused in one line, nothing runs",
)
def test_malicious_pickle_is_refused_and_nothing_runs(suffix: str, tmp_path: Path, refused) -> None:
    canary, evil = tmp_path / "canary", tmp_path / f"weights{suffix}"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "args": Canary(canary)}, evil)
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.read_text() == "executed"  # the canary sings when it is let
    canary.unlink()
    for module, argv in (
        (pretrain, [YAML, *TINY, f"out={tmp_path / 'run'}", f"model.weights={evil}"]),
        (knn, [f"backbone={evil}", "data.path=shapes", "data.shapes_n=32", f"out={tmp_path / 'e'}"]),
    ):
        assert str(evil) in refused(module, *argv)
        assert not canary.exists()


@pytest.mark.fault(
    "a malicious pickle as .npy, as torch.distributed.checkpoint's metadata, beside images in a tar",
    "refused in one line or not read, nothing runs",
)
def test_pickles_in_other_places_do_not_run(tmp_path: Path, refused) -> None:
    canary, array, folder, tars = (tmp_path / name for name in ("canary", "evil.npy", "dcp", "tars"))
    np.save(array, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    folder.mkdir(), tars.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Canary(canary)))
    for evil in (array, folder):
        assert str(evil) in refused(knn, f"backbone={evil}", "data.path=shapes", f"out={tmp_path / 'e'}")
    with tarfile.open(tars / "train-0.tar", "w") as tar:
        for i in range(20):
            png = io.BytesIO()
            Image.new("RGB", (64, 64), (i, i, i)).save(png, "PNG")
            contents = {"png": png.getvalue(), "cls": b"%d" % (i % 2), "pkl": pickle.dumps(Canary(canary))}
            for suffix, content in contents.items():
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    keys = [f"data.path={tars}", f"data.cache_dir={tmp_path / 'cache'}", f"out={tmp_path / 'run'}"]
    pretrain.main([YAML, *TINY, *keys])  # the images are read, what is beside them is not
    assert not canary.exists()


@pytest.mark.fault("a result named ../../x", "refused; nothing is written outside the run folder")
def test_names_stay_in_the_folder(tmp_path: Path, refused) -> None:
    pretrain.main([YAML, *TINY, f"out={tmp_path / 'a/b'}"])
    before = sorted(tmp_path.rglob("*"))
    line = refused(knn, f"backbone={tmp_path / 'a/b'}", "data.path=shapes", "data.shapes_n=32", "name=../../../x")
    assert "name: '../../../x' given" in line and sorted(tmp_path.rglob("*")) == before


PROC = sys.platform == "linux"  # where root too may not write


@pytest.mark.parametrize("module", [knn, linear_probe, finetune])
def test_evaluations_refuse(module, tmp_path: Path, refused) -> None:
    for argv, words in (
        ([], ["backbone", "run folder"]),
        (["backbone=no/such/run"], ["no/such/run"]),
        (["backbone=random", f"out={tmp_path}"], ["data.path"]),
        (["backbone=random", "data.path=shapes", f"out={__file__}"], [f"{__file__} is a file"]),
        *([(["backbone=random", "data.path=shapes", "out=/proc/run"], ["/proc may not be written to"])] * PROC),
        (["backbone=random", "data.path=shapes"], ["out"]),
        (["bakbone=random"], ["did you mean backbone?"]),
    ):
        line = refused(module, *argv)
        assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("features=[]", "features: given [], expected a list of at least one value, one of last"),
        ("lrs=[0]", "lrs: given [0.0], expected above 0"),
        ("head_batch=0", "head_batch: given 0, expected at least 1"),
        ("batch_size=0", "batch_size: given 0, expected at least 1"),
        (
            "scale=[0.5,0.2]",
            "scale: given [0.5, 0.2], expected a list of 2 numbers, each above 0 and at most 1, the smaller",
        ),
        ("scale=[0,1]", "scale: given [0.0, 1.0], expected a list of 2 numbers, each above 0"),
    ],
)
def test_the_probe_refuses_what_it_cannot_try(argument: str, words: str, tmp_path: Path, refused) -> None:
    assert words in refused(linear_probe, "backbone=random", f"out={tmp_path / 'r'}", "data.shapes_n=20", argument)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("ks=[]", "ks: given [], expected a list of at least one value, at least 1"),
        ("ks=[0]", "ks: given [0], expected at least 1"),
        ("temperature=0", "temperature: given 0.0, expected above 0"),
    ],
)
def test_knn_refuses_what_it_cannot_count(argument: str, words: str, tmp_path: Path, refused) -> None:
    assert words in refused(knn, "backbone=random", f"out={tmp_path / 'r'}", "data.shapes_n=20", argument)


def test_an_evaluation_takes_weights_from_backbone_alone(tmp_path: Path, refused) -> None:
    keys = ["backbone=random", "model.name=gcvit_nano", "data.path=shapes", f"out={tmp_path}"]
    assert "model.weights=runs/a: an evaluation takes its weights from backbone=" in refused(
        knn, *keys, "model.weights=runs/a"
    )
    assert "eval.online_every: no such key" in refused(knn, *keys, "eval.online_every=2")


def test_only_fine_tuning_trains_from_scratch(tmp_path: Path, refused) -> None:
    line = refused(knn, "backbone=random", "compare=none", "model.name=gcvit_nano", f"out={tmp_path}")
    assert line == "gcssl: compare=none: from scratch, as only finetune trains; an untrained one is compare=random\n"


def test_unlabelled_images_cannot_be_probed(tmp_path: Path, refused) -> None:
    for i in range(4):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{i}.png")
    line = refused(knn, "backbone=random", f"data.path={tmp_path}", f"out={tmp_path / 'e'}", "model.img_size=64")
    assert line.startswith(
        f"gcssl: data.path: split train has no labels, and evaluations need them: {tmp_path} does not hold one"
    )


def test_the_folder_above_a_run_and_a_wrong_comparison_are_told(tmp_path: Path, refused) -> None:
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/config.yaml").touch()
    line = refused(knn, f"backbone={tmp_path / 'runs'}", "data.path=shapes")
    assert f"give a run folder, such as {tmp_path / 'runs/a'}, or out=<folder>" in line
    line = refused(knn, "backbone=random", "compare=nothing", "data.path=shapes", f"out={tmp_path}")
    assert line == "gcssl: compare=nothing: no such run, checkpoint or file; expected the path of one, or random\n"


def test_a_typo_stops_the_whole_program_before_it_writes(tmp_path: Path) -> None:
    """As a user starts it."""
    argv = [sys.executable, "pretrain.py", YAML, f"out={tmp_path / 'run'}", "train.epoch=3"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_of_another_kind_is_named(tmp_path: Path, refused) -> None:
    """A folder where a result is expected, an ONNX file as a backbone, a checkpoint as a run folder."""
    assert "a folder; expected a result" in refused(compare, tmp_path, tmp_path)
    onnx = tmp_path / "a.onnx"
    onnx.write_bytes(b"onnx")
    assert "ONNX cannot be read back" in refused(knn, f"backbone={onnx}", "data.path=shapes", f"out={tmp_path / 'e'}")
    checkpoint = save_checkpoint(tmp_path / "run", 1, {"model": {"x": torch.zeros(1)}}, {}, keep=2)
    before = sorted(checkpoint.iterdir())
    assert "is a checkpoint; give the folder of its run" in refused(pretrain, YAML, *TINY, f"out={checkpoint}")
    assert [file for file in sorted(checkpoint.iterdir()) if file.name != ".lock"] == before
