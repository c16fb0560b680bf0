"""The folder of one run: locked while in use, bound to a config, and saying how the run ended."""

import fcntl
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from gcssl.config import config_dict, read_yaml, to_yaml
from gcssl.errors import UserError, first_of, is_main_process, outcome
from gcssl.files import atomic_write
from gcssl.keys import defaults_of, diff_configs, flatten
from gcssl.log import say

if TYPE_CHECKING:
    from accelerate import Accelerator

# What a later start of the same run may change. The batch keys only where the global batch stays the same.
FREE_KEYS = (
    "data.workers",
    "data.timeout",
    "data.max_bad",
    "eval.",  # the probe changes no bit of the training
    "log.",
    "checkpoint.",
    "runtime.",
    "train.max_hours",
    "train.max_bad_steps",
    "train.on_collapse",
    "train.shard",
    "model.grad_checkpointing",
    "out",
    "compare",
    "allow_env",
)
DATA_KEYS = ("data.path", "data.cache_dir")
BACKBONE_KEYS = ("backbone", "encoder")
BATCH_KEYS = ("train.batch_size", "train.accumulate", "train.global_batch")
PRODUCTS = (
    "checkpoints", "metrics.jsonl", "backbone.safetensors", "backbone.json", "bad_samples.jsonl", "bad_steps.jsonl",
)  # fmt: skip
SHOWN_WITHIN = 60  # seconds that a file server may take to show one machine what another has written
OWN = {"config.yaml": "out", "env.json": "facts", "status.json": "state"}  # a key that each has where a run wrote it
PACKAGES = (
    "gcssl", "torch", "torchvision", "timm", "accelerate", "datasets", "omegaconf", "safetensors", "pillow", "numpy",
    "faiss-gpu", "faiss-cpu",
)  # fmt: skip


