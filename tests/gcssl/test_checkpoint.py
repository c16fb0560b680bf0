"""Checkpoints under faults: kills at each stage, damage, a full disk, pruning; and exact optimizer state."""

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gcssl import checkpoint
from gcssl.checkpoint import (
    atomic_write,
    list_checkpoints,
    load_checkpoint,
    load_optimizer,
    optimizer_tensors,
    read_backbone,
    read_checkpoint,
    save_checkpoint,
    verify,
    write_backbone,
)
from gcssl.config import TrainConfig
from gcssl.errors import CannotWrite, Failure, UserError
from gcssl.keys import CHOICES
from gcssl.optim import make_optimizer, param_groups, set_lr

PLAIN_WRITES = (os.fsync, os.rename, os.mkdir)  # the stages between which a kill is tried


def content(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"a": torch.randn(16, 8, generator=generator), "n": torch.tensor(step)},
        "optimizer": {"0.exp_avg": torch.randn(5, generator=generator)},
    }


def save(folder: Path, step: int, keep: int = 2, every: int | None = None) -> Path:
    return save_checkpoint(folder, step, content(step), {"step": step}, keep, every)


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(folder)]


def assert_is(folder: Path, step: int) -> None:
    loaded = load_checkpoint(folder)
    assert loaded is not None and loaded.step == step and loaded.state == {"step": step}
    for name, group in content(step).items():
        for key, value in group.items():
            assert torch.equal(loaded.tensors[name][key], value)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    path = save(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step_00000007"
    names = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {file.name for file in path.iterdir()} == names
    assert_is(tmp_path, 7)
    assert load_checkpoint(path) is None  # a checkpoint is no run
    assert verify(path) is None


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    one, two = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


@pytest.mark.fault(
    "umask 027",
    "checkpoints and backbones follow it",
)
def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
        write_backbone(tmp_path, {"a": torch.ones(2)}, {})
    finally:
        os.umask(before)
    for file in [*path.iterdir(), tmp_path / "backbone.safetensors", tmp_path / "backbone.json"]:
        assert stat.S_IMODE(file.stat().st_mode) == 0o640, file.name


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "a": base,
        "b": base,
        "t": base.T,
        "row": base[1],
        "none": torch.zeros(0),
        "x": base.bfloat16(),
    }
    tensors["parameter"] = nn.Parameter(torch.ones(2, 2))
    save_checkpoint(tmp_path, 1, {"m": tensors}, {}, 2)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    for name, value in tensors.items():
        assert torch.equal(loaded.tensors["m"][name], value) and loaded.tensors["m"][name].dtype == value.dtype


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) - 3] ^= 1
    path.write_bytes(damaged)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "name", "reason"),
    [
        (flip, "model.safetensors", "model.safetensors has another sha256"),
        (flip, "state.json", "state.json has another sha256"),
        (cut, "optimizer.safetensors", "optimizer.safetensors has 91 bytes, expected 92"),
        (empty, "model.safetensors", "model.safetensors has 0 bytes"),
        (Path.unlink, "model.safetensors", "model.safetensors is missing"),
        (Path.unlink, "manifest.json", "manifest.json is missing"),
        (cut, "manifest.json", ""),
        (empty, "manifest.json", "manifest.json cannot be read"),
    ],
)
@pytest.mark.fault(
    "the newest checkpoint flipped, cut, empty, or a file missing",
    "one line says why, the one before is used",
)
def test_a_damaged_newest_one_is_named_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Any], name: str, reason: str
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    if (damage, name) == (cut, "manifest.json"):
        (newest / name).write_text((newest / name).read_text().replace('"step": 2', '"step": 3'))
        reason = "manifest.json is of step 3"
    else:
        damage(newest / name)
    assert_is(tmp_path, 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and str(newest) in lines[0] and reason in lines[0]
    with pytest.raises(UserError, match=newest.name):
        read_checkpoint(newest)


@pytest.mark.fault(
    "every checkpoint damaged",
    "refused: no run silently begins again",
)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save(tmp_path, step) / "model.safetensors")
    with pytest.raises(UserError, match=r"checkpoints: none of 2 checkpoints can be used; remove it to begin again"):
        load_checkpoint(tmp_path)


@pytest.mark.fault(
    "a file server away, or no open file left, as a run goes on",
    "one line, exit 1: its newest checkpoint is not passed over",
)
@pytest.mark.parametrize("name", ["_sha256", "load_file"])
def test_a_checkpoint_that_the_machine_cannot_read_now_is_not_passed_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> Any:
        raise OSError(number, os.strerror(number))

    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(f"gcssl.checkpoint.{name}", fail)
    number = errno.ESTALE
    with pytest.raises(Failure, match=r"step_00000002.* cannot be read: .*look after the machine"):
        load_checkpoint(tmp_path)
    number = errno.EIO  # a bad sector stays
    with pytest.raises(UserError, match="none of 2 checkpoints can be used"):
        load_checkpoint(tmp_path)


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "extra.safetensors").write_bytes(b"x")
    (path / ".DS_Store").write_bytes(b"x")
    assert read_checkpoint(path).tensors.keys() == {"model", "optimizer"}


