"""What a run tells: lines for people, one progress bar, metrics.jsonl, TensorBoard."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from gcssl.errors import is_main_process
from gcssl.files import atomic_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PLAIN_SECONDS = 10.0  # between two progress lines where stderr is no terminal


def say(message: str) -> None:
    """One line on stdout, from the main process only; a progress bar stays below it."""
    if is_main_process():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


class RunLog:
    """Progress bar on stderr, `metrics.jsonl` (one object a line) and TensorBoard of one run.

    folder: the run folder. start_step: optimizer steps that the run has done already; what the files hold of
    later steps (a run that was killed after its last checkpoint) is dropped, so each step is told once.
    every: optimizer steps between two records. enabled: False in all but the main process: then nothing
    happens.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        start_step: int,
        every: int,
        trackers: Sequence[str],
        enabled: bool,
    ) -> None:
        self.enabled = enabled
        self.total_steps, self.start_step, self.every = total_steps, start_step, max(1, every)
        self._jsonl = Path(folder) / "metrics.jsonl"
        self._board: SummaryWriter | None = None
        self._bar: tqdm[Any] | None = None
        self._images = self._images_all = 0
        self._waited = self._waited_all = 0.0  # seconds, since the last record and since the beginning
        self._last_step = start_step
        self._plain_said = self._since = self._begun = time.monotonic()
        if not enabled:
            return
        cut_after(self._jsonl, start_step)
        self._file = open(self._jsonl, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        if "tensorboard" in trackers:
            self._board = _open_board(Path(folder) / "tensorboard", start_step)
        if _columns(sys.stderr):
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", file=sys.stderr, dynamic_ncols=True)

    @property
    def shows_images(self) -> bool:
        return self._board is not None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside (evaluations, checkpoints) counts neither in images/s nor in the time left."""
        start = time.monotonic()
        yield
        spent = time.monotonic() - start
        self._since += spent
        self._begun += spent

    def step(self, step: int, metrics: dict[str, float], n_images: int, data_wait: float = 0.0) -> None:
        """After optimizer step number `step` (the first is 1).

        n_images: of all processes, in this step. data_wait: seconds that this step waited for data; recorded
        is their share of the time since the last record. max_mem: GiB of GPU memory, the most so far.
        """
        if not self.enabled:
            return
        self._images += n_images
        self._images_all += n_images
        self._waited += data_wait
        self._waited_all += data_wait
        self._last_step = step
        now = time.monotonic()
        if step % self.every == 0 or step == self.total_steps:
            seconds = max(now - self._since, 1e-9)
            speed = {"images_per_s": self._images / seconds, "data_wait": self._waited / seconds}
            self.scalars(step, {**metrics, **speed, **_memory()})
            self._images, self._waited, self._since = 0, 0.0, now
        self._progress(step, metrics.get("loss", float("nan")), now)

    def scalars(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl and one point a metric."""
        if not self.enabled:
            return
        record = {"step": step, **{name: _number(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, step)

    def holds(self, step: int, name: str) -> bool:
        """Was this metric told at this step, by an earlier start too? False in all but the main process."""
        if not self.enabled:
            return False
        lines = map(json.loads, self._jsonl.read_text(encoding="utf-8").splitlines())
        return any(line["step"] == step and name in line for line in lines)

    def images(self, step: int, pictures: dict[str, Tensor]) -> None:
        """pictures: name -> B 3 H W in 0..1; one picture, a row a name."""
        if self._board is None:
            return
        rows = [batch.detach().float().clamp(0, 1).permute(1, 2, 0, 3).flatten(2) for batch in pictures.values()]
        self._board.add_image("reconstructions", torch.cat(rows, 1).cpu(), step)  # 3 rows*H B*W
        self._board.flush()

    def summary(self) -> str:
        """One line: steps and images done, images/s, share of the time of the steps spent waiting for data."""
        if self.start_step >= self.total_steps:
            return f"all {self.total_steps} steps are done already"
        seconds = max(time.monotonic() - self._begun, 1e-9)
        return (
            f"{self._last_step - self.start_step} steps, {self._images_all} images in {seconds:.1f} s: "
            f"{self._images_all / seconds:.1f} images/s, "
            f"{100 * self._waited_all / seconds:.0f} % of the time spent waiting for data"
        )

    def close(self) -> None:
        """May be called twice."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        self._file.close()

    def _progress(self, step: int, loss: float, now: float) -> None:
        speed = self._images_all / max(now - self._begun, 1e-9)
        pace = f"{speed:.{0 if speed >= 10 else 1}f} img/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {pace}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._plain_said >= PLAIN_SECONDS or step == self.total_steps:
            self._plain_said = now
            left = (now - self._begun) / max(1, step - self.start_step) * (self.total_steps - step)
            print(
                f"step {step}/{self.total_steps}, loss {loss:.4f}, {pace}, {timedelta(seconds=round(left))} left",
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _columns(stream: TextIO) -> int:
    """Of its terminal; 0 where it is none, or has no width, as in some containers: a bar would not be seen."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return 0


def _memory() -> dict[str, float]:
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {"max_mem": torch.cuda.max_memory_allocated() / 2**30} if on_gpu else {}


def _number(value: float) -> float | None:
    """JSON has no nan and no infinity: null."""
    number = float(value)
    return number if number - number == 0 else None


def cut_after(path: Path, step: int) -> None:
    """Drop a file's JSON lines of later steps, and a last line that a kill left half written."""
    if not path.exists():
        return
    old = path.read_text(encoding="utf-8", errors="replace")
    kept = [line for line in old.splitlines(keepends=True) if is_kept(line, step)]
    if "".join(kept) != old:
        atomic_write(path, "".join(kept))


def is_kept(line: str, last: int) -> bool:
    """Whether a whole JSON line is of a step up to the last one."""
    try:
        return line.endswith("\n") and int(json.loads(line)["step"]) <= last
    except (ValueError, KeyError, TypeError):
        return False


def _open_board(folder: Path, start_step: int) -> "SummaryWriter":
    """Points after start_step are purged by the reader; tensorboard's import says nothing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    purge = start_step + 1 if folder.exists() else None
    return SummaryWriter(str(folder), purge_step=purge)
