"""Exit codes, the run folder, signals, seeds, and what the accelerator is allowed to be."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gcssl.config import RuntimeConfig, TrainConfig
from gcssl.errors import CannotWrite, LostProcess, NumericStop, Preempted, UserError, outcome
from gcssl.runtime import (
    StopSignal,
    batch_layout,
    bf16_is_fast,
    entry,
    main_process_first,
    make_accelerator,
)

ROOT = Path(__file__).resolve().parents[2]


def leave(end: BaseException | signal.Signals | None, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of a program whose main ends with `end`; in a fork, which is quick."""

    def main(_: list[str]) -> None:
        if isinstance(end, signal.Signals):
            os.kill(os.getpid(), end)
            time.sleep(10)
        elif end is not None:
            raise end

    told = folder / "stderr"
    child = os.fork()
    if child == 0:
        code = 99
        with open(told, "w") as sys.stderr:
            try:
                entry(main)
            except SystemExit as left:
                code = int(left.code or 0)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), told.read_text()


# --- exit codes


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (None, 0, ""),
        (UserError("data.path: no such\nfolder"), 2, "gcssl: data.path: no such folder"),
        (Preempted("stopped at step 3"), 75, "gcssl: stopped at step 3"),
        (NumericStop("loss is nan"), 78, "gcssl: loss is nan"),
        (ValueError("broken"), 1, "ValueError: broken"),
        (signal.SIGTERM, 75, "gcssl: stopped by SIGTERM; run the same command again"),
        (signal.SIGUSR1, 75, "gcssl: stopped by SIGUSR1; run the same command again"),
        (signal.SIGHUP, 75, "gcssl: stopped by SIGHUP; run the same command again"),
    ],
)
def test_entry_maps_ends_to_exit_codes(
    tmp_path: Path, end: Exception | signal.Signals | None, code: int, line: str
) -> None:
    left, told = leave(end, tmp_path)
    assert left == code
    assert told.strip().splitlines()[-1:] == ([line] if line else [])
    assert ("Traceback" in told) == (code == 1) and (code == 1 or len(told.splitlines()) == bool(line))


@pytest.mark.fault("the disk is full when a run logs", "one line says to make room; the same command goes on")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(tmp_path: Path, number: int) -> None:
    code, told = leave(OSError(number, os.strerror(number)), tmp_path)
    assert code == 1 and told.startswith(f"gcssl: [Errno {number}]") and told.count("\n") == 1
    assert "make room on that disk, and run the same command again" in told
    assert leave(CannotWrite("out: the disk is full"), tmp_path) == (1, "gcssl: out: the disk is full\n")


@pytest.mark.fault("a GPU's memory is too small", "one line says what needs less")
def test_a_full_gpu_is_one_line(tmp_path: Path) -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB of which none is free."
    code, told = leave(torch.OutOfMemoryError(text), tmp_path)
    assert (code, told.count("\n")) == (1, 1)
    assert told.startswith("gcssl: CUDA out of memory. Tried to allocate 2.00 GiB; a smaller train.batch_size")
    assert "model.grad_checkpointing=true needs less" in told


def test_a_program_may_open_what_the_system_allows() -> None:
    code = "import resource\nfrom gcssl.runtime import entry\n"
    code += "entry(lambda _: print(*resource.getrlimit(resource.RLIMIT_NOFILE)))"
    told = subprocess.run(["bash", "-c", 'ulimit -Sn 200; ulimit -Hn 900; exec "$@"', "-", sys.executable, "-c", code],
                          capture_output=True, text=True, check=True, timeout=60).stdout  # fmt: skip
    assert told.split() == ["900", "900"]


