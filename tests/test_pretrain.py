"""The story: a run trains, stops, goes on bit for bit, refuses what cannot work, and leaves what its folder says."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gcssl.config import PretrainConfig, load_config
from gcssl.pretrain import pretrain
from gcssl.ssl.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "data.shapes_n=48", "data.workers=2", "train.batch_size=16", "train.warmup_epochs=1", "log.every=1",
    "eval.online_every=0", "checkpoint.every=0.3",
]  # fmt: skip


def config(objective: str, out: Path, *more: str) -> PretrainConfig:
    yaml = str(ROOT / f"configs/pretrain/{objective}_gcvit_nano.yaml")
    schemas = {name: schema for name, (_, schema) in OBJECTIVES.items()}
    return load_config(PretrainConfig, [yaml, *SMALL, f"out={out}", *more], schemas)


def command(objective: str, out: Path, *more: str) -> list[str]:
    yaml = f"configs/pretrain/{objective}_gcvit_nano.yaml"
    return [sys.executable, "pretrain.py", yaml, *SMALL, f"out={out}", *more]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    place = folder / f"checkpoints/step_{step:08d}"
    model, optimizer = load_file(place / "model.safetensors"), load_file(place / "optimizer.safetensors")
    return {**model, **{f"optimizer.{name}": value for name, value in optimizer.items()}}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, e.g. {different[0]}"


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"ended before {path.name}: {process.stderr.read() if process.stderr else ''}"
        assert time.monotonic() < end, f"{path} did not appear in {seconds} s"
        time.sleep(0.02)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_killed_run_resumes_bit_for_bit(objective: str, tmp_path: Path) -> None:
    """6 steps == 3 and more + kill -9 + the rest, with two workers, weights, optimizer, teacher and metrics."""
    pretrain(config(objective, tmp_path / "whole", "train.steps=6", "data.workers=0"))
    cut = tmp_path / "cut"
    process = subprocess.Popen(command(objective, cut, "train.steps=6"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(cut / "checkpoints/step_00000003", process)
    process.kill()
    process.wait()
    assert not (cut / "backbone.safetensors").exists()
    pretrain(config(objective, cut, "train.steps=6"))
    assert_same(weights(tmp_path / "whole", 6), weights(cut, 6))
    assert (tmp_path / "whole/backbone.safetensors").read_bytes() == (cut / "backbone.safetensors").read_bytes()
    timing = ("images_per_s", "data_wait")
    whole, resumed = (
        [{k: v for k, v in line.items() if k not in timing} for line in lines(folder)]
        for folder in (tmp_path / "whole", cut)
    )
    assert whole == resumed


def test_sigterm_saves_and_exits_75_and_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        command("simmim", out, "train.steps=400", "checkpoint.every=1000"), cwd=ROOT,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(out / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    status = json.loads((out / "status.json").read_text())
    assert (process.returncode, status["state"], status["exit_code"]) == (75, "preempted", 75), stderr
    assert 0 < status["step"] < 400 and (out / f"checkpoints/step_{status['step']:08d}").is_dir()
    assert "run the same command again" in stderr and "Traceback" not in stderr


def test_run_folder_holds_what_it_promises(tmp_path: Path) -> None:
    out = pretrain(config("joint", tmp_path / "a", "train.steps=3", "eval.online_every=1"))
    for name in (
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "backbone.safetensors",
        "backbone.json",
        "tensorboard",
    ):
        assert (out / name).exists(), name
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    steps = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    wanted = {
        "epoch",
        "loss/simmim",
        "loss/mocov3",
        "lr",
        "wd",
        "momentum",
        "grad_norm",
        "images_per_s",
        "data_wait",
    }
    assert wanted <= steps[0].keys()
    assert {"grad_norm/simmim", "grad_norm/mocov3"} <= steps[0].keys()
    assert any("online_knn/top1@20" in line for line in lines(out))
    info = json.loads((out / "backbone.json").read_text())
    assert (info["name"], info["objective"], info["encoder"], info["step"]) == (
        "gcvit_nano",
        "joint",
        "student",
        3,
    )


def test_a_new_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    first = pretrain(config("simmim", tmp_path / "a", "train.steps=2"))
    second = config("mocov3", tmp_path / "b", "train.steps=1", f"model.weights={first}", "train.blr=0.0")
    start, end = (
        load_file(first / "backbone.safetensors"),
        load_file(pretrain(second) / "backbone.safetensors"),
    )
    assert_same(start, end)  # one step at lr 0 leaves them where they began


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    process = subprocess.run(
        command("simmim", tmp_path / "a", "train.steps=6", "train.blr=1e30", "train.lr_rule=none"), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    status = json.loads((tmp_path / "a/status.json").read_text())
    assert (process.returncode, status["state"], status["exit_code"]) == (78, "failed", 78), process.stderr
    assert "not finite" in status["reason"] and "Traceback" not in process.stderr
    for folder in (tmp_path / "a/checkpoints").iterdir():
        assert all(torch.isfinite(v).all() for v in load_file(folder / "model.safetensors").values()), folder


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The whole program under torchrun on two gloo processes: the same losses, kNN and weights as one process."""
    argv = ["train.steps=3", "eval.online_every=1", "train.global_batch=16", "model.drop_path=0.2"]
    pretrain(config("joint", tmp_path / "one", *argv))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = command("joint", tmp_path / "two", *argv, "train.batch_size=8", "data.workers=0")
    done = subprocess.run([*torchrun, *two[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two/env.json").read_text())["processes"] == 2
    for one, both in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in one.keys() - {"images_per_s", "data_wait"}:
            assert one[name] == pytest.approx(both[name], rel=1e-3, abs=1e-5), f"step {one['step']} {name}"
    a, b = (load_file(tmp_path / n / "backbone.safetensors") for n in ("one", "two"))
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    assert worst < 2e-4  # three AdamW steps of up to 6e-5 each: rounding decides the sign of tiny gradients