def test_a_manifest_that_leaves_out_the_state_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["state.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="state.json is not in its manifest"):
        read_checkpoint(path.parent)


def killed_at(number: int, folder: Path) -> bool:
    """Save step 3 in a child that is killed with SIGKILL at its n-th system call of the stages; was it?"""
    child = os.fork()
    if child == 0:
        count = 0

        def stage(original: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return counted

        for original in PLAIN_WRITES:
            setattr(os, original.__name__, stage(original))
        checkpoint.save_file = stage(checkpoint.save_file)  # type: ignore[attr-defined]
        shutil.rmtree = stage(shutil.rmtree)  # type: ignore[assignment]
        try:
            save(folder, 3)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.fault(
    "kill -9 at every stage of a save and its pruning",
    "never fewer than two whole checkpoints",
)
def test_a_kill_at_any_stage_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "origin", 1)
    save(tmp_path / "origin", 2)
    stages = 0
    while True:
        stages += 1
        folder = tmp_path / str(stages)
        shutil.copytree(tmp_path / "origin", folder)
        killed = killed_at(stages, folder)
        newest = steps(folder)[0]
        assert newest == 3 or killed
        assert all(verify(path) is None for path in list_checkpoints(folder)), f"stage {stages}"
        assert len(steps(folder)) >= 2
        assert_is(folder, newest)
        save(folder, 4)  # the next save clears what the dead process left
        assert sorted(path.name for path in (folder / "checkpoints").iterdir())[0].startswith("step_")
        assert_is(folder, 4)
        if not killed:
            break
    assert stages > 10


@pytest.mark.fault(
    "a power cut after the rename of a checkpoint",
    "its files, folder and name were flushed before (fsync)",
)
def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without these fsyncs a power cut may leave a checkpoint with the right name and empty files."""
    synced: set[int] = set()
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        real_fsync(fd)

    def rename(old: Path, new: Path) -> None:
        if str(new).endswith("step_00000001"):
            assert {path.stat().st_ino for path in [Path(old), *Path(old).iterdir()]} <= synced
            synced.clear()
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 1)
    assert (tmp_path / "checkpoints").stat().st_ino in synced


@pytest.mark.fault("a file system on which folders cannot be flushed (CIFS)", "checkpoints are written there too")
@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_folders_that_cannot_be_flushed(
    number: int, passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fsync = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if passes else pytest.raises(CannotWrite, match=os.strerror(number)):
        save(tmp_path, 1)
    assert steps(tmp_path) == ([1] if passes else [])


def test_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, keep=2, every=3)
    assert steps(tmp_path) == [7, 6, 3]
    with pytest.raises(UserError, match="checkpoint.keep: given 1, expected at least 2"):
        save(tmp_path, 8, keep=1)


def test_a_run_that_went_back_leaves_no_newer_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    for step in (2, 3):
        flip(tmp_path / "checkpoints" / f"step_{step:08d}" / "model.safetensors")
    save(tmp_path, 2, keep=2, every=3)  # 3 is of a course that was given up, though its number is a milestone's
    assert steps(tmp_path) == [2, 1]
    assert_is(tmp_path, 2)


@pytest.mark.fault(
    "an old checkpoint that cannot be deleted",
    "said in one line; the run goes on",
)
def test_a_delete_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)  # root, who runs tests in containers, may delete anything
    monkeypatch.setattr(checkpoint, "_remove_leftovers", lambda _: None)
    save(tmp_path, 3)
    assert "could not be removed: Permission denied" in capsys.readouterr().out
    assert_is(tmp_path, 3)


def test_leftovers_go_unless_their_process_lives(tmp_path: Path) -> None:
    root = save(tmp_path, 1).parent
    host = os.uname().nodename
    dead = subprocess.Popen(["true"])
    dead.wait()
    living = subprocess.Popen(["sleep", "60"])
    try:
        for process in (dead.pid, living.pid, os.getpid()):  # the first process of a container has one number for ever
            (root / f".tmp-{process}-step_00000009-{host}").mkdir()
        (root / ".tmp-1-step_00000009-elsewhere").mkdir()
        old = root / ".tmp-1-step_00000009-faraway"
        old.mkdir()
        os.utime(old, (time.time() - 7200,) * 2)
        save(tmp_path, 2)
        left = {path.name for path in root.glob(".tmp-*")}
        assert left == {f".tmp-{living.pid}-step_00000009-{host}", ".tmp-1-step_00000009-elsewhere"}
    finally:
        living.kill()
        living.wait()


def test_what_another_users_process_writes_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = save(tmp_path, 1).parent
    theirs = root / f".tmp-{os.getppid()}-step_00000009-{os.uname().nodename}"
    theirs.mkdir()

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")  # root, who runs tests in containers, may signal anyone

    monkeypatch.setattr(os, "kill", refuse)
    save(tmp_path, 2)
    assert theirs.is_dir()


@pytest.mark.fault(
    "a file size limit reached in a save",
    "one line with MB needed and free; the last one serves",
)
def test_a_full_disk_is_one_line_and_leaves_the_last_good_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        told = "nothing"
        try:
            save_checkpoint(tmp_path, 2, {"model": {"a": torch.zeros(100_000)}}, {}, 2)
        except CannotWrite as error:
            told = str(error)
        (tmp_path / "told").write_text(told)
        os._exit(0)
    os.waitpid(child, 0)
    told = (tmp_path / "told").read_text()
    assert "cannot be written" in told and "it takes 0 MB" in told and "MB free" in told and "\n" not in told
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert_is(tmp_path, 1)


@pytest.mark.parametrize("name", CHOICES["train.optimizer"])
def test_the_optimizer_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2))
        return net, make_optimizer(param_groups(net.named_parameters(), 0.05), TrainConfig(optimizer=name))

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            set_lr(optimizer, 0.01 / (step + 1))
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()

    whole, optimizer = fresh()
    train(whole, optimizer, 0, 6)
    half, optimizer = fresh()
    train(half, optimizer, 0, 3)
    tensors, state = optimizer_tensors(optimizer)
    if name == "adamw":
        assert {key.partition(".")[2] for key in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    save_checkpoint(tmp_path, 3, {"model": half.state_dict(), "optimizer": tensors}, {"optimizer": state}, 2)

    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    rest, optimizer = fresh()
    rest.load_state_dict(loaded.tensors["model"])
    load_optimizer(optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"])
    train(rest, optimizer, 3, 6)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[key]), key


def test_an_optimizer_of_another_model_is_refused() -> None:
    one = make_optimizer(param_groups(nn.Linear(3, 2).named_parameters(), 0.05), TrainConfig())
    other = make_optimizer(param_groups(nn.Sequential(nn.Linear(3, 2)).named_parameters(), 0.05), TrainConfig())
    with pytest.raises(UserError, match="other parameters"):
        load_optimizer(other, *optimizer_tensors(one))


def test_the_backbone_comes_back_and_damage_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tensors = {"w": torch.randn(4, 4), "b": torch.zeros(4)}
    write_backbone(tmp_path, tensors, {"name": "nano"})
    before = hashlib.sha256((tmp_path / "backbone.safetensors").read_bytes()).hexdigest()
    state, info = read_backbone(tmp_path)
    assert torch.equal(state["w"], tensors["w"]) and info["name"] == "nano" and info["sha256"] == before
    write_backbone(tmp_path, dict(reversed(tensors.items())), {"name": "nano"})
    assert hashlib.sha256((tmp_path / "backbone.safetensors").read_bytes()).hexdigest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.json", "backbone.safetensors"]
    flip(tmp_path / "backbone.safetensors")
    with pytest.raises(UserError, match="damaged"):
        read_backbone(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_backbone(tmp_path / "nothing")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CannotWrite):
        write_backbone(tmp_path, tensors, {"name": "nano"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.json", "backbone.safetensors"]


def test_atomic_write_keeps_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    atomic_write(path, json.dumps({"a": 1}))

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"] and json.loads(path.read_text()) == {"a": 1}


def test_processes_of_one_number_on_two_hosts_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers on several nodes count their processes from 1."""
    path, real_replace = tmp_path / "x.json", os.replace

    def meanwhile(old: Path, new: Path) -> None:
        monkeypatch.setattr(os, "replace", real_replace)
        monkeypatch.setattr("socket.gethostname", lambda: "the other")
        atomic_write(path, "theirs")
        real_replace(old, new)

    monkeypatch.setattr(os, "replace", meanwhile)
    atomic_write(path, "ours")
    assert path.read_text() == "ours" and [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_atomic_write_has_the_new_name_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the folder's fsync a power cut may bring the old content back."""
    done: list[int | str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        done.append(os.fstat(fd).st_ino)
        real_fsync(fd)

    def replace(old: Path, new: Path) -> None:
        done.append("replaced")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_write(tmp_path / "x.json", "new")
    assert done == [(tmp_path / "x.json").stat().st_ino, "replaced", tmp_path.stat().st_ino]


@pytest.mark.fault("a running run deletes the checkpoints that are being read", "those that it wrote since are read")
def test_checkpoints_that_a_running_run_deletes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def two_more(path: Path) -> str | None:
        if path.name == "step_00000002":
            for step in (3, 4):
                save(tmp_path, step)
        return verify(path)

    monkeypatch.setattr(checkpoint, "verify", two_more)
    assert_is(tmp_path, 4)


def test_what_is_removed_has_no_checkpoints_name_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of it would leave half a checkpoint that looks damaged."""
    seen: list[list[int]] = []
    remove = shutil.rmtree
    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: (seen.append(steps(tmp_path)), remove(path, **how)))
    save(tmp_path, 3)
    assert seen[-1] == steps(tmp_path) == [3, 2]