def test_a_second_signal_does_not_change_the_exit_code() -> None:
    """A scheduler that is in a hurry repeats it while the first one's line is written and Python shuts down.

    What is said before may hold a file name that is no UTF-8.
    """
    program = (
        "import atexit, os, signal\n"
        "from gcssl.runtime import entry\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "entry(lambda _: print('caf\\udce9') or os.kill(os.getpid(), signal.SIGTERM))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (75, 1, "caf\\udce9\n"), done


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a signal")
def test_a_launcher_that_dies_while_it_is_looked_at_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of deaths that come after it was asked to, so of this one nobody else would."""
    with subprocess.Popen(["sh", "-c", "read _", "accelerate", "launch"], stdin=subprocess.PIPE) as launcher:
        parents = iter([launcher.pid, 1])
        monkeypatch.setattr(os, "getppid", lambda: next(parents))
        assert leave(None, tmp_path) == (-signal.SIGTERM, "")


@pytest.mark.slow
@pytest.mark.fault("a process lost before the images are opened, no launcher ends the others", "they end, in one line")
def test_a_process_that_is_lost_before_the_images_are_opened_ends_the_others() -> None:
    """Nobody's launcher ends them, as under SLURM: the main process has opened the images and waits."""
    program = (
        "import os; from gcssl.config import RuntimeConfig, TrainConfig\n"
        "from gcssl.runtime import entry, main_process_first, make_accelerator\n"
        "def main(_):\n"
        "    accelerator = make_accelerator(TrainConfig(), RuntimeConfig(timeout=3))\n"
        "    if accelerator.process_index == 1:\n"
        "        os._exit(137)\n"
        "    with main_process_first(accelerator):\n"
        "        pass\n"
        "entry(main)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world |= {"ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **world, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    (_, told), _ = (process.communicate(timeout=120) for process in ranks)
    assert ranks[0].returncode == 1, told
    assert "gcssl: a process was lost before or while it opened the images: waited" in told


@pytest.mark.fault("a signal while the images are opened", "each process ends at once and waits for no other")
def test_who_leaves_by_a_signal_while_the_images_are_opened_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    accelerator: Any = SimpleNamespace(num_processes=2, is_main_process=True)
    for error in (Preempted("stopped by SIGTERM"), KeyboardInterrupt()):
        with pytest.raises(type(error)), main_process_first(accelerator):
            raise error
    with pytest.raises(LostProcess, match="if it was copying them, raise runtime.timeout"):
        with main_process_first(accelerator):
            pass


def test_ctrl_c_is_one_line(tmp_path: Path) -> None:
    assert leave(KeyboardInterrupt(), tmp_path) == (1, "gcssl: interrupted from the keyboard\n")


def test_another_process_speaks_only_when_the_main_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert leave(UserError("x: bad"), tmp_path) == (2, "gcssl: x: bad (process 1)\n")


def test_only_an_end_that_all_processes_share_waits_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To leave the process group waits; a signal outside of the loop may have come to this process alone."""
    monkeypatch.setattr("gcssl.runtime._leave_process_group", lambda: print("waits", file=sys.stderr))
    waits = {}
    for end in (None, Preempted("p"), NumericStop("n"), UserError("u"), signal.SIGTERM):
        _, told = leave(end, tmp_path)
        waits[end if end is None else type(end).__name__] = "waits" in told
    assert waits == {None: True, "Preempted": True, "NumericStop": True, "UserError": False, "Signals": False}


def test_outcomes() -> None:
    assert outcome(None) == outcome(SystemExit(0)) == ("finished", 0, "")
    assert outcome(UserError("a\n b")) == ("refused", 2, "a b")
    assert outcome(Preempted("p"))[:2] == ("preempted", 75)
    assert outcome(NumericStop("n"))[:2] == ("failed", 78)
    assert outcome(KeyboardInterrupt())[:2] == ("failed", 1)
    assert outcome(OSError("o")) == ("failed", 1, "OSError: o")


# --- stop signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_sets_a_flag_and_is_given_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == ("Ctrl-C" if number == signal.SIGINT else number.name)
    assert signal.getsignal(number) is before


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_loop_in_another_thread_leaves_signals_alone() -> None:
    def loop() -> bool:
        with StopSignal(max_hours=0) as stop:
            return stop.requested

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(loop).result() and signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_is_not_waited_for() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_what_is_done_at_once_ends_with_the_signal(when: str) -> None:
    with StopSignal() as stop, pytest.raises(Preempted, match=r"stopped at step 3 of 9 \(SIGTERM\)") as raised:
        if when == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        with stop.at_once(3, 9):
            if when == "inside":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            pytest.fail("it went on")
    assert not raised.value.agreed
    with StopSignal() as stop:
        with stop.at_once(3, 9):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested  # outside it waits for the loop again


def test_the_time_limit_is_a_request_too() -> None:
    with StopSignal(max_hours=0.05 / 3600) as stop:
        assert not stop.requested
        time.sleep(0.06)
        assert stop.requested and "train.max_hours" in stop.reason
    with StopSignal(max_hours=1.0) as stop:
        assert not stop.requested


# --- accelerator


def test_the_global_batch_gives_the_accumulation() -> None:
    assert batch_layout(TrainConfig(batch_size=8, accumulate=3), 2) == (8, 3, 48)
    assert batch_layout(TrainConfig(batch_size=8, global_batch=64), 2) == (8, 4, 64)
    assert batch_layout(TrainConfig(batch_size=128, global_batch=1024), 16) == (64, 1, 1024)  # its share is less
    with pytest.raises(UserError, match="train.global_batch: given 64, expected a multiple of 3 processes"):
        batch_layout(TrainConfig(batch_size=32, global_batch=64), 3)
    with pytest.raises(UserError, match="train.global_batch: given 60, expected a multiple of 16"):
        batch_layout(TrainConfig(batch_size=8, global_batch=60), 2)
    assert batch_layout(TrainConfig(batch_size=8, global_batch=64, accumulate=4), 2) == (8, 4, 64)
    with pytest.raises(UserError, match="train.accumulate: given 2, but train.global_batch=64 accumulates 4 here"):
        batch_layout(TrainConfig(batch_size=8, global_batch=64, accumulate=2), 2)


def test_the_accelerator_has_our_settings_also_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    first = make_accelerator(TrainConfig(accumulate=2), RuntimeConfig())
    assert (first.mixed_precision, first.gradient_accumulation_steps) == ("no", 2)
    assert first.ddp_handler is not None
    assert not first.ddp_handler.broadcast_buffers  # queue and centre are equal already
    second = make_accelerator(TrainConfig(precision="bf16", batch_size=8, global_batch=24), RuntimeConfig())
    assert (second.mixed_precision, second.gradient_accumulation_steps) == ("bf16", 3)
    make_accelerator(TrainConfig(), RuntimeConfig())


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision=fp16; remove that and use train.precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps=4"),
        ("ACCELERATE_USE_FSDP", "true", "distributed_type FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "distributed_type DEEPSPEED"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "distributed_type MEGATRON_LM"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "use train.compile"),
    ],
)
def test_a_launcher_that_sets_other_values_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match="accelerate config") as refused:
        make_accelerator(TrainConfig(), RuntimeConfig())
    assert told in str(refused.value)


def test_processes_that_accelerate_does_not_see_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would train the same run twice; Accelerate has counted one process by now, and does not count again."""
    make_accelerator(TrainConfig(), RuntimeConfig())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="launcher: it started 2 processes, of which accelerate sees 1; start them"):
        make_accelerator(TrainConfig(), RuntimeConfig())


FAULTS = """
import resource, sys
import torch
from gcssl.config import RuntimeConfig, TrainConfig
from gcssl.runtime import make_accelerator

def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults(4)
make_accelerator(TrainConfig(), RuntimeConfig())
print(first, min(faults(4) for _ in range(4)))  # the first ones may still find another place
"""


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="is about the CPU and glibc")
def test_memory_that_a_step_frees_is_there_for_the_next_one() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after < 100 < before


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="train.precision: given fp16 on a machine without a GPU"):
        make_accelerator(TrainConfig(precision="fp16"), RuntimeConfig())


def test_bf16_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(UserError, match="train.precision: Tesla T4 has no bf16, expected fp16 or fp32"):
        make_accelerator(TrainConfig(precision="bf16"), RuntimeConfig())


def test_deterministic_turns_nondeterministic_kernels_off_and_on() -> None:
    try:
        make_accelerator(TrainConfig(deterministic=True), RuntimeConfig())
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
    finally:
        make_accelerator(TrainConfig(), RuntimeConfig())
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic and torch.backends.cudnn.benchmark


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
@pytest.mark.parametrize("fast", [True, False])
def test_a_slow_bf16_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fast: bool) -> None:
    monkeypatch.setattr("gcssl.runtime.bf16_is_fast", lambda: fast)
    for precision in ("fp32", "bf16"):
        make_accelerator(TrainConfig(precision=precision), RuntimeConfig())
        assert ("slower than in fp32" in capsys.readouterr().out) == (precision == "bf16" and not fast)


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX2",
    reason="is about processors that certainly lack bf16 instructions",
)
def test_emulated_bf16_is_not_fast() -> None:
    assert not bf16_is_fast()
