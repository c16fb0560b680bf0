"""Long faults: random kills, a full disk, damaged images in a whole run, thousands of steps. `make test-faults`."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gcssl.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, verify
from gcssl.config import PretrainConfig, load_config
from gcssl.errors import CannotWrite, Preempted
from gcssl.pretrain import pretrain
from gcssl.ssl.objectives import OBJECTIVES, SCHEMAS

ROOT = Path(__file__).resolve().parent.parent
KEYS = [
    "data.shapes_n=48", "data.workers=0", "train.batch_size=16", "train.warmup_epochs=1", "log.every=1",
    "log.trackers=[]", "eval.online_every=0", "checkpoint.every=0.3",
]  # fmt: skip
pytestmark = pytest.mark.slow


def config(out: Path, *more: str) -> PretrainConfig:
    argv = [str(ROOT / "configs/pretrain/simmim_gcvit_nano.yaml"), *KEYS, f"out={out}", *more]
    return load_config(PretrainConfig, argv, SCHEMAS)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


OTHERS = [name for name in OBJECTIVES if name != "joint"]


@pytest.mark.fault(
    "kill -9 at random moments of three epochs (joint: 20 times with each of 0, 2, 4 workers; all others: 3 times)",
    "weights, optimizer, teacher, queue, centre, metrics: bit for bit those of an uninterrupted run",
)
@pytest.mark.parametrize(
    ("workers", "kills", "names"),
    [(0, 20, ["joint"]), (2, 20, ["joint"]), (4, 20, ["joint"]), (2, 3, OTHERS), (2, 3, ["finetune"])],
    ids=["joint-0", "joint-2", "joint-4", "others", "finetune"],
)
def test_killed_at_random(workers: int, kills: int, names: list[str], tmp_path: Path) -> None:
    argv = [sys.executable, str(ROOT / "tests/killed_runs.py"), str(tmp_path), str(kills), str(workers), *names]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and done.stdout.count("different: nothing") == len(names), (
        done.stdout + done.stderr[-2000:]
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 MB: two checkpoints of this run (36 MB each) fit, a third beside them does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.fault(
    "a disk that is full at the third checkpoint", "one line with MB needed and free; the last good one serves"
)
@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_full_disk(on_error: str, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = small_disk / "run"
    keys = ["train.steps=4", "checkpoint.keep=2", f"checkpoint.on_error={on_error}"]
    told = r"cannot be written: .*it takes 36 MB and the disk has \d+ MB free; make room"
    if on_error == "stop":
        with pytest.raises(CannotWrite, match=told):
            pretrain(config(out, *keys))
        assert json.loads((out / "status.json").read_text())["exit_code"] == 1
    else:
        pretrain(config(out, *keys))  # to the end: there is room for the backbone
        assert "training goes on (checkpoint.on_error=warn)" in capsys.readouterr().out
    assert [path.name[-1] for path in list_checkpoints(out)] == ["2", "1"]
    assert all(verify(path) is None for path in list_checkpoints(out))
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    whole = pretrain(config(tmp_path / "whole", "train.steps=4"))
    assert pretrain(config(out, *keys)) == out
    assert (out / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()


def damaged_images(root: Path, count: int = 300) -> set[str]:
    """`count` images, of which six are damaged, each in another way; their names."""
    root.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i:03d}.png")
    png, jpg = (root / "000.png").read_bytes(), root / "100.jpg"
    Image.open(root / "100.png").save(jpg)
    (root / "100.png").unlink()
    kinds = {
        "100.jpg": jpg.read_bytes()[:700],
        "101.png": png[:900],
        "102.png": b"",
        "103.png": b"<html>404</html>",
        "104.png": os.urandom(500),
        "105.png": png[:60] + bytes(40) + png[100:],
    }
    for name, content in kinds.items():
        (root / name).write_bytes(content)
    return set(kinds)


@pytest.mark.fault(
    "1 % damaged images of every kind, two epochs",
    "the run ends; each listed once with path and reason, alike in all layouts",
)
def test_damaged_images_in_a_whole_run(tmp_path: Path) -> None:
    bad = damaged_images(tmp_path / "data")
    losses = {}
    for name, keys in {
        "a": ["data.workers=0"],
        "b": ["data.workers=3", "train.batch_size=50", "train.accumulate=2"],
    }.items():
        out = tmp_path / name
        keys = [f"data.path={tmp_path / 'data'}", "train.batch_size=100", "train.epochs=2", "data.max_bad=0.03", *keys]
        pretrain(config(out, *keys))
        listed = lines(out / "bad_samples.jsonl")
        assert sorted(Path(one["path"]).name for one in listed) == sorted(bad) and all(one["reason"] for one in listed)
        losses[name] = [line["loss"] for line in lines(out / "metrics.jsonl")]
    assert losses["a"] == pytest.approx(losses["b"], rel=1e-3)  # the same replacements, in both epochs


@pytest.mark.fault("200 checkpoints saved and loaded", "memory and open files stay level")
def test_many_checkpoints_leak_nothing(tmp_path: Path) -> None:
    process, tensors = psutil.Process(), {"model": {"w": torch.randn(500, 1000)}}
    used = []
    for step in range(200):
        save_checkpoint(tmp_path, step, tensors, {}, 2)
        assert load_checkpoint(tmp_path).step == step  # type: ignore[union-attr]
        used.append((process.memory_info().rss, process.num_fds()))
    assert used[-1][1] == used[20][1]
    assert used[-1][0] - used[20][0] < 20e6  # of 400 MB written


@pytest.mark.fault(
    "5,000 steps, with ten interruptions", "memory and open files stay level; each step told exactly once"
)
def test_a_long_run_stays_level(tmp_path: Path) -> None:
    process, used = psutil.Process(), []
    keys = ["data.shapes_n=16", "train.batch_size=2", "model.img_size=32", "objective.mask_unit=16"]
    keys += ["train.steps=5000", "log.every=10", "log.trackers=[tensorboard]", "checkpoint.every=50"]
    keys += ["model.window_ratio=[16,16,16,32]"]
    for i in range(10):
        with pytest.raises(Preempted):
            pretrain(config(tmp_path, *keys, f"train.max_hours={0.002 * (1 + i % 2)}"))
        used.append((process.memory_info().rss, process.num_fds()))
    pretrain(config(tmp_path, *keys))
    used.append((process.memory_info().rss, process.num_fds()))
    assert used[-1][1] <= used[2][1] and used[-1][0] - used[2][0] < 60e6, used
    told = [line["step"] for line in lines(tmp_path / "metrics.jsonl")]
    assert told == list(range(10, 5001, 10))
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == told
    assert all(v.isfinite().all() for v in load_file(tmp_path / "backbone.safetensors").values())
