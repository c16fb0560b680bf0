"""The run folder: who may use it, what it binds, what status.json says of a run's end."""

import contextlib
import copy
import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gcssl import runfolder
from gcssl.config import DataConfig, PretrainConfig, TrainConfig, config_dict
from gcssl.errors import LostProcess, NumericStop, Preempted, UserError
from gcssl.keys import flatten
from gcssl.runfolder import RunFolder
from gcssl.ssl.objectives import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]


def config(**train: object) -> PretrainConfig:
    return PretrainConfig(train=TrainConfig(**train))  # type: ignore[arg-type]


def status(folder: Path) -> dict[str, object]:
    content = json.loads((folder / "status.json").read_text())
    assert isinstance(content, dict)
    return content


def used(folder: Path, cfg: PretrainConfig | dict[str, Any], global_batch: int | None = None) -> None:
    """A run of two steps, preempted."""
    with pytest.raises(Preempted), RunFolder(folder, cfg, global_batch) as run:
        run.start()
        (folder / "metrics.jsonl").write_text('{"step": 2}\n')
        run.progress(2)
        raise Preempted("SIGTERM")


def test_a_run_that_ends_leaves_config_environment_and_status(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    cfg = config(epochs=3)
    with RunFolder(folder, cfg, 256) as run:
        assert not run.resumed
        run.start()
        assert status(folder)["state"] == "running"
        run.progress(5)
        assert status(folder)["step"] == 5
    end = status(folder)
    assert (end["state"], end["step"], end["exit_code"], end["reason"]) == ("finished", 5, 0, "")
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config_dict(cfg)
    environment = json.loads((folder / "env.json").read_text())
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["argv"] == sys.argv and environment["hardware"]["cpus"] >= 1
    assert environment["facts"] == {"global_batch": 256} and "commit" in environment


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (UserError("too many bad images"), "refused", 2),
        (Preempted("SIGTERM"), "preempted", 75),
        (NumericStop("loss is nan"), "failed", 78),
        (RuntimeError("out of memory"), "failed", 1),
    ],
)
def test_status_tells_how_a_run_ended(tmp_path: Path, error: Exception, state: str, code: int) -> None:
    with pytest.raises(type(error)), RunFolder(tmp_path, config()) as run:
        run.progress(4)
        raise error
    end = status(tmp_path)
    assert (end["state"], end["exit_code"], end["step"]) == (state, code, 4)
    assert str(error) in str(end["reason"])


def test_a_process_that_sees_another_folder_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server may show late what another machine has written."""
    monkeypatch.setattr(time, "sleep", lambda _: shutil.copytree(tmp_path / "main", tmp_path / "other"))
    with RunFolder(tmp_path / "main", {"out": ""}) as main:
        other = RunFolder(tmp_path / "other", {"out": ""})
        other._begun = main._begun  # as it is told by the main process
        assert main.is_shared() and other.is_shared()
        monkeypatch.setattr("gcssl.runfolder.SHOWN_WITHIN", -1)
        other._begun = "another start"
        assert not other.is_shared()


def test_the_same_command_continues(tmp_path: Path) -> None:
    used(tmp_path, config())
    with RunFolder(tmp_path, config()) as run:
        assert run.resumed and run.step == 2
        run.start()
    environment = json.loads((tmp_path / "env.json").read_text())
    assert len(environment["earlier"]) == 1 and "earlier" not in environment["earlier"][0]


def test_the_share_of_bad_images_may_be_raised(tmp_path: Path) -> None:
    """As the run's own message says."""
    used(tmp_path, config())
    with RunFolder(tmp_path, PretrainConfig(data=DataConfig(max_bad=0.5))) as run:
        assert run.resumed


