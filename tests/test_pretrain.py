"""The story: a run trains, stops, goes on bit for bit, refuses what cannot work, and leaves what its folder says."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gcssl.pretrain as program
import gcssl.state
from gcssl.config import PretrainConfig, load_config
from gcssl.errors import NumericStop, Preempted, UserError
from gcssl.eval.online import OnlineProbe
from gcssl.pretrain import build_pretrain_backbone, pretrain
from gcssl.ssl.ema import momentum_at
from gcssl.ssl.objectives import OBJECTIVES, SCHEMAS
from gcssl.ssl.simmim import SimMIM

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "data.shapes_n=48", "data.workers=2", "train.batch_size=16", "train.warmup_epochs=1", "log.every=1",
    "eval.online_every=0", "checkpoint.every=0.3",
]  # fmt: skip


def config(objective: str, out: Path, *more: str) -> PretrainConfig:
    yaml = str(ROOT / f"configs/pretrain/{objective}_gcvit_nano.yaml")
    return load_config(PretrainConfig, [yaml, *SMALL, f"out={out}", *more], SCHEMAS)


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


TIMING = ("images_per_s", "data_wait")


def told(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines(folder)]


def update(start: dict[str, torch.Tensor], folder: Path) -> torch.Tensor:
    """What training changed in the backbone, as one vector."""
    end = load_file(folder / "backbone.safetensors")
    return torch.cat([(end[name] - start[name]).flatten() for name in sorted(end)])


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.double(), b.double(), dim=0).item()


def write_images(root: Path, count: int, classes: int, broken: int = 0) -> Path:
    """`count` images of noise in `classes` folders (0: none); the first `broken` are no images."""
    for i in range(count):
        folder = root / f"class{i % classes}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).resize((72, 72)).save(folder / f"{i:02d}.png")
        if i < broken:
            (folder / f"{i:02d}.png").write_text("no image")
    return root


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"ended before {path.name}: {process.stderr.read() if process.stderr else ''}"
        assert time.monotonic() < end, f"{path} did not appear in {seconds} s"
        time.sleep(0.02)


FAST = ("joint",)  # a teacher, buffers and two parts


@pytest.mark.parametrize(
    "objective", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES]
)
@pytest.mark.fault(
    "kill -9 after a checkpoint, every objective",
    "weights, optimizer, metrics: bit for bit those of an uninterrupted run",
)
def test_killed_run_resumes_bit_for_bit(objective: str, tmp_path: Path) -> None:
    """6 steps == 3 and more + kill -9 + the rest, two workers, drop path: weights, optimizer, teacher and metrics."""
    args = ["train.steps=6", "model.drop_path=0.2"]
    pretrain(config(objective, tmp_path / "whole", *args, "data.workers=0"))
    cut = tmp_path / "cut"
    process = subprocess.Popen(command(objective, cut, *args), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(cut / "checkpoints/step_00000003", process)
    process.kill()
    process.wait()
    assert not (cut / "backbone.safetensors").exists()
    pretrain(config(objective, cut, *args))
    assert_same(weights(tmp_path / "whole", 6), weights(cut, 6))
    assert (tmp_path / "whole/backbone.safetensors").read_bytes() == (cut / "backbone.safetensors").read_bytes()
    assert told(tmp_path / "whole") == told(cut)


EPOCHS = ["data.shapes_n=32", "train.batch_size=32", "train.steps=3", "eval.online_every=1", "model.drop_path=0.2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of one step with drop path, probe and pictures."""
    return pretrain(config("simmim", tmp_path_factory.mktemp("whole"), *EPOCHS))


@pytest.mark.fault(
    "train.max_hours over, at the end of an epoch",
    "saved; probe, pictures and weights as if uninterrupted",
)
def test_a_run_stopped_by_the_clock_loses_nothing(whole: Path, tmp_path: Path) -> None:
    """Neither the probe and the pictures of the epoch at whose end it stopped, nor a bit of the weights."""
    with pytest.raises(Preempted, match="step 1 of 3 .train.max_hours=0 are over"):
        pretrain(config("simmim", tmp_path, *EPOCHS, "train.max_hours=0"))
    state = json.loads((tmp_path / "checkpoints/step_00000001/state.json").read_text())
    assert state["default_encoder"] == "student"
    pretrain(config("simmim", tmp_path, *EPOCHS))
    assert_same(weights(whole, 3), weights(tmp_path, 3))
    assert told(whole) == told(tmp_path)
    assert [line["step"] for line in lines(tmp_path) if "online_knn/top1@20" in line] == [1, 2, 3]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    shown = board.Images("reconstructions")
    assert [event.step for event in shown] == [1, 2, 3]
    originals = [np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))[:64] for event in shown]
    assert all(np.array_equal(originals[0], one) for one in originals) and originals[0].std() > 0  # to be compared


def test_the_probe_changes_no_bit_and_may_be_left_out_on_the_way(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        pretrain(config("simmim", tmp_path, *EPOCHS, "train.max_hours=0"))
    pretrain(config("simmim", tmp_path, *EPOCHS, "eval.online_every=0"))
    assert_same(weights(whole, 3), weights(tmp_path, 3))
    assert not any("online_knn/top1@20" in line for line in lines(tmp_path))


@pytest.mark.fault(
    "resumed with another micro-batch and accumulation",
    "the same losses within 1e-3, the same direction of training",
)
def test_accumulation_and_a_resume_in_another_layout_change_nothing(whole: Path, tmp_path: Path) -> None:
    """Step 1 as 16 x 2, the rest as 8 x 4, against 32 x 1."""
    with pytest.raises(Preempted):
        pretrain(config("simmim", tmp_path, *EPOCHS, "train.batch_size=16", "train.accumulate=2", "train.max_hours=0"))
    cfg = config("simmim", tmp_path, *EPOCHS, "train.batch_size=8", "train.global_batch=32")
    pretrain(cfg)
    for one, other in zip(lines(whole), lines(tmp_path), strict=True):
        for name in one.keys() & {"loss", "grad_norm", "lr", "wd", "epoch"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3), f"step {one['step']} {name}"
    start = build_pretrain_backbone(config("simmim", tmp_path / "none", *EPOCHS)).state_dict()
    assert agreement(update(start, whole), update(start, tmp_path)) > 0.99


@pytest.mark.fault(
    "SIGTERM to the trainer",
    "a checkpoint, exit 75, the same command goes on",
)
def test_sigterm_saves_and_exits_75_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """The second time under `accelerate launch`, as the recipes say it, which must not warn of anything."""
    out = tmp_path / "run"
    argv = command("simmim", out, "train.steps=16", "checkpoint.every=1000")
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(out / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    status = json.loads((out / "status.json").read_text())
    assert (process.returncode, status["state"], status["exit_code"]) == (75, "preempted", 75), stderr
    assert "SIGTERM" in status["reason"]
    assert 0 < status["step"] < 16 and (out / f"checkpoints/step_{status['step']:08d}").is_dir()
    assert "run the same command again" in stderr and "Traceback" not in stderr
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "-q"]
    launch += ["--config_file", "configs/accelerate/one.yaml", *argv[1:]]
    again = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert all(line.startswith("step ") for line in again.stderr.splitlines()), again.stderr
    assert f"resumed from step_{status['step']:08d}" in again.stdout
    assert [line["step"] for line in lines(out)] == list(range(1, 17))


@pytest.mark.fault(
    "SIGTERM during the online probe",
    "ends at once; the next start measures what was left out",
)
def test_a_signal_during_the_probe_is_not_kept_waiting(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is there already; the next start measures what was left out, and loses nothing."""
    measured = OnlineProbe.__call__

    def told_to_stop(self: OnlineProbe, step: int, objective: object) -> dict[str, float]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            pytest.fail("it waited")
        return measured(self, step, objective)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="stopped at step 2 of 3 .SIGTERM"):
        patch.setattr(OnlineProbe, "__call__", told_to_stop)
        pretrain(config("simmim", tmp_path, *EPOCHS, "checkpoint.every=100"))
    assert [line["step"] for line in lines(tmp_path) if "online_rankme" in line] == [1]
    pretrain(config("simmim", tmp_path, *EPOCHS, "checkpoint.every=100"))
    assert told(whole) == told(tmp_path)
    assert_same(weights(whole, 3), weights(tmp_path, 3))


def test_run_folder_holds_what_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken: list[tuple[int, int]] = []  # (step about to be saved, step that status.json speaks of)

    def spying(folder: Path, step: int, *rest) -> Path:
        spoken.append((step, json.loads((folder / "status.json").read_text())["step"]))
        return save_checkpoint(folder, step, *rest)

    save_checkpoint = gcssl.state.save_checkpoint
    monkeypatch.setattr(gcssl.state, "save_checkpoint", spying)
    out = pretrain(config("joint", tmp_path / "a", "train.steps=3", "eval.online_every=1", "objective.momentum=0.8"))
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
    assert spoken == [(1, 0), (2, 1), (3, 2)]  # never of a checkpoint that is not there yet
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
    assert [line["momentum"] for line in steps] == pytest.approx([momentum_at(step, 3, 0.8) for step in (1, 2, 3)])
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
    asked = config("mocov3", tmp_path / "c", "train.steps=1", f"model.weights={first}", "encoder=teacher")
    pretrain(asked)  # of the new run: what it began from has none
    assert json.loads((tmp_path / "c/backbone.json").read_text())["encoder"] == "teacher"
    shutil.rmtree(first)
    pretrain(second)  # its checkpoint holds all that it needs


@pytest.mark.fault(
    "a learning rate that makes every loss infinite",
    "stops with exit 78; no checkpoint holds a number that is not finite",
)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NumericStop, match="not finite"):
        pretrain(config("simmim", tmp_path / "a", "train.steps=6", "train.blr=1e30", "train.lr_rule=none"))
    status = json.loads((tmp_path / "a/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 78) and "not finite" in status["reason"]
    for folder in (tmp_path / "a/checkpoints").iterdir():
        assert all(torch.isfinite(v).all() for v in load_file(folder / "model.safetensors").values()), folder


def test_unlabelled_images_pretrain_without_a_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, make_accelerator = [], program.make_accelerator
    monkeypatch.setattr(program, "make_accelerator", lambda *cfg: made.append(make_accelerator(*cfg)) or made[-1])
    monkeypatch.setattr(SimMIM, "pictures", lambda *_: pytest.fail("nobody looks at them"))
    data = write_images(tmp_path / "data", 16, classes=0)
    more = [f"data.path={data}", "train.steps=1", "eval.online_every=1", "log.trackers=[]"]
    out = pretrain(config("simmim", tmp_path / "run", *more))
    assert "no labels" in capsys.readouterr().out
    assert [line["step"] for line in lines(out)] == [1] and "online_knn/top1@20" not in lines(out)[0]
    assert made[0]._models == made[0]._optimizers == []  # the next fit with it begins with nothing


@pytest.mark.fault(
    "more bad images than data.max_bad, a half-written list",
    "the run stops in one line, with all of them listed",
)
def test_bad_images_are_listed_and_too_many_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_images(tmp_path / "data", 24, classes=2, broken=2), tmp_path / "run"
    more = [f"data.path={data}", "train.batch_size=8", "train.steps=6"]
    with pytest.raises(UserError, match="data.max_bad=0.05: 2 of 24 images cannot be decoded"):
        pretrain(config("simmim", out, *more, "data.max_bad=0.05"))
    assert json.loads((out / "status.json").read_text())["state"] == "refused"
    with (out / "bad_samples.jsonl").open("a") as file:
        file.write('{"index": 7, "pa')  # as a kill may leave it
    pretrain(config("simmim", out, *more, "data.max_bad=0.2"))
    bad = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(Path(one["path"]).name for one in bad) == ["00.png", "01.png"]
    assert all(one["reason"] and "\n" not in one["reason"] for one in bad)
    assert lines(out)[-1]["bad_images"] == 2
    assert "2 of 24 images cannot be decoded and were replaced" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.fault(
    "two processes instead of one",
    "the losses, kNN, weights and bad images of one",
)
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The whole program under torchrun on two gloo processes: the losses, kNN, weights and bad images of one."""
    data = write_images(tmp_path / "data", 48, classes=4, broken=2)
    argv = [f"data.path={data}", "data.max_bad=0.1", "train.steps=3", "eval.online_every=1"]
    argv += ["train.global_batch=16", "model.drop_path=0.2"]
    cfg = config("joint", tmp_path / "one", *argv)
    pretrain(cfg)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = command("joint", tmp_path / "two", *argv, "train.batch_size=8", "data.workers=0")
    done = subprocess.run([*torchrun, *two[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two/env.json").read_text())["processes"] == 2
    for one, both in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for name in one.keys() - set(TIMING):
            close = 1e-2 if name == "prediction_std" else 1e-3  # each process takes the former of its own images
            assert one[name] == pytest.approx(both[name], rel=close, abs=1e-5), f"step {one['step']} {name}"
    listed = [sorted((tmp_path / n / "bad_samples.jsonl").read_text().splitlines()) for n in ("one", "two")]
    assert listed[0] == listed[1] and len(listed[0]) == 2
    start = build_pretrain_backbone(config("joint", tmp_path / "none", *argv)).state_dict()
    moved = update(start, tmp_path / "one")
    assert agreement(moved, update(start, tmp_path / "two")) > 0.99
    pretrain(config("joint", tmp_path / "half", *argv, "train.batch_size=8", "train.global_batch=8"))
    assert agreement(moved, update(start, tmp_path / "half")) < 0.9  # what half of each batch would have taught


@pytest.mark.fault(
    "two processes that find different checkpoints",
    "refused in one line",
)
def test_processes_that_share_no_folder_are_refused(whole: Path, tmp_path: Path) -> None:
    """One process finds a checkpoint, the other does not: each would go its own way."""
    shutil.copytree(whole, tmp_path / "run0")
    program_of_one = (
        "import os, sys, gcssl.runfolder; from gcssl.pretrain import main; from gcssl.runtime import entry\n"
        "gcssl.runfolder.SHOWN_WITHIN = 0\n"
        "sys.argv[-1] += os.environ['RANK']; entry(main)\n"
    )
    (tmp_path / "own.py").write_text(program_of_one)
    argv = command("simmim", tmp_path / "run", *EPOCHS, "train.batch_size=16", "data.workers=0")[2:]
    argv = [*(one for one in argv if not one.startswith("out=")), f"out={tmp_path / 'run'}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*torchrun, str(tmp_path / "own.py"), *argv], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert done.returncode != 0 and "run0 is another folder for process 1" in done.stderr, done.stderr[-3000:]
