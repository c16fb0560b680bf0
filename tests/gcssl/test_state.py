"""What a resume reads back: the loss scale that goes with the checkpoint, and none of an earlier fit; incidents."""

import errno
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gcssl.checkpoint import save_checkpoint
from gcssl.config import CheckpointConfig, RuntimeConfig, TrainConfig
from gcssl.errors import CannotWrite, NumericStop, UserError, outcome
from gcssl.models.build import build_backbone
from gcssl.runtime import make_accelerator
from gcssl.state import RunState, checkpoint_bytes


def state(folder: Path, scale: float) -> RunState:
    accelerator = make_accelerator(TrainConfig(), RuntimeConfig())
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    model = nn.Module()
    model.encoder = build_backbone("gcvit_nano", 64)
    told: dict[str, Any] = {"facts": {"data": "fingerprint"}, "was": None, "config": {"train": {"optimizer": "sgd"}}}
    told["is_shared"] = lambda: True
    run: Any = Namespace(path=folder, step=0, is_main=True, **told)
    return RunState(run, model, torch.optim.SGD(model.parameters()), accelerator, {}, None)


def test_the_loss_scale_is_that_of_the_checkpoint_or_a_new_one(tmp_path: Path) -> None:
    first = state(tmp_path, scale=4.0)
    assert first.resume() == 0
    assert first.accelerator.scaler.get_scale() == 2.0**16  # torch's own, not that of an earlier fit
    save_checkpoint(tmp_path, 3, *state(tmp_path, scale=8.0).snapshot(), keep=2)
    again = state(tmp_path, scale=4.0)
    assert again.resume() == 3 and again.accelerator.scaler.get_scale() == 8.0


@pytest.mark.fault("a disk without room for one checkpoint", "one line before the first step")
def test_a_run_does_not_begin_where_no_checkpoint_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=17_000_000))
    told = "a checkpoint takes 18 MB and the disk has 17 MB free; make room and run the same command again"
    with pytest.raises(CannotWrite, match=told):
        state(tmp_path, scale=4.0).resume()
    save_checkpoint(tmp_path, 3, *state(tmp_path, scale=8.0).snapshot(), keep=2)
    assert state(tmp_path, scale=4.0).resume() == 3  # it may be at its end


def test_only_the_main_process_looks_at_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server may not show the folder to the others yet."""
    one = state(tmp_path / "not there", scale=4.0)
    one.run.is_main = False
    monkeypatch.setattr("gcssl.state.broadcast", lambda own: own + 10**12)
    assert one.resume() == 0


def test_a_checkpoint_holds_moments_of_what_is_trained_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False).requires_grad_(False))
    assert checkpoint_bytes(model, "adamw") == (2 * 64, 2 * 64) and checkpoint_bytes(model, "sgd") == (2 * 64, 64)


@pytest.mark.fault(
    "an incident that cannot be written",
    "said in one line; still exit 78 with the reason",
)
def test_an_incident_that_cannot_be_written_still_ends_in_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "incidents").write_text("a file where the folder should be")
    with pytest.raises(NumericStop, match="loss is nan") as stop:
        state(tmp_path, scale=4.0).give_up(3, "loss is nan", [])
    (line,) = capsys.readouterr().out.splitlines()
    assert outcome(stop.value)[1] == 78 and "incidents/after_step_3: not written:" in line


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            (False, 0, "fingerprint"),
            r"is another folder for process 1 than for the main process; give a folder",
        ),
        ((True, 6, "fingerprint"), r"the processes find other steps in .*: \[0, 6\]; give a folder that all share"),
        ((True, 0, "another"), r"data.path: the processes find other images or labels there; give all the same ones"),
    ],
)
def test_processes_that_see_other_files_are_told_so(
    other: tuple[bool, int, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = state(tmp_path, scale=4.0)
    one.accelerator = Namespace(num_processes=2, scaler=None)
    monkeypatch.setattr("gcssl.state.gather_object", lambda own: [*own, other])
    with pytest.raises(UserError, match=told):
        one.resume()


@pytest.mark.fault("the checkpoints of a finished run deleted", "the same command is refused; nothing begins again")
def test_a_finished_run_without_its_checkpoints_does_not_begin_again(tmp_path: Path) -> None:
    (tmp_path / "backbone.safetensors").touch()
    with pytest.raises(UserError, match=r"finished run without its checkpoints, which would begin again; give another"):
        state(tmp_path, scale=4.0).resume()


def test_a_stopped_run_without_its_checkpoints_does_not_begin_again(tmp_path: Path) -> None:
    """One that failed before its first checkpoint does."""
    one = state(tmp_path, scale=4.0)
    for one.run.was, one.run.step in (("failed", 3), ("preempted", 0)):
        assert one.resume() == 0
    for was in ("preempted", "running"):  # running: after a kill -9
        one.run.was, one.run.step = was, 14
        with pytest.raises(UserError, match="holds a run that stopped at step 14 without its checkpoints"):
            one.resume()


@pytest.mark.fault(
    "a disk too full for status.json", "checkpoint.on_error=warn says so and goes on; else one line, exit 1"
)
@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_a_status_that_cannot_be_written(on_error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def progress(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    one = state(tmp_path, scale=4.0)
    one.run.progress = progress
    cfg = CheckpointConfig(on_error=on_error)
    if on_error == "warn":
        one.save(3, cfg, 10)
        assert "No space left on device; this one is left out, training goes on" in capsys.readouterr().out
    else:
        with pytest.raises(OSError) as stop:
            one.save(3, cfg, 10)
        assert outcome(stop.value)[:2] == ("failed", 1)
