"""Which process was lost: each tells the others' common store what step it has begun, and a survivor reads it."""

import itertools
import time
from types import TracebackType
from typing import Self

import torch.distributed as dist
from accelerate import Accelerator

from gcssl.errors import LostProcess

_FITS = itertools.count()  # in one process: the store keeps what an earlier one told
SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset", "c10d")  # in what torch raises when one is gone


class Heartbeat:
    """`with Heartbeat(accelerator) as heartbeat:` turns a lost connection inside into one line that names the process.

    NCCL ends a process on its own when another one hangs; there torch's lines name the rank.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.keys = f"gcssl/{next(_FITS)}"
        self.store = dist.distributed_c10d._get_default_store() if self.world > 1 else None

    def beat(self, step: int) -> None:
        """This process has the batch of step `step`."""
        if self.store is not None:
            self.store.set(f"{self.keys}/{self.rank}", f"{step} {time.time():.0f}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: TracebackType | None) -> None:
        if self.store is not None and isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS):
            raise LostProcess(f"{self.behind()}: {' '.join(str(error).split())[:200]}") from error

    def behind(self) -> str:
        """The processes that are behind this one, as far as the store tells."""
        assert self.store is not None
        try:
            names = [f"{self.keys}/{rank}" for rank in range(self.world)]
            told = [self.store.get(name).decode().split() if self.store.check([name]) else None for name in names]
        except Exception:  # its host was the process that is gone
            return "another process was lost, probably the first one"
        steps = [-1 if one is None else int(one[0]) for one in told]
        late = [rank for rank, step in enumerate(steps) if step < max(steps)]
        if not late:
            return f"a process was lost; all of them had begun step {max(steps) + 1}, the launcher may tell which one"
        seen = told[late[0]]
        ago = "never heard of" if seen is None else f"heard of {time.time() - int(seen[1]):.0f} s ago"
        which = f"process {late[0]}" if len(late) == 1 else f"processes {', '.join(map(str, late))}"
        return f"{which} hung or died before step {max(steps) + 1}, {ago}"
