"""What a process needs around the training: its end, stop signals, the accelerator.

The run folder is in gcssl/runfolder.py, the exit codes in gcssl/errors.py.
"""

import ctypes
import functools
import itertools
import logging
import os
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Self

from gcssl.errors import Failure, LostProcess, Preempted, UserError, is_main_process, outcome, too_small
from gcssl.streams import keep_talking

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gcssl.config import RuntimeConfig, TrainConfig

_TURNS = itertools.count()  # of main_process_first: all processes take the same ones


def entry(main: Callable[[list[str]], None]) -> None:
    """Run a program's main on the command line and leave with its exit code (1 with a traceback)."""
    quiet_libraries()
    follow_launcher()
    open_more_files()
    keep_talking()
    error: BaseException | None = None
    try:
        for number in stop_signals():
            signal.signal(number, _stop_here)
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt, Preempted) as raised:
        error = raised
    _, code, reason = outcome(error)
    if code in (0, 75, 78) and getattr(error, "agreed", True):  # by all processes: nobody waits for a dead one
        _leave_process_group()
    if error is not None:
        _report(error, code, reason)
    sys.exit(code)


def open_more_files(most: int = 65_536) -> None:
    """A worker hands each tensor of a batch over as an open file: ten of DINO's crops exceed the usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def stop_signals() -> tuple[signal.Signals, ...]:
    """What asks for an end; a hang-up only where it was not ignored, as nohup does."""
    hears = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGUSR1, *([signal.SIGHUP] if hears else []))


def _stop_here(number: int, _: FrameType | None) -> None:
    """Outside of the loop (see StopSignal) there is nothing to finish first."""
    error = Preempted(f"stopped by {signal.Signals(number).name}; run the same command again")
    error.agreed = False
    raise error


def end_with_parent(parent: int, number: int) -> None:
    """Have the kernel send this process signal `number` when its `parent` dies, or at once where that is gone."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # sys/prctl.h: PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when `accelerate launch` dies: it leaves its one process running, untold."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return
    if b"launch" in words and any(b"accelerate" in word for word in words):
        end_with_parent(parent, signal.SIGTERM)


def _report(error: BaseException, code: int, reason: str) -> None:
    """One line on stderr, from the main process; from another one where the main one did not end the job."""
    for number in stop_signals():  # the exit code is known; what follows takes no more time
        signal.signal(number, signal.SIG_IGN if is_main_process() else signal.SIG_DFL)
    who = ""
    if not is_main_process():
        time.sleep(8)  # an error that all have is told by the main process; the launcher then ends this one
        who = f" (process {os.environ['RANK']})"
    if code == 1 and not isinstance(error, KeyboardInterrupt | Failure) and too_small(error) is None:
        traceback.print_exception(error)
    else:
        print(f"gcssl: {reason}{who}", file=sys.stderr, flush=True)


def _leave_process_group() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def quiet_libraries() -> None:
    """No progress bars, warnings or log lines of libraries, here and in child processes.

    PYTHONWARNINGS and -W win.
    """
    quiet = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "GRPC_VERBOSITY": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore")
    for library in (
        "accelerate",
        "absl",
        "datasets",
        "huggingface_hub",
        "PIL",
        "tensorboard",
        "timm",
        "torch",
    ):
        logging.getLogger(library).setLevel(logging.ERROR)
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    if "huggingface_hub" in sys.modules:
        sys.modules["huggingface_hub"].utils.disable_progress_bars()