def test_a_key_that_is_newer_than_the_run_is_refused_only_where_it_was_set(tmp_path: Path) -> None:
    used(tmp_path, config())
    old = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del old["train"]["spike_sigma"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    with (
        pytest.raises(UserError, match=r"\(train.spike_sigma: 6.0 -> 4.0\)"),
        RunFolder(tmp_path, config(spike_sigma=4.0)),
    ):
        pass
    with RunFolder(tmp_path, config()) as run:
        assert run.resumed


def test_images_may_move_where_they_are_the_same(tmp_path: Path) -> None:
    facts = {"data": "fingerprint"}
    with RunFolder(tmp_path, PretrainConfig(data=DataConfig(path="/old")), facts=facts) as run:
        run.start()
        (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    moved = PretrainConfig(data=DataConfig(path="/new", cache_dir="/cache"))
    for other in ({"data": "other"}, {}):
        with pytest.raises(UserError, match="data.path: /old -> /new"), RunFolder(tmp_path, moved, facts=other):
            pytest.fail("entered")
    with RunFolder(tmp_path, moved, facts=facts) as run:
        assert run.resumed


@pytest.mark.fault(
    "another config in the folder of a run",
    "refused with the difference, nothing written",
)
def test_another_config_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    used(tmp_path, config())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    with pytest.raises(UserError) as refused, RunFolder(tmp_path, config(epochs=7, blr=0.5)):
        pytest.fail("entered")
    assert "train.epochs: 100 -> 7; train.blr: 0.00015 -> 0.5" in str(refused.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == before


def test_a_refusal_before_the_start_leaves_the_old_status(tmp_path: Path) -> None:
    used(tmp_path, config())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    with pytest.raises(UserError), RunFolder(tmp_path, config()):
        raise UserError("data.path: gone")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == before


def test_a_refused_first_start_does_not_bind_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError), RunFolder(tmp_path, config()):
        raise UserError("data.path: no such folder")
    assert status(tmp_path)["state"] == "refused"
    with RunFolder(tmp_path, config(epochs=7)) as run:
        assert not run.resumed


def test_another_objective_is_named_first_and_its_keys_are_not(tmp_path: Path) -> None:
    old, new = config_dict(config(epochs=3)), config_dict(config(epochs=4))
    old["objective"] = {"name": "joint", **{f"key{i}": i for i in range(12)}}
    new["objective"] = {"name": "simclr"}
    with RunFolder(tmp_path, old) as run:
        (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
        run.progress(2)
    told = r"another config \(objective.name: joint -> simclr; train.epochs: 3 -> 4\).* \(model.weights=.* starts there"
    with pytest.raises(UserError, match=told), RunFolder(tmp_path, new):
        pass


def test_free_keys_may_change_and_the_batch_where_the_global_one_stays(tmp_path: Path) -> None:
    old = config(batch_size=8, accumulate=1)
    used(tmp_path, old, 8)
    new = config(batch_size=4, accumulate=2, max_hours=1.0)
    new.data.workers, new.data.timeout, new.log.every, new.checkpoint.keep = 0, 9, 1, 5
    new.runtime.timeout, new.out = 60, "elsewhere"
    with RunFolder(tmp_path, new, 8) as run:
        assert run.resumed
    with pytest.raises(UserError, match="global batch: 8 -> 16 images a step"), RunFolder(tmp_path, new, 16):
        pass
    with pytest.raises(UserError, match="train.batch_size: 4 -> 8"), RunFolder(tmp_path, old):
        pass  # no global batch is told, so that the keys themselves must agree


def test_every_process_knows_how_the_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one alone would refuse to begin again, and the others would wait for it."""
    used(tmp_path, {"a": 1})
    sent: list[Any] = []
    monkeypatch.setattr("gcssl.runfolder.broadcast", lambda own: sent.append(own) or sent[0])
    with contextlib.suppress(Preempted), RunFolder(tmp_path, {"a": 1}):
        raise Preempted("SIGTERM")
    monkeypatch.setenv("RANK", "1")
    other: Any = Namespace(is_main_process=False)
    with contextlib.suppress(Preempted), RunFolder(tmp_path, {"a": 1}, accelerator=other) as second:
        assert (second.was, second.step) == ("preempted", 2)
        raise Preempted("SIGTERM")


FREE = {
    "out", "allow_env", "data.workers", "data.timeout", "data.max_bad", "eval.online_every", "eval.backend",
    "log.every", "log.trackers", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_every", "checkpoint.on_error",
    "runtime.timeout", "train.max_hours", "train.max_bad_steps", "train.on_collapse", "train.shard",
    "model.grad_checkpointing",
}  # fmt: skip


@pytest.mark.parametrize("objective", ["joint", "mocov3"])
def test_these_keys_and_no_others_may_change_between_two_starts(objective: str, tmp_path: Path) -> None:
    begun = config_dict(PretrainConfig(objective=SCHEMAS[objective]()))
    used(tmp_path, begun)
    free = set()
    for key in flatten(begun):
        changed = copy.deepcopy(begun)
        *sections, last = key.split(".")
        functools.reduce(dict.__getitem__, sections, changed)[last] = "another"
        with contextlib.suppress(UserError, Preempted), RunFolder(tmp_path, changed):
            free.add(key)
            raise Preempted("SIGTERM")
    assert free == FREE


def test_other_facts_are_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path, config(), facts={"data": "abc"}) as run:
        run.start()
        (tmp_path / "metrics.jsonl").write_text("{}\n")
    with (
        pytest.raises(UserError, match="data.path: other images"),
        RunFolder(tmp_path, config(), facts={"data": "xyz"}),
    ):
        pass


def test_a_checkpoint_and_a_folder_of_runs_are_no_run(tmp_path: Path) -> None:
    used(tmp_path / "runs/a", config())
    for out, told in (
        (tmp_path / "runs", "holds other runs, such as a; give out="),
        (tmp_path / "step", "is a checkpoint"),
    ):
        out.mkdir(exist_ok=True)
        if out.name == "step":
            (out / "manifest.json").write_text("{}")
        before = sorted(out.iterdir())
        with pytest.raises(UserError, match=told), RunFolder(out, config()):
            pass
        assert [file for file in sorted(out.iterdir()) if file.name != ".lock"] == before


def test_folders_that_cannot_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out: no folder given"):
        RunFolder("", config())
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="out: .*file/a cannot be written to"),
        RunFolder(tmp_path / "file" / "a", {}),
    ):
        pass
    (tmp_path / "backbone.safetensors").write_bytes(b"x")
    with (
        pytest.raises(UserError, match="backbone.safetensors but no config.yaml"),
        RunFolder(tmp_path, config()),
    ):
        pass
    assert status_absent(tmp_path)


def status_absent(folder: Path) -> bool:
    return not (folder / "status.json").exists() and not (folder / "config.yaml").exists()


HOLD = """
import os, sys, time
from gcssl.runfolder import RunFolder
with RunFolder(sys.argv[1], {"out": ""}) as run:
    run.start()
    if os.fork() == 0:  # like a loader worker, which outlives a killed run for some seconds
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.fault(
    "a second run in the folder; a dead run's lock",
    "refused with process and host; not in the way",
)
def test_a_folder_in_use_is_refused_and_a_killed_run_frees_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused, RunFolder(tmp_path, {"out": ""}):
            pass
        assert f"in use by process {holder.pid} on {os.uname().nodename}" in str(refused.value)
        holder.kill()
        holder.wait()
        with RunFolder(tmp_path, {"out": ""}):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_process_that_a_run_forked_does_not_keep_its_lock(tmp_path: Path) -> None:
    """A loader's worker may outlive a run that was killed."""
    end = multiprocessing.get_context("fork").Event()
    with RunFolder(tmp_path, config()):
        worker = multiprocessing.get_context("fork").Process(target=end.wait, args=(60,))
        worker.start()
    with RunFolder(tmp_path, config()):
        assert worker.is_alive()
    end.set()
    worker.join()


def test_what_holds_nothing_is_no_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    with RunFolder(tmp_path, config()) as run:
        assert not run.resumed


def test_the_last_twenty_starts_are_kept(tmp_path: Path) -> None:
    for _ in range(23):
        with RunFolder(tmp_path, config()) as run:
            run.start()
    assert len(json.loads((tmp_path / "env.json").read_text())["earlier"]) == 20


def test_progress_does_not_hide_that_another_process_failed(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError), RunFolder(tmp_path, config()) as run:
        run.start()
        told = {**status(tmp_path), "state": "failed", "reason": "process 1: out of memory"}
        (tmp_path / "status.json").write_text(json.dumps(told))
        run.progress(7)
        raise RuntimeError("connection lost")
    assert status(tmp_path)["reason"] == "process 1: out of memory"


@pytest.mark.parametrize("alone", [0, 1])
def test_a_signal_to_one_process_alone_is_what_ended_the_run(
    alone: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the online probe: the other one only sees a lost connection."""
    with contextlib.ExitStack() as leave:
        main = RunFolder(tmp_path, config())
        leave.callback(main._release)
        main.__enter__().progress(4)
        monkeypatch.setenv("RANK", "1")
        other = RunFolder(tmp_path, config())
        other._begun, other.step = main._begun, 4  # which it is told by the main process
        stopped, lost = Preempted("stopped by SIGTERM"), LostProcess("connection closed by peer")
        stopped.agreed = False
        first, second = (main, other) if alone == 0 else (other, main)
        first.__exit__(Preempted, stopped, None)
        second.__exit__(LostProcess, lost, None)
    end = status(tmp_path)
    assert (end["state"], end["exit_code"], end["step"]) == ("preempted", 75, 4)
    assert "SIGTERM" in end["reason"]


def test_the_lock_is_freed_when_the_run_ends(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {"out": ""}):
        pass
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


TWO = """
import json, sys
from argparse import Namespace
from pathlib import Path
from gcssl.config import TrainConfig, RuntimeConfig
from gcssl.errors import UserError
from gcssl.runfolder import RunFolder
from gcssl.runtime import make_accelerator
accelerator = make_accelerator(TrainConfig(), RuntimeConfig(timeout=60))
told = [accelerator.num_processes]
with RunFolder(sys.argv[1], {"a": 1}, 8, accelerator) as run:
    told.append(run.resumed)
    run.progress(3)
    if accelerator.is_main_process:
        (run.path / "metrics.jsonl").write_text("{}\\n")
accelerator.wait_for_everyone()
with RunFolder(sys.argv[1], {"a": 1}, 8, accelerator) as run:
    told += [run.resumed, run.step]
accelerator.wait_for_everyone()
try:
    with RunFolder(sys.argv[1], {"a": 2}, 8, accelerator):
        told.append("entered")
except UserError as error:
    told.append("a: 1 -> 2" in str(error))
accelerator.wait_for_everyone()
try:
    with RunFolder(sys.argv[2], {}, 8, accelerator) as run:
        run.progress(1)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            raise UserError("only here")
        __import__("time").sleep(2)
        raise RuntimeError("connection closed by peer")
except (UserError, RuntimeError):
    pass
Path(sys.argv[3] + str(accelerator.process_index)).write_text(json.dumps(told))
accelerator.end_training()
"""


def test_two_processes_agree_on_the_folder(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    folders = [str(tmp_path / name) for name in ("run", "lost", "told")]
    done = subprocess.run(
        [sys.executable, *command, *folders],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"told{rank}").read_text()) == [2, False, True, 3, True]
    assert status(tmp_path / "run")["state"] == "finished"
    lost = status(tmp_path / "lost")  # the reason is that of the process that failed first
    assert (lost["state"], lost["reason"]) == ("refused", "process 1: only here")


@pytest.mark.parametrize("damage", ['{"facts": {', None])
def test_a_run_of_which_nobody_knows_the_images_is_refused(tmp_path: Path, damage: str | None) -> None:
    """A batch and a path of data may be written otherwise where what they stand for is the same, by env.json."""
    with RunFolder(tmp_path, config(), global_batch=16, facts={"data": "A"}) as run:
        run.start()
        (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    (tmp_path / "env.json").unlink() if damage is None else (tmp_path / "env.json").write_text(damage)
    with (
        pytest.raises(UserError, match=r"holds metrics.jsonl but no sound env.json.*give another folder"),
        RunFolder(tmp_path, config(), global_batch=64, facts={"data": "B"}),
    ):
        pytest.fail("entered")


def test_results_of_changed_files_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gcssl").mkdir()
    (tmp_path / "gcssl" / "runfolder.py").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(runfolder, "__file__", str(tmp_path / "gcssl" / "runfolder.py"))
    clean = runfolder._commit()
    assert clean is not None and len(clean) == 40
    (tmp_path / "gcssl" / "runfolder.py").write_text("2")
    assert runfolder._commit() == clean + "+"


@pytest.mark.parametrize(
    "name, text", [("config.yaml", "project: mine"), ("env.json", '{"a": 1}'), ("status.json", "{}")]
)
def test_files_that_no_run_wrote_are_not_replaced(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    told = f"{name} was written by no run and would be replaced; give another folder"
    with pytest.raises(UserError, match=told), RunFolder(tmp_path, config()):
        pytest.fail("entered")
    assert (tmp_path / name).read_text() == text


def test_files_beside_a_run_are_told_at_its_first_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").touch()
    for told in (1, 0):
        with RunFolder(tmp_path, config()) as run:
            run.start()
        assert capsys.readouterr().out.count("holds other files beside the run: 0.jpg, 1.jpg, 2.jpg and 2 more") == told