def broadcast(value: Any) -> Any:
    """The main process's value in every process (plain values; without a process group: the value itself)."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def check_writable(out: str, data: str = "") -> None:
    """UserError where the folder `out` cannot be made or written to, or is `data`: said before anything is opened."""
    path = Path(out).absolute()
    if data and path.resolve() == Path(data).absolute().resolve():
        raise UserError(f"out: given {out}, the folder of the images; give another folder")
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"out: given {out}, but {nearest} is a file; give another folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".gcssl-", dir=nearest))  # tried: what os.access grants, /proc still refuses
    except OSError as error:
        told = f"{nearest} may not be written to ({error.strerror})"
        raise UserError(f"out: given {out}, but {told}; give another folder") from None


class RunFolder:
    """`with RunFolder(out, config, ...) as run:` opens or continues the run of this config in `out`.

    config: config_dict(cfg). facts: JSON values that must not change although the config may, such as
    {"global_batch": 256, "data": fingerprint}; with "global_batch" given, the keys it derives from are free, and with
    an equal "data" the place where it lies.
    Entering raises UserError (in every process alike) for a folder in use, or one whose run has another
    config. Nothing is written over before start(), which the program calls once data and model were accepted.
    Leaving writes status.json from the exception that passes; a refused start leaves that of an older run.
    """

    def __init__(
        self,
        out: str | Path,
        config: Any,
        global_batch: int | None = None,
        accelerator: "Accelerator | None" = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        if not str(out):
            raise UserError("out: no folder given; write e.g. out=runs/a")
        self.path = Path(out)
        self.config: dict[str, Any] = config if isinstance(config, dict) else config_dict(config)
        self.defaults = {} if isinstance(config, dict) else config_dict(defaults_of(config))
        self.was: str | None = None  # the state that status.json tells of an earlier start
        self.facts = {**({} if global_batch is None else {"global_batch": global_batch}), **(facts or {})}
        self.is_main = is_main_process() if accelerator is None else accelerator.is_main_process
        self.resumed = False  # the folder holds steps of this run already
        self.step = 0  # optimizer steps done
        self._begun = ""  # when this start began; also tells its status from that of an earlier start
        self._started = False
        self._lock: int | None = None

    def __enter__(self) -> Self:
        problem: str | None = None
        if self.is_main:
            try:
                self._open()
            except UserError as error:
                problem = str(error)
                self._release()
        told = (problem, self.resumed, self._begun, self.step, self.was)
        problem, self.resumed, self._begun, self.step, self.was = broadcast(told)
        if problem is not None:
            raise UserError(problem)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state, code, reason = outcome(error)
        try:
            if state == "finished" and not self._started:
                self.start()
            if state == "refused" and self.resumed and not self._started:
                pass  # the run in the folder is as it was
            elif self.is_main:
                self._end(state, code, reason)
            elif state in ("refused", "failed") or not getattr(error, "agreed", True):  # the main one sees a loss
                self._end(state, code, f"process {os.environ['RANK']}: {reason}")
        except OSError as failure:
            print(f"gcssl: {self.path}/status.json: cannot be written: {failure}", file=sys.stderr)
        self._release()

    def is_shared(self) -> bool:
        """Whether this process finds in the folder what the main process wrote there when this start began."""
        until = time.monotonic() + SHOWN_WITHIN
        while not self._sees_lock():
            if time.monotonic() > until:
                return False
            time.sleep(1)
        return True

    def _sees_lock(self) -> bool:
        try:
            os.listdir(self.path.parent)  # has a file server's client look anew
            return self._begun in (self.path / ".lock").read_text()
        except OSError:
            return False

    def progress(self, step: int) -> None:
        """Tell status.json that the run goes on and where it is. Main process; the others do nothing."""
        if not self._started:
            self.start()
        self.step = step
        if self.is_main and not self._another_ended():
            self._write("running", step=step)

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._begun = datetime.now(UTC).isoformat()
            self._take_lock()
        except OSError as error:
            raise UserError(f"out: {self.path} cannot be written to: {error.strerror}") from None
        self._compare()

    def start(self) -> None:
        """Bind the folder to this config: from here on nothing is left to refuse.

        Main process; the others do nothing.
        """
        self._started = True
        if not self.is_main:
            return
        try:
            environment = json.dumps(self._environment(), indent=1)
            atomic_write(self.path / "config.yaml", to_yaml(self.config))
            atomic_write(self.path / "env.json", environment + "\n")
            self.progress(self.step)
        except OSError as error:
            raise UserError(f"out: {self.path} cannot be written to: {error.strerror}") from None

    def _compare(self) -> None:
        """Refuse what would change the run that is already in the folder."""
        used = [name for name in PRODUCTS if _holds_something(self.path / name)]
        old = self._read_yaml("config.yaml")
        if (self.path / "manifest.json").is_file():
            raise UserError(f"out: {self.path} is a checkpoint; give the folder of its run, or a new one")
        if not used and old is None and (run := next(self.path.glob("*/status.json"), None)):
            raise UserError(
                f"out: {self.path} holds other runs, such as {run.parent.name}; give out={self.path}/<name>"
            )
        if not used:  # nothing was done yet: a start that was refused, or stopped before its first step
            self._keep_what_others_wrote(old)
            return
        if old is None:
            raise UserError(f"out: {self.path} holds {', '.join(used)} but no config.yaml; give another folder")
        old_facts = self._read_json("env.json").get("facts", {})
        if self.facts and not old_facts:
            raise UserError(
                f"out: {self.path} holds {', '.join(used)} but no sound env.json, which says what its images and batch "
                "were; give another folder"
            )
        free = FREE_KEYS + (BATCH_KEYS if "global_batch" in self.facts else ())
        for fact, keys in (("data", DATA_KEYS), ("weights", BACKBONE_KEYS)):  # the same, wherever it lies now
            free += keys if fact in self.facts and self.facts[fact] == old_facts.get(fact) else ()
        known = flatten(self.defaults) | flatten(old)  # a key that is newer than the run had its default
        lines = [line for line in diff_configs(known, self.config) if not is_free(line.split(":")[0], free)]
        common = old_facts.keys() & self.facts.keys()
        changed = [k for k in sorted(common) if old_facts[k] != self.facts[k]]
        other_images = "data.path: other images than this run began with (another number, other names or labels)"
        told = {"data": other_images, "weights": "backbone: other weights than this run began with"}
        if "global_batch" in changed:
            batches = f"{old_facts['global_batch']} -> {self.facts['global_batch']} images a step"
            told["global_batch"] = f"global batch: {batches} (processes x train.batch_size x train.accumulate)"
        lines += [told.get(k, f"{k}: {old_facts[k]} -> {self.facts[k]}") for k in changed]
        for line in [line for line in lines if line.startswith(("objective.name: ", "model.name: "))]:
            section = line.partition(".")[0]  # whose other keys are those of another objective or model
            lines = [line, *(other for other in lines if not other.startswith(f"{section}."))]
        if lines:
            more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
            from_here = (
                f" (model.weights={self.path} starts there from its weights)" if "objective" in self.config else ""
            )
            raise UserError(
                f"out: {self.path} holds a run with another config ({'; '.join(lines[:8])}{more}); "
                f"set these back to continue it, or give another folder{from_here}"
            )
        self.resumed = True
        status = self._read_json("status.json")
        self.step, self.was = int(status.get("step", 0)), status.get("state")

    def _keep_what_others_wrote(self, old: dict[str, Any] | None) -> None:
        """Refuse a folder whose config.yaml, env.json or status.json no run wrote; tell of other files."""
        for name, key in OWN.items():
            path = self.path / name
            holds = (old or {}) if name == "config.yaml" else self._read_json(name)
            if path.exists() and path.stat().st_size and key not in holds:
                raise UserError(f"out: {path} was written by no run and would be replaced; give another folder")
        if old is None:
            others = sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))
            if others:
                say(f"out: {self.path} holds other files beside the run: {first_of(others)}")

    def _take_lock(self) -> None:
        self._lock = lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        # A loader worker that outlives a killed run must not keep the lock, which forked processes share.
        os.register_at_fork(after_in_child=self._release)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 200).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"out: {self.path} is in use by {owner}; wait until it ends or give another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()} since {self._begun}\n".encode(), 0)
        os.fsync(lock)  # for `is_shared` on other machines

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _end(self, state: str, code: int, reason: str) -> None:
        if not self._another_ended():
            self._write(state, step=self.step, exit_code=code, reason=reason)

    def _another_ended(self) -> bool:
        """Has a process of this start said why it ended? The others only see a lost connection."""
        told = self._read_json("status.json")
        return told.get("begun") == self._begun and told.get("state") in ("failed", "refused", "preempted")

    def _write(self, state: str, **more: Any) -> None:
        now = datetime.now(UTC).isoformat()
        host = socket.gethostname()
        status = {"state": state, **more, "time": now, "begun": self._begun, "host": host, "pid": os.getpid()}
        atomic_write(self.path / "status.json", json.dumps(status, indent=1) + "\n")

    def _environment(self) -> dict[str, Any]:
        old = self._read_json("env.json")
        earlier = old.pop("earlier", [])
        start = {"begun": self._begun, "argv": sys.argv, "cwd": os.getcwd(), "host": socket.gethostname()}
        now = {**start, **provenance(), "facts": self.facts}
        return {**now, "earlier": ([*earlier, old] if old else earlier)[-20:]}

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _read_yaml(self, name: str) -> dict[str, Any] | None:
        return read_yaml(self.path / name) if (self.path / name).exists() else None


def _holds_something(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("step_*"))
    return path.exists() and path.stat().st_size > 0


def is_free(key: str, free: tuple[str, ...]) -> bool:
    """Whether `key` is one of `free`, or below one that ends in a dot."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in free)


def provenance() -> dict[str, Any]:
    """What a number needs beside it to be made again, as JSON values: commit, versions, processes, hardware."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "hardware": _hardware(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the checkout that runs, with + for changed tracked files; None outside of git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        told = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0].strip() + ("+" if told[1].strip() else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    plain = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", found[1] if found else platform.processor())
    return " ".join(plain.split())


def _hardware() -> dict[str, Any]:
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory, 1),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }
