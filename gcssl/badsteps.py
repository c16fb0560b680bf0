"""Optimizer steps that must not count: a loss or gradient that is not finite, or a loss far above the last ones.

All processes skip such a step alike, as every number judged here is reduced over them: parameters, optimizer, teacher,
queue, centre and batch norms are left as if the batch had not been. The rule for a spike is that of OLMo's
SkipStepOptimizer, on the loss alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from gcssl.config import TrainConfig
from gcssl.log import say

WINDOW = 128  # steps whose losses a spike is measured against; before there are as many nothing is one


def tracked_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Its batch norms with running statistics, by name."""
    return {name: m for name, m in model.named_modules() if getattr(m, "track_running_stats", False)}


class BadSteps:
    """Judges each step, counts and lists the bad ones in `bad_steps.jsonl`, and puts back what a forward changed."""

    def __init__(self, folder: Path, train: TrainConfig, model: nn.Module) -> None:
        self.path, self.sigma = folder / "bad_steps.jsonl", train.spike_sigma
        self.losses: list[float] = []  # spikes too, so that a new level is soon the normal one
        self.skipped = 0
        self.in_a_row: list[dict[str, Any]] = []  # what was listed of the bad steps since the last good one
        self.norms = list(tracked_norms(model).values())
        self.before: list[Tensor] = []

    @property
    def buffers(self) -> list[Tensor]:
        """Those of batch norms, which a forward pass changes; asked for anew, as moving a model replaces them."""
        return [buffer for norm in self.norms for buffer in norm.buffers(recurse=False)]

    def running(self) -> list[Tensor]:
        """Running means and variances of the norms in training mode, to be averaged over the processes."""
        return [b for n in self.norms if n.training for b in n.buffers(recurse=False) if b.is_floating_point()]

    def begin(self) -> None:
        """Remember what a forward pass changes, the statistics of batch norms."""
        self.before = [buffer.clone() for buffer in self.buffers]

    def judge(self, values: dict[str, float]) -> str:
        """What is wrong with the step of these reduced values; nothing: it counts. Takes `finite` out of them."""
        loss = values["loss"]
        if not values.pop("finite"):
            return f"loss {loss}, grad norm {values['grad_norm']}: not finite"
        found = self._spike(loss)
        self.losses = [*self.losses, loss][-WINDOW:]
        if not found:
            self.in_a_row = []
        return found

    def _spike(self, loss: float) -> str:
        if self.sigma is None or len(self.losses) < WINDOW:
            return ""
        mean, deviation = float(np.mean(self.losses)), float(np.std(self.losses))
        if loss <= mean + self.sigma * deviation:
            return ""
        return f"loss {loss:.6g}: above {mean:.6g} + {self.sigma:g} x {deviation:.2g}, those of the last {WINDOW} steps"

    def skip(self, step: int, reason: str, indices: list[Tensor], accelerator: Accelerator) -> None:
        """Undo what forward did and list step number `step` (from 1), by every process together.

        indices: of this process's images, a tensor a micro-batch.
        """
        for buffer, before in zip(self.buffers, self.before, strict=True):
            buffer.copy_(before)
        if accelerator.scaler is not None:  # it has unscaled the gradients, and expects to be told
            accelerator.scaler.update()
        every = torch.cat(indices).tolist()
        if accelerator.num_processes > 1:
            every = gather_object(every)
        self.skipped += 1
        self.in_a_row = [*self.in_a_row, {"step": step, "reason": reason, "indices": sorted(every)}]
        if accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(self.in_a_row[-1]) + "\n")
        say(f"step {step}: skipped: {reason}; {self.skipped} so far, with their images in {self.path}")

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"losses": self.losses, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.skipped, self.in_a_row = state["losses"], state["skipped"], state["in_a_row"]
