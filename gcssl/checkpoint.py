"""Checkpoints that survive a kill at any moment and are verified before use; no pickle is read or written.

checkpoints/step_00001234/ holds one <name>.safetensors for each group of tensors, state.json, and
manifest.json with the size and sha256 of the others. It is written under a temporary name and renamed when
all of it is on the disk.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gcssl.errors import CannotWrite, UserError, check_machine
from gcssl.files import atomic_write, fsync_folder, umask_mode
from gcssl.log import say

TEMPORARY = ".tmp-"  # followed by process, name and host, with - between them
STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint.

    step: optimizer steps done; tensors: on the CPU, by file name and tensor name.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    keep_every_steps: int | None = None,
) -> Path:
    """Write checkpoints/step_<step> in the run folder, then prune; main process only.

    keep: how many of the newest stay, at least 2 (a damaged newest one must leave another). keep_every_steps:
    steps divisible by it always stay. Raises CannotWrite, with the last good checkpoint untouched, when the
    disk is full.
    """
    if keep < 2:
        raise UserError(f"checkpoint.keep: given {keep}, expected at least 2, since the newest one may be damaged")
    root = Path(folder) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(root)
    target = root / f"step_{step:08d}"
    temporary = _temporary(root, target.name)
    try:
        _stage(temporary, step, tensors, state)
        if target.exists():  # a damaged one of an earlier start, or a second save at this step
            os.rename(target, _temporary(root, f"old_{target.name}"))
        os.rename(temporary, target)
        fsync_folder(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _cannot_write(root, tensors, error) from None
    _remove_leftovers(root)
    _prune(root, step, keep, keep_every_steps)
    return target


def load_checkpoint(folder: Path) -> Loaded | None:
    """The newest checkpoint that verifies, with one line about each that does not.

    folder: a run folder.

    None: there is none. UserError: there are some, but none can be used, so that no run silently begins
    again.
    """
    found = list_checkpoints(folder)
    for path in found:
        try:
            return read_checkpoint(path)
        except UserError as error:
            if path.exists():
                say(f"{error}; trying the one before")
    if list_checkpoints(folder) != found:  # a run that goes on wrote others meanwhile, and deleted these
        return load_checkpoint(folder)
    if found:
        raise UserError(f"{found[0].parent}: none of {len(found)} checkpoints can be used; remove it to begin again")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, newest first, not yet verified."""
    paths = (Path(folder) / "checkpoints").glob("step_*")
    found = [path for path in paths if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def read_checkpoint(path: Path) -> Loaded:
    """One checkpoint folder, verified against its manifest; UserError names the wrong file, and why."""
    try:
        problem = verify(path)
        if problem is not None:
            raise UserError(f"{path}: not used: {problem}")
        names = sorted(json.loads((path / "manifest.json").read_text())["files"])  # what else lies there is not ours
        tensors = {Path(name).stem: load_file(path / name) for name in names if name.endswith(".safetensors")}
        state = json.loads((path / "state.json").read_text())
    except (OSError, SafetensorError, ValueError) as error:
        check_machine(error, str(path))
        raise UserError(f"{path}: not used: {' '.join(str(error).split())}") from None
    return Loaded(path, _step_of(path), tensors, state)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder; None: nothing."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = manifest["files"].items()
        expected = {str(name): (int(one["size"]), str(one["sha256"])) for name, one in files}
        step = int(manifest["step"])
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        check_machine(error, str(path / "manifest.json"))
        return "manifest.json cannot be read"
    if STEP_FOLDER.fullmatch(path.name) and step != _step_of(path):
        return f"manifest.json is of step {step}"
    if "state.json" not in expected:
        return "state.json is not in its manifest"
    present = {file.name for file in path.iterdir()}
    for name, (size, digest) in expected.items():
        if name not in present:
            return f"{name} is missing"
        actual = (path / name).stat().st_size
        if actual != size:
            return f"{name} has {actual} bytes, expected {size}"
        try:
            if _sha256(path / name) != digest:
                return f"{name} has another sha256 than when it was written"
        except OSError as error:
            check_machine(error, str(path / name))
            return f"{name} cannot be read: {error.strerror}"
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON values) of an optimizer's state, for load_optimizer.

    Tensors are called <parameter's place>.<slot>.
    """
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for place, slots in content["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{place}.{slot}"] = value
            else:
                values.setdefault(str(place), {})[slot] = value
    groups = [
        {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}  # LAMB's step
        for group in content["param_groups"]
    ]
    return tensors, {"values": values, "groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Put back what optimizer_tensors gave, bit for bit.

    UserError where the parameters are not the same ones.
    """
    now, then = (
        [(group["params"], group.get("names")) for group in groups]
        for groups in (optimizer.state_dict()["param_groups"], state["groups"])
    )
    if now != then:
        raise UserError("checkpoint: its optimizer holds other parameters than this config's model and objective")
    slots: dict[int, dict[str, Any]] = {int(place): dict(values) for place, values in state["values"].items()}
    for name, value in tensors.items():
        place, _, slot = name.partition(".")
        slots.setdefault(int(place), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": state["groups"]})


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file with the umask's mode, on the disk at return; equal tensors give equal bytes."""
    save_file(_separate(tensors), path)
    os.chmod(path, umask_mode())  # safetensors >= 0.8 leaves 0600
    _fsync(path)


def write_backbone(folder: Path, state_dict: dict[str, Tensor], info: dict[str, Any]) -> None:
    """backbone.safetensors and backbone.json, each replaced at once; the json has the sha256 of the first."""
    folder = Path(folder)
    temporary = _temporary(folder, "backbone")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        write_tensors(temporary, state_dict)
        digest = _sha256(temporary)
        os.replace(temporary, folder / "backbone.safetensors")
        atomic_write(folder / "backbone.json", json.dumps({**info, "sha256": digest}, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(folder, {"": state_dict}, error) from None


def read_backbone(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What write_backbone wrote, verified."""
    tensors, described = Path(folder) / "backbone.safetensors", Path(folder) / "backbone.json"
    try:
        info = json.loads(described.read_text())
        if info.get("sha256", "") != _sha256(tensors):
            raise UserError(f"{tensors}: damaged: it has another sha256 than {described.name} says")
        return load_file(tensors), info
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; expected a run folder or an exported backbone") from None
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder}: the backbone cannot be read: {' '.join(str(error).split())}") from None


def _stage(temporary: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Everything of a checkpoint in its temporary folder, on the disk; the manifest last."""
    temporary.mkdir()
    for name, group in tensors.items():
        write_tensors(temporary / f"{name}.safetensors", group)
    _write(temporary / "state.json", json.dumps(state, indent=1))
    written = sorted(temporary.iterdir())
    files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in written}
    _write(temporary / "manifest.json", json.dumps({"step": step, "files": files}, indent=1))
    fsync_folder(temporary)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none of which shares its memory with another: what safetensors takes."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        if place in seen:
            plain = plain.clone()
        seen.add(place)
        result[name] = plain
    return result


def _prune(root: Path, step: int, keep: int, keep_every_steps: int | None) -> None:
    """Remove what is older than the newest `keep`, and newer than `step`: the run went back behind it."""
    newest_first = list_checkpoints(root.parent)
    current = [path for path in newest_first if _step_of(path) <= step]
    for path in newest_first:
        kept_for_ever = keep_every_steps is not None and _step_of(path) % keep_every_steps == 0
        if path in current and (path in current[:keep] or kept_for_ever):
            continue
        try:
            doomed = _temporary(root, f"old_{path.name}")
            os.rename(path, doomed)  # so that a kill in the middle leaves no half checkpoint under its name
            shutil.rmtree(doomed)
        except OSError as error:
            say(f"{path}: an old checkpoint, could not be removed: {error.strerror}")


def _remove_leftovers(root: Path) -> None:
    """Temporary folders and files of processes that died."""
    for path in root.glob(f"{TEMPORARY}*-*-*"):
        if _is_at_work(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_at_work(path: Path) -> bool:
    """Does another process still write this? Of another host it is not known: for an hour, yes."""
    process, _, host = path.name.removeprefix(TEMPORARY).split("-", 2)
    if host != socket.gethostname():
        return time.time() - path.stat().st_mtime < 3600
    if int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _temporary(root: Path, name: str) -> Path:
    return root / f"{TEMPORARY}{os.getpid()}-{name}-{socket.gethostname()}"


def _cannot_write(root: Path, tensors: dict[str, dict[str, Tensor]], error: Exception) -> CannotWrite:
    needed = sum(one.numel() * one.element_size() for group in tensors.values() for one in group.values())
    free = shutil.disk_usage(root).free if root.exists() else 0
    reason = " ".join(str(error).split())
    return CannotWrite(
        f"{root}: cannot be written: {reason}; it takes {needed / 1e6:.0f} MB and the disk has "
        f"{free / 1e6:.0f} MB free; make room and run the same command again"
    )


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("_")[2])


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n")
    _fsync(path)


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
