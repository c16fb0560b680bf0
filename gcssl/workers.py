"""The processes that read images ahead: what they read is known, and a failure of theirs ends the run with one line."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import traceback
import weakref
from functools import partial
from multiprocessing import queues
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from gcssl.data import Images
from gcssl.errors import Failure, UserError, one_line
from gcssl.runtime import end_with_parent


class ReportingSet(Dataset[dict[str, Any]]):
    """A set over images whose workers report what they read, so that the image which hangs or kills one is named."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.reading: Any = None  # what each worker reads now, -1 for none: shared memory, set by WorkerLoader

    def load(self, index: int) -> np.ndarray:
        self._report(index)
        try:
            return self.images.load(index)
        finally:
            self._report(-1)

    def _report(self, index: int) -> None:
        info = get_worker_info()
        if self.reading is not None and info is not None:
            self.reading[info.id] = index


class WorkerLoader(DataLoader[Any]):
    """`with WorkerLoader(...) as loader:` is a DataLoader whose failures are one line, wherever in the block torch's
    signal handler raises that of a worker.
    """

    def __init__(self, dataset: ReportingSet, *, num_workers: int, timeout: int, **how: Any) -> None:
        """timeout: seconds that a worker may take for one batch."""
        super().__init__(
            dataset,
            num_workers=num_workers,
            timeout=timeout if num_workers else 0,
            worker_init_fn=partial(_start_worker, os.getpid()),
            multiprocessing_context=_context() if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # torch draws from it; nothing of a batch comes from there
            **how,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is not None and _is_death(error):
            raise Failure(self._what_died(error)) from error

    def __iter__(self) -> Any:
        if self.num_workers:
            dataset: Any = self.dataset
            dataset.reading = multiprocessing.get_context(_context()).Array("q", [-1] * self.num_workers, lock=False)
        iterator: Any = self._started() if self.num_workers else super().__iter__()
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                if _is_death(error):
                    raise Failure(self._what_died(error)) from error
                if self.num_workers:  # else the garbage collector may close the queues first, and wait 10 s a worker
                    iterator._shutdown_workers()
                if not isinstance(error, UserError | Failure):
                    raise
                line = str(error).strip().split("\n")[-1]  # torch puts the worker's traceback before the message
                raise type(error)(line.removeprefix(f"gcssl.errors.{type(error).__name__}: ")) from None
            yield batch

    def _started(self) -> Any:
        """The iterator, its workers known to `_end_workers`; one that the system does not start ends with one line."""
        others = set(multiprocessing.active_children())
        try:
            iterator: Any = super().__iter__()
        except OSError as error:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            given = f"data.workers={self.num_workers}: a worker cannot be started ({one_line(error)})"
            raise UserError(f"{given}; lower it, or raise the limits on open files and processes") from None
        _WORKERS.update(iterator._workers)
        return iterator

    def _what_died(self, error: BaseException) -> str:
        reason = " ".join(str(error).split())
        dataset: Any = self.dataset
        files = [dataset.images.where(index) for index in dataset.reading or () if index >= 0]
        if any(worker.exitcode == NO_ROOM for worker in _WORKERS):
            full = f"/dev/shm, through which workers hand over their batches, is full (data.workers={self.num_workers})"
            return f"{full}; make it larger (docker run --shm-size=8g), or set data.workers=0"
        doing = f"workers were reading {', '.join(files)}" if files else "no worker was reading a file"
        return f"{reason[:200]}; {doing} (data.workers={self.num_workers}, data.timeout={self.timeout:g} s)"


def _is_death(error: BaseException) -> bool:
    """A worker's that died or hung, not one that it raised."""
    return isinstance(error, RuntimeError) and "DataLoader" in str(error) and "Caught" not in str(error)


NO_ROOM = 74  # exit code of a worker that cannot hand its batch over (sysexits.h: EX_IOERR)
_WORKERS: weakref.WeakSet[Any] = weakref.WeakSet()  # weak: a process that is held keeps its file descriptors


@atexit.register  # after multiprocessing's own, so called before it
def _end_workers() -> None:
    """At exit: a worker whose batches nobody will ask for ignores SIGTERM, and would be waited for without end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker is killed
    for worker in list(_WORKERS):
        with contextlib.suppress(ValueError):  # closed already
            worker.kill()


def _context() -> str:
    can_fork = "fork" in multiprocessing.get_all_start_methods() and get_worker_info() is None
    return "fork" if can_fork else "spawn"


def _start_worker(parent: int, _: int) -> None:
    """Signals are the main process's business, which lets its workers finish; they die with it, whatever they await."""
    end_with_parent(parent, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # sent to every process of a job
        signal.signal(number, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(_cannot_send)  # type: ignore[attr-defined]


def _cannot_send(error: Exception, _: Any) -> None:
    """Of a batch that cannot be handed over Python prints a traceback and goes on, and the main process would wait."""
    if "shared memory" not in str(error):
        traceback.print_exception(error)
    os._exit(NO_ROOM if "shared memory" in str(error) else 1)
