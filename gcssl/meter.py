"""What a step measures and what the processes must agree on: losses, a finite check, a wish to stop, bad files."""

import json
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from gcssl.errors import UserError, is_main_process
from gcssl.log import cut_after, is_kept, say

TAKEN = ("step", "epoch", "lr", "wd", "grad_norm", "finite", "stop", "bad", "skipped", "bad_images")  # by the loop
BadSample = tuple[int, str, str]  # index, path, reason


class Meter:
    """Collects one optimizer step's scalars over its micro-batches and reduces them over the processes."""

    def __init__(self, accelerator: Accelerator, listed: Collection[int] = ()) -> None:
        self.accelerator = accelerator
        self.listed = listed  # bad images that all processes know of: what comes up again is no news
        self.outs: list[dict[str, Tensor]] = []
        self.bad: list[BadSample] = []
        self.indices: list[Tensor] = []  # of the step's images
        self.waited = 0.0  # seconds that this step waited for its micro-batches

    def waiting(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches; the time spent waiting for them is measured, but for the first (start-up)."""
        batches = iter(loader)
        batch = next(batches, None)
        while batch is not None:
            yield batch
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start

    def note(self, batch: dict[str, Any]) -> None:
        """Which images a micro-batch holds, and which of them were bad; before its `add`."""
        self.indices = [*(self.indices if self.outs else []), batch["index"]]
        self.bad.extend(sample for sample in batch["bad"] if sample[0] not in self.listed)

    def add(self, out: dict[str, Any]) -> None:
        """Keep the scalars of one micro-batch; keys that begin with an underscore are the objective's own."""
        told = {k: v for k, v in out.items() if not k.startswith("_")}
        if wrong := [k for k, v in told.items() if k in TAKEN or not isinstance(v, Tensor) or v.ndim]:
            names = f"other names than {', '.join(TAKEN)}"
            raise ValueError(f"an objective's forward: tensors of no dimension by {names} expected, wrong: {wrong}")
        self.outs.append({k: v.detach().float() for k, v in told.items()})

    def reduce(self, grad_norm: Tensor, stop: bool) -> dict[str, float]:
        """Means over micro-batches and processes, with `finite`, `stop` and `bad`: one all-reduce and one host read,
        in fp16 two."""
        keys = list(self.outs[0])
        losses = torch.stack([torch.stack([out[k].to(grad_norm.device) for k in keys]) for out in self.outs]).mean(0)
        local = torch.cat([losses, grad_norm.detach().float().reshape(1)])
        scaler = self.accelerator.scaler  # it skips infinite gradients by itself, until no scale is left to lower
        loss = losses[keys.index("loss")]  # alone: gradient norms of parts are taken at the scaler's scale
        judged = torch.stack([loss, local[-1] if scaler is None or scaler.get_scale() <= 1 else loss])
        infinite = (~torch.isfinite(judged)).any().float().reshape(1)
        flags = local.new_tensor([float(stop), float(len(self.bad))])
        packed = torch.cat([infinite, flags, local / self.accelerator.num_processes])
        if self.accelerator.num_processes > 1:
            dist.all_reduce(packed)
        wild, stop_sum, bad, *means = packed.tolist()
        self.outs = []
        values = dict(zip([*keys, "grad_norm"], means, strict=True))
        return values | {"finite": wild == 0, "stop": stop_sum > 0, "bad": bad > 0}

    @property
    def micro(self) -> int:
        """Which micro-batch of its step comes next, from 0."""
        return len(self.outs)

    def take_wait(self) -> float:
        waited, self.waited = self.waited, 0.0
        return waited

    def take_bad(self) -> list[BadSample]:
        bad, self.bad = self.bad, []
        return bad


class BadSamples:
    """The files that could not be decoded, each listed once in `bad_samples.jsonl`; read up to `step` at a start.

    Raises UserError when more than `max_bad` (a share) of the data set is bad.
    """

    def __init__(self, folder: Path, step: int, n_images: int, max_bad: float) -> None:
        self.path, self.n_images, self.max_bad = folder / "bad_samples.jsonl", n_images, max_bad
        self.seen: set[int] = set()
        if self.path.exists():
            self._read(step)

    def _read(self, step: int) -> None:
        """What an earlier start listed up to this step, by every process alike; later or half written lines go."""
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        self.seen = {int(json.loads(line)["index"]) for line in lines if is_kept(line, step)}
        if is_main_process():
            cut_after(self.path, step)

    def summarise(self) -> None:
        if self.seen:
            how_many = f"{len(self.seen)} of {self.n_images} images cannot be decoded"
            say(f"{how_many} and were replaced, listed in {self.path}")

    def record(self, step: int, bad: list[BadSample], accelerator: Accelerator) -> None:
        """What step number `step` met. Called by every process together, whichever of them met the files."""
        every = gather_object(bad) if accelerator.num_processes > 1 else bad
        new = {index: (path, reason) for index, path, reason in sorted(every) if index not in self.seen}
        if accelerator.is_main_process and new:
            with self.path.open("a") as file:
                for index, (path, reason) in new.items():
                    told = {"step": step, "index": index, "path": path, "reason": reason}
                    file.write(json.dumps(told) + "\n")
        if new and not self.seen:
            index, (path, reason) = next(iter(new.items()))
            say(f"bad image replaced: {path} ({reason}); all of them are listed in {self.path}")
        self.seen |= set(new)
        if len(self.seen) > self.max_bad * self.n_images:
            raise UserError(
                f"data.max_bad={self.max_bad}: {len(self.seen)} of {self.n_images} images cannot be decoded so far,"
                f" listed in {self.path}; raise data.max_bad to go on, or mend them and begin again in another folder"
            )
