"""The doctor: each check finds what it is for, and nothing in a healthy run; verify-resume and replay."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

import gcssl.doctor as doctor
from gcssl.config import PretrainConfig, load_config
from gcssl.data import Images
from gcssl.doctor import CHECKS
from gcssl.dryrun import DoctorConfig, DryRun, examine
from gcssl.errors import Failure, NumericStop, Preempted, UserError
from gcssl.eval.finetune import Classifier, FinetuneConfig
from gcssl.eval.finetune import run as finetune
from gcssl.pretrain import pretrain
from gcssl.runtime import make_accelerator
from gcssl.ssl.objectives import SCHEMAS
from gcssl.ssl.simmim import SimMIM
from gcssl.trial import differences, duration, rate, replay, verify_resume

YAML = Path(__file__).parents[2] / "configs/pretrain"
SMALL = ["data.shapes_n=256", "data.workers=0", "train.batch_size=16", "train.warmup_epochs=1", "doctor.minutes=0"]


def config(objective: str, *more: str) -> DoctorConfig:
    return load_config(DoctorConfig, [str(YAML / f"{objective}_gcvit_nano.yaml"), *SMALL, *more], SCHEMAS)


def verdicts(dry: DryRun) -> dict[str, str]:
    return {name: check(dry).verdict for name, check in CHECKS.items()}


def folder(root: Path, train: int = 30, val: int = 10) -> Path:
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            place = root / split / f"class{i % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(1000 * count + i).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).resize((80, 80)).save(place / f"{i:02d}.png")
    return root


@pytest.mark.parametrize("objective", ["joint", "ibot", "mae", "ummae", "vicreg"])
def test_a_healthy_run(objective: str, tmp_path: Path) -> None:
    dry = examine(config(objective, f"out={tmp_path / 'run'}"))
    assert set(verdicts(dry).values()) == {"ok"}
    assert not (tmp_path / "run").exists()


def test_bad_images_and_small_classes(tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    (data / "train/class0/00.png").write_text("no image")
    dry = examine(config("simmim", f"data.path={data}", "train.batch_size=8", "data.max_bad=0.05"))
    found = doctor.check_images(dry)
    assert found.verdict == "warn" and "1 cannot be decoded: " in found.told and "00.png" in found.told
    assert doctor.check_classes(dry).verdict == "warn"
    dry.cfg.data.max_bad = 0.01
    assert doctor.check_images(dry).verdict == "FAIL"
    assert doctor.check_images(dry).told.endswith("; more than data.max_bad=0.01")
    for i in range(1, 8):
        (data / f"train/class0/{i:02d}.png").write_text("no image")
    many = examine(
        config("simmim", f"data.path={data}", "train.batch_size=8", "data.max_bad=0.01", "doctor.minutes=0.01")
    )
    told = doctor.check_images(many).told
    assert told.count("class0/0") == 5 and "8 cannot be decoded: " in told and "and 3 more" in told
    assert doctor.check_first_steps(many).verdict != "FAIL"  # the check above has told what is to be told


def test_what_evaluations_will_refuse_and_classes_of_one_name_are_warnings(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", train=60)
    (data / "val/class0").rename(data / "val/other")
    (data / "train/class1").rename(data / "train/Class0")
    dry = examine(config("simmim", f"data.path={data}", "train.batch_size=8"))
    found = doctor.check_images(dry)
    assert found.verdict == "warn" and "evaluations will refuse the test split: data.path: class " in found.told
    found = doctor.check_classes(dry)
    assert found.verdict == "warn" and "Class0 and class0 are two classes, by case alone" in found.told


def test_an_image_that_kills_a_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, load = folder(tmp_path / "data"), Images.load

    def deadly(self: Images, i: int) -> np.ndarray:
        if get_worker_info() and self.where(i).endswith("07.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, i)

    monkeypatch.setattr(Images, "load", deadly)
    with pytest.raises(Failure, match="workers were reading .*07.png"):
        examine(config("simmim", f"data.path={data}", "train.batch_size=8", "data.workers=1"))


def test_a_signal_stops_the_doctor_and_not_its_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = SimMIM.forward

    def signalled(self: Any, batch: dict[str, Any], step: int) -> dict[str, Any]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch, step)

    monkeypatch.setattr(SimMIM, "forward", signalled)
    with pytest.raises(Preempted, match="SIGTERM"):
        doctor.check_first_steps(examine(config("simmim", "doctor.minutes=1")))


def test_a_part_of_the_images_is_one_of_all_classes(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", train=64)
    dry = examine(config("simmim", f"data.path={data}", "train.batch_size=8", "doctor.scan=16"))
    index = dry.seen["train"].index
    assert len(index) == 16 and 0 < (dry.data.train.labels[index] == 1).sum() < 16


def test_test_images_in_train_are_found_also_when_they_were_saved_again(tmp_path: Path) -> None:
    data = folder(tmp_path / "data")
    keys = [f"data.path={data}", "train.batch_size=8"]
    assert doctor.check_duplicates(examine(config("simmim", *keys))).verdict == "ok"
    shutil.copy(data / "train/class1/03.png", data / "val/class1/copy.png")
    Image.open(data / "train/class0/04.png").save(data / "val/class0/again.jpg", quality=80)
    found = doctor.check_duplicates(examine(config("simmim", *keys)))
    assert found.verdict == "warn"
    assert (
        "1 are pixel by pixel among 30 of the 30 training images, 2 nearly so" in found.told
        and "again.jpg" in found.told
    )
    assert "class0/04.png" in found.told
    shutil.rmtree(data / "val")  # then evaluations hold images of train out
    keys[0] = f"data.path={data}/train"
    assert "of 2 held-out images 0 are" in doctor.check_duplicates(examine(config("simmim", *keys))).told
    pixels = (data / "train/class0/04.png").read_bytes()
    for path in (data / "train").glob("*/*.png"):
        path.write_bytes(pixels)
    found = doctor.check_duplicates(examine(config("simmim", *keys)))
    assert found.verdict == "warn" and "of 2 held-out images 1 are pixel by pixel among 28 of the 30" in found.told


def test_windows_that_see_little() -> None:
    found = doctor.check_sizes(examine(config("simmim", "model.window_ratio=null")))  # 64 px at the default ratio
    assert found.verdict == "warn" and "2x2" in found.told


def test_a_share_that_units_cannot_give_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The objective is made twice: without storage, to see what it refuses, and then for the run."""
    examine(config("simmim", "objective.mask_unit=32", "data.shapes_n=32"))
    assert capsys.readouterr().out.count("mask: 3 of 4 units are hidden") == 1