def batch_layout(train: "TrainConfig", world: int) -> tuple[int, int, int]:
    """(images of a micro-batch in each of `world` processes, accumulation steps, global batch).

    train.global_batch, where it is set, decides: it is accumulated, or a larger train.batch_size lowered to its share.
    """
    if train.global_batch is None:
        return train.batch_size, train.accumulate, train.batch_size * world * train.accumulate
    if train.global_batch % world:
        raise UserError(f"train.global_batch: given {train.global_batch}, expected a multiple of {world} processes")
    batch = min(train.batch_size, train.global_batch // world)
    if train.global_batch % (batch * world):
        raise UserError(
            f"train.global_batch: given {train.global_batch}, expected a multiple of {batch * world} "
            f"(train.batch_size {batch} x {world} processes); change train.batch_size"
        )
    accumulate = train.global_batch // (batch * world)
    if train.accumulate not in (1, accumulate):
        told = f"train.global_batch={train.global_batch} accumulates {accumulate} here"
        raise UserError(f"train.accumulate: given {train.accumulate}, but {told}; leave one of the two out")
    return batch, accumulate, train.global_batch


def make_accelerator(train: "TrainConfig", runtime: "RuntimeConfig") -> "Accelerator":
    """Device, DDP, precision and accumulation from our config; refuses a launcher that sets others."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    from gcssl.log import say

    _, accumulate, _ = batch_layout(train, int(os.environ.get("WORLD_SIZE", "1")))
    _refuse_foreign_settings(train, accumulate)
    set_deterministic(train.deterministic)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, in convolutions as in torch's other products
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: given fp16 on a machine without a GPU, expected fp32 or bf16")
    if train.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        raise UserError(f"train.precision: {torch.cuda.get_device_name()} has no bf16, expected fp16 or fp32")
    if train.precision == "bf16" and not bf16_is_fast():
        say("precision bf16: products in it are slower than in fp32 on this processor; precision fp32 will be faster")
    # Accelerate keeps both as singletons and refuses other values; another run in this process may differ.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise torchrun's CPU processes stay strangers
        mixed_precision="no" if train.precision == "fp32" else train.precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=accumulate, adjust_scheduler=False, sync_with_dataloader=False
        ),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=runtime.timeout)),
        ],
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise UserError(
            f"launcher: it started {world} processes, of which accelerate sees {accelerator.num_processes}; "
            "start them with torchrun, or with one of configs/accelerate/"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    accelerator.wait_for_everyone()  # a process that ends at once must not leave others half connected
    return accelerator


@functools.cache
def bf16_is_fast() -> bool:
    """On a GPU, or where a trial on this CPU says so: one that has the instructions can be slower with them."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a, b, times = torch.ones(512, 256, dtype=dtype), torch.ones(256, 512, dtype=dtype), []
        for _ in range(5):  # a second in all where they are emulated
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return min(times)

    return torch.cuda.is_available() or seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def check_accelerator(accelerator: "Accelerator", train: "TrainConfig", accumulate: int) -> None:
    """ValueError where it was made for another train section: it would compute in its own precision, untold."""
    wanted = ("no" if train.precision == "fp32" else train.precision, accumulate)
    given = (accelerator.mixed_precision, accelerator.gradient_accumulation_steps)
    if given != wanted:
        told = "accelerator: given precision and accumulation"
        raise ValueError(f"{told} {given}, expected {wanted}: use make_accelerator(cfg.train, cfg.runtime)")


@contextmanager
def main_process_first(accelerator: "Accelerator") -> Iterator[None]:
    """The main process runs the block before the others do, and all leave it together, however long it takes: copying
    or listing a set takes hours, and runtime.timeout is for processes that compute. LostProcess where the others take
    runtime.timeout more than twice as long as the main process did; who leaves by a signal waits for nobody."""
    if accelerator.num_processes == 1:
        yield
        return
    from torch import distributed

    store = distributed.distributed_c10d._get_default_store()  # no group of gloo, which needs a network of its own
    turn, begin, together = f"gcssl/first/{next(_TURNS)}", time.monotonic(), True
    if not accelerator.is_main_process:
        store.wait([f"{turn}/main"], timedelta(days=2))
    try:
        yield
    except (Preempted, KeyboardInterrupt):  # the others may have got it too, and be gone
        together = False
        raise
    finally:
        store.set(f"{turn}/main", "")
        if together:
            if store.add(f"{turn}/count", 1) == accelerator.num_processes:
                store.set(f"{turn}/all", "")
            patience = store.timeout + 2 * timedelta(seconds=time.monotonic() - begin)  # type: ignore[attr-defined]
            try:
                store.wait([f"{turn}/all"], patience)
            except RuntimeError as error:
                told = f"waited {patience.total_seconds():.0f} s for it; if it was copying them, raise runtime.timeout"
                raise LostProcess(f"a process was lost before or while it opened the images: {told}") from error


def keep_freed_memory() -> None:
    """Have glibc keep what torch frees: given back, every step faults the same pages in again."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28)):
            libc.mallopt(option, value)  # type: ignore[union-attr]


def _refuse_foreign_settings(train: "TrainConfig", accumulate: int) -> None:
    """`accelerate launch` hands its config down in the environment, where it would silently win over ours."""
    ours = "no" if train.precision == "fp32" else train.precision
    expected = {
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", {"no", ours}, "train.precision"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "gradient_accumulation_steps",
            {"1", str(accumulate)},
            "train.global_batch or train.accumulate",
        ),
        "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", {"no"}, "train.compile"),
        "ACCELERATE_USE_FSDP": ("distributed_type FSDP", {"false"}, "MULTI_GPU and train.shard=true"),
        "ACCELERATE_USE_DEEPSPEED": (
            "distributed_type DEEPSPEED",
            {"false"},
            "plain data parallelism (MULTI_GPU)",
        ),
        "ACCELERATE_USE_MEGATRON_LM": (
            "distributed_type MEGATRON_LM",
            {"false"},
            "plain data parallelism (MULTI_GPU)",
        ),
    }
    for variable, (name, allowed, instead) in expected.items():
        given = os.environ.get(variable)
        if given is not None and given.lower() not in allowed:
            raise UserError(f"accelerate config: it sets {name}={given}; remove that and use {instead}")


def set_deterministic(on: bool) -> None:
    """Only deterministic kernels: equal bits on the same GPU model and software.

    Must precede the first CUDA call.
    """
    import torch

    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on


class StopSignal:
    """Turns SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C into a flag that the loop reads between two steps; also
    train.max_hours. A second Ctrl-C ends the run at once. In a thread that is not the main one signals are others'.

    The handlers only set the flag. `requested` is this process's own view: the caller reduces it over
    processes.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.reason = ""
        self.deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours
        self.max_hours = max_hours
        self._at: tuple[int, int] | None = None  # step and total, inside at_once
        heard = (*stop_signals(), signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in heard}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._leave()

    def _leave(self) -> None:
        if self._at is not None and self.reason:
            error = Preempted(self.told(*self._at))
            error.agreed = False
            raise error

    @contextmanager
    def at_once(self, step: int, total: int) -> Iterator[None]:
        """Inside, a signal ends the run without waiting: what is done here is done again by the next start.

        The processes do not agree on it: one that gets no signal sees the others leave.
        """
        try:
            self._at = step, total
            self._leave()  # it may have come before
            yield
        finally:
            self._at = None

    def told(self, step: int, total: int) -> str:
        why = self.reason or "another process was told to"
        return f"stopped at step {step} of {total} ({why}); run the same command again to go on"

    @property
    def requested(self) -> bool:
        if not self.reason and self.deadline is not None and time.monotonic() >= self.deadline:
            self.reason = f"train.max_hours={self.max_hours:g} are over"
        return bool(self.reason)

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