def test_a_backbone_that_mixes_images(monkeypatch: pytest.MonkeyPatch) -> None:
    dry = examine(config("simmim"))
    stem = dry.backbone.stem.forward
    monkeypatch.setattr(dry.backbone.stem, "forward", lambda x, *a: stem(x, *a) + 1e-3 * x.mean())
    assert doctor.check_batch_mates(dry).verdict == "FAIL"


def test_a_mask_that_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens alone are hidden, after the stem, as SimMIM does on Swin."""
    monkeypatch.setattr("gcssl.ssl.simmim.hide_pixels", lambda x, *_: x)
    found = doctor.check_mask_leak(examine(config("simmim")))
    assert found.verdict == "FAIL" and "stem.conv1" in found.told


def test_parameters_without_a_gradient_and_wild_ones() -> None:
    dry = examine(config("simmim"))
    dry.objective.register_parameter("idle", torch.nn.Parameter(torch.zeros(2)))
    found = doctor.check_gradients(dry)
    assert found.verdict == "FAIL" and "1 parameters get no gradient (idle)" in found.told
    dry = examine(config("simmim"))
    with torch.no_grad():
        next(dry.objective.parameters()).fill_(math.inf)
    assert "not finite" in doctor.check_gradients(dry).told


def test_a_disk_too_small_and_a_warm_up_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    dry = examine(config("simmim", "train.epochs=2", "train.warmup_epochs=5"))
    assert doctor.check_batch(dry).verdict == "warn"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: dataclasses.make_dataclass("Usage", ["free"])(50_000_000))
    found = doctor.check_disk(dry)
    assert found.verdict == "FAIL" and "checkpoints of 36 MB take 0.11 GB, 0.1 GB are free" in found.told


def test_checkpoints_that_are_kept_for_ever_count() -> None:
    for steps in ("train.epochs=10", "train.steps=160"):  # epochs of 16 steps
        told = doctor.check_disk(examine(config("simmim", steps, "checkpoint.keep_every=2"))).told
        assert "checkpoints of 36 MB take 0.29 GB" in told  # two, one being written, five


def test_waiting_for_data_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(cfg: PretrainConfig) -> None:
        line = {"step": 1, "loss": 1.0, "images_per_s": 10.0, "data_wait": shares[0]}
        (Path(cfg.out) / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")

    monkeypatch.setattr("gcssl.trial.pretrain", waiting)
    dry = examine(config("simmim", "doctor.minutes=1"))
    shares = [0.15]
    assert doctor.check_first_steps(dry).verdict == "ok"
    shares = [0.25]
    assert doctor.check_first_steps(dry).verdict == "warn"


def test_the_first_step_is_no_part_of_the_speed_unless_it_is_alone() -> None:
    slow, fast = {"images_per_s": 1.0}, {"images_per_s": 100.0}
    assert rate([slow, fast, fast]) == pytest.approx(100.0)
    assert rate([slow]) == pytest.approx(1.0)


def test_the_gain_of_compilation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def clocked(cfg: PretrainConfig) -> None:
        speed = 300.0 if cfg.train.compile else 200.0
        line = {"step": 1, "loss": 1.0, "images_per_s": speed, "data_wait": 0.0}
        (Path(cfg.out) / "metrics.jsonl").write_text(f"{json.dumps(line)}\n")

    monkeypatch.setattr("gcssl.trial.pretrain", clocked)
    told = doctor.check_first_steps(examine(config("simmim", "doctor.minutes=1", "train.compile=true"))).told
    assert "300 images/s" in told and told.endswith("without train.compile 200 images/s")


def test_the_first_steps_are_real_and_leave_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    dry = examine(config("simmim", "doctor.minutes=0.01", "train.epochs=3"))
    found = doctor.check_first_steps(dry)
    assert found.verdict == "ok" and "images/s" in found.told and "minutes on one process" in found.told
    assert capfd.readouterr().out == ""
    wild = examine(config("simmim", "doctor.minutes=1", "train.blr=1e30", "train.lr_rule=none"))
    assert doctor.check_first_steps(wild).verdict == "FAIL"


def test_what_pretraining_refuses_is_refused_or_a_failed_check(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="simclr compares the images of a micro-batch"):
        examine(config("simclr", "train.accumulate=2"))
    examine(config("simclr", "train.global_batch=32", "train.batch_size=16", "doctor.processes=2"))
    with pytest.raises(UserError, match="is a file; give another folder"):
        examine(config("simmim", f"out={__file__}"))
    single = folder(tmp_path / "single", 2, 2)  # one image a class
    with pytest.raises(UserError, match="eval.online_every: with one image a class"):
        examine(config("simmim", f"data.path={single}", "train.batch_size=2"))
    data = folder(tmp_path / "data")
    for file in (data / "train").rglob("*.png"):
        file.write_text("no image")
    dry = examine(config("simmim", f"data.path={data}", "train.batch_size=8", "doctor.minutes=0.1"))
    found = doctor.check_first_steps(dry)
    assert found.verdict == "FAIL" and "images in a row cannot be decoded" in found.told


def test_two_processes_take_half_the_time() -> None:
    keys = ["train.global_batch=32", "train.batch_size=16", "train.steps=9000000", "doctor.minutes=0.005"]
    # simclr refuses accumulation, so one process must take its part of the global batch
    told = doctor.check_first_steps(examine(config("simclr", *keys, "doctor.processes=2"))).told
    speed, hours = re.search(r"(\d+) images/s.* take (\S+) hours .* days. on 2 processes", told).groups()  # type: ignore[union-attr]
    assert float(hours) == pytest.approx(9e6 * 32 / float(speed) / 2 / 3600, rel=0.05)


def test_a_failed_check_is_exit_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("gcssl.ssl.simmim.hide_pixels", lambda x, *_: x)
    with pytest.raises(UserError, match="1 of 10 checks failed: mask leak"):
        doctor.main([str(YAML / "simmim_gcvit_nano.yaml"), *SMALL])
    rows = capsys.readouterr().out
    assert "FAIL  mask leak" in rows and "ok    gradients" in rows


# ---- runs in a temporary folder


def run(out: Path, *more: str) -> Path:
    keys = ["data.shapes_n=16", "data.workers=0", "train.batch_size=8", "train.warmup_epochs=1", "log.every=1"]
    keys += ["log.trackers=[]", "eval.online_every=0", "train.steps=4", f"out={out}", *more]
    return pretrain(load_config(PretrainConfig, [str(YAML / "simmim_gcvit_nano.yaml"), *keys], SCHEMAS))


def test_differences_of_two_runs_are_named(tmp_path: Path) -> None:
    one, same = run(tmp_path / "one"), run(tmp_path / "same")
    assert differences(one, same) == []
    other = run(tmp_path / "other", "train.seed=1")
    found = differences(one, other)
    assert any(name.startswith("model encoder.") for name in found) and "step 1, loss" in found


def test_an_incident_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = SimMIM.forward

    def poisoned(self: Any, batch: dict[str, Any], step: int) -> dict[str, Any]:
        out = forward(self, batch, step)
        return {**out, "loss": out["loss"] * (math.nan if step >= 2 else 1.0)}

    with monkeypatch.context() as patch:
        patch.setattr(SimMIM, "forward", poisoned)
        with pytest.raises(NumericStop):
            run(tmp_path / "run", "train.max_bad_steps=1")
        incident = tmp_path / "run/incidents/after_step_2"
        before = sorted(path.name for path in incident.rglob("*"))
        replay([str(incident)])
        told = capsys.readouterr().out
        first = json.loads((incident / "incident.json").read_text())["steps"][0]
        assert f"replay: reproduced: {first['reason']}; images {first['indices']}" in told
        assert sorted(path.name for path in incident.rglob("*")) == before  # it works on a copy
    with pytest.raises(NumericStop, match="not reproduced: then loss nan.* now a good step"):
        replay([str(incident)])
    with pytest.raises(UserError, match="expected a folder RUN/incidents"):
        replay([str(tmp_path)])


def test_the_incident_of_a_fine_tuning_from_saved_weights_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = run(tmp_path / "run", "train.steps=1")
    keys = ["data.shapes_n=32", "data.workers=0", "train.batch_size=8", "train.epochs=1", "train.max_bad_steps=1"]
    yaml = YAML.parent / "eval/finetune_demo.yaml"
    cfg = load_config(FinetuneConfig, [str(yaml), f"backbone={start}", "log.trackers=[]", *keys])
    forward = Classifier.forward

    def poisoned(self: Any, batch: dict[str, Any], step: int) -> dict[str, Any]:
        out = forward(self, batch, step)
        return {**out, "loss": out["loss"] * (math.nan if step >= 1 else 1.0)}

    monkeypatch.setattr(Classifier, "forward", poisoned)
    with pytest.raises(NumericStop):
        finetune(cfg, make_accelerator(cfg.train, cfg.runtime))
    replay([str(next((start / "eval/finetune/incidents").iterdir()))])
    assert "replay: reproduced: loss nan" in capsys.readouterr().out


def test_a_collapse_at_the_last_step_has_no_step_to_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gcssl.collapse.PATIENCE", 2)
    monkeypatch.setattr("gcssl.collapse.LEAST_PREDICTION_STD", 1e9)  # a sign that stays
    with pytest.raises(NumericStop, match="step 3: collapse"):
        run(tmp_path, "train.steps=3", "train.warmup_epochs=0.5", "train.on_collapse=stop")
    with pytest.raises(UserError, match="step 3 was the run's last: none follows"):
        replay([str(tmp_path / "incidents/after_step_3")])
    assert "replay: the run stopped: step 3: collapse" in capsys.readouterr().out


def test_a_resume_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With programs that train nothing in place of the runs; the second one is killed."""
    seconds = iter(["0", "60", "0"] * 2)

    def start(_: PretrainConfig, out: Path) -> subprocess.Popen[str]:
        (out / "checkpoints/step_00000003").mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(["sleep", next(seconds)], stderr=subprocess.PIPE, text=True, start_new_session=True)

    monkeypatch.setattr("gcssl.trial.start", start)
    monkeypatch.setattr("gcssl.trial.differences", lambda *_: ["model a", "step 4, loss"])
    with pytest.raises(NumericStop, match="verify-resume: killed after step 1: 2 differ: model a"):
        verify_resume(config("simmim"))
    monkeypatch.setattr("gcssl.trial.differences", lambda *_: [])
    assert "equal bit for bit" not in capsys.readouterr().out
    verify_resume(config("simmim"))
    assert "equal bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize(("gpu", "asked", "said"), [(True, False, True), (True, True, False), (False, False, False)])
def test_on_a_gpu_a_resume_is_verified_with_kernels_that_give_the_same_bits(
    gpu: bool, asked: bool, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []

    def start(cfg: PretrainConfig, out: Path) -> None:
        del out
        found.append(cfg.train.deterministic)
        raise UserError("far enough")

    monkeypatch.setattr("gcssl.trial.start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(UserError, match="far enough"):
        verify_resume(config("simmim", f"train.deterministic={str(asked).lower()}"))
    assert found == [gpu or asked]
    assert ("with train.deterministic=true" in capsys.readouterr().out) == said


def test_one_process_verifies_its_part_of_a_run_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """simclr refuses to accumulate: eight images a step are one process's, not four times two."""
    asked = []

    def start(cfg: PretrainConfig, out: Path) -> None:
        del out
        asked.append(cfg.train)
        raise UserError("far enough")

    monkeypatch.setattr("gcssl.trial.start", start)
    with pytest.raises(UserError, match="far enough"):
        verify_resume(config("simclr", "train.batch_size=2", "train.global_batch=8"), 4)
    assert (asked[0].global_batch, asked[0].accumulate, asked[0].batch_size) == (None, 1, 2)


def test_a_run_that_ends_before_it_is_killed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = iter(["exit 0", "echo gcssl: the disk is full >&2; exit 2"])

    def start(_: PretrainConfig, out: Path) -> subprocess.Popen[str]:
        del out
        argv = ["sh", "-c", next(programs)]
        return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)

    monkeypatch.setattr("gcssl.trial.start", start)
    with pytest.raises(UserError, match="the run itself failed: gcssl: the disk is full"):
        verify_resume(config("simmim"))


@pytest.mark.slow
@pytest.mark.fault("python -m gcssl.doctor verify-resume", "says bit for bit, on this machine and config")
def test_verify_resume(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["verify-resume", str(YAML / "simmim_gcvit_nano.yaml"), *SMALL])
    assert "equal bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hours", "told"), [(0.05, "3 minutes"), (0.5, "30 minutes"), (2.346, "2.35 hours"), (240, "240 hours (10.0 days)")]
)
def test_durations(hours: float, told: str) -> None:
    assert duration(hours) == told


def test_a_misspelt_check_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match="verify_resume: no such check; did you mean verify-resume"):
        doctor.main(["verify_resume", "configs/pretrain/simmim_gcvit_nano.yaml"])
