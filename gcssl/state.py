"""All that changes while a run trains: saved to its checkpoints, read back from them, left behind where it stops."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from gcssl.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from gcssl.config import CheckpointConfig
from gcssl.errors import CannotWrite, NumericStop, UserError
from gcssl.files import atomic_write
from gcssl.loader import Sizes
from gcssl.log import say
from gcssl.runfolder import RunFolder, broadcast
from gcssl.shard import whole


class RunState:
    """The objective and its optimizer as they were before Accelerate's `prepare`, the loss scaler, and the monitors.

    monitors: by name, what decides from earlier steps whether one counts or ends the run; with state_dict and
    load_state_dict of JSON values. classes: the names of the images' classes, for what is read from a checkpoint.
    """

    def __init__(
        self,
        run: RunFolder,
        objective: Any,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        monitors: dict[str, Any],
        classes: list[str] | None,
    ) -> None:
        self.run, self.objective, self.optimizer, self.accelerator = run, objective, optimizer, accelerator
        self.monitors, self.classes = monitors, classes
        self.saved = False

    def resume(self) -> int:
        """Load the newest checkpoint that verifies; returns the number of optimizer steps already done."""
        run, accelerator = self.run, self.accelerator
        if accelerator.scaler is not None:  # not the scale of an earlier fit
            accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
        loaded, told = load_checkpoint(run.path), run.step
        run.step = 0 if loaded is None else loaded.step
        if accelerator.num_processes > 1:
            shared, steps, data = zip(*gather_object([(run.is_shared(), run.step, run.facts["data"])]), strict=True)
            check_common(run.path, shared, steps, data)
        if loaded is None:
            finished = (run.path / "backbone.safetensors").exists()
            if finished or (run.was in ("preempted", "running") and told):
                what = "a finished run" if finished else f"a run that stopped at step {told}"
                lost = f"{run.path} holds {what} without its checkpoints, which would begin again"
                raise UserError(f"out: {lost}; give another folder, or remove this one")
            self._check_room()
            return 0
        self.objective.load_state_dict(loaded.tensors["model"])
        for name in ("encoder", "teacher") if "mean" in loaded.state else ():
            if hasattr(self.objective, name):  # what model.weights brought with it
                encoder = getattr(self.objective, name)
                encoder.mean, encoder.std = tuple(loaded.state["mean"]), tuple(loaded.state["std"])
        load_optimizer(self.optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(loaded.state["scaler"])
        for name in self.monitors.keys() & loaded.state.keys():  # an incident's checkpoint has none
            self.monitors[name].load_state_dict(loaded.state[name])
        say(f"resumed from {loaded.path.name}")
        return run.step

    def _check_room(self) -> None:
        """A disk that takes no checkpoint is told before there is one to lose."""
        needed = sum(checkpoint_bytes(self.objective, self.run.config["train"]["optimizer"]))
        free = broadcast(shutil.disk_usage(self.run.path).free if self.run.is_main else 0)
        if free < needed:
            told = f"a checkpoint takes {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free"
            raise CannotWrite(f"{self.run.path}: {told}; make room and run the same command again")

    def snapshot(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """All that a resume needs beside config and step: tensors by file, and JSON values. By every process."""
        tensors, optimizer = optimizer_tensors(self.optimizer)
        default_encoder = getattr(self.objective, "default_encoder", "student")
        encoder = self.objective.encoder
        state = {"optimizer": optimizer, "default_encoder": default_encoder}
        state |= {"mean": list(encoder.mean), "std": list(encoder.std), "class_names": self.classes}
        state["num_classes"] = encoder.num_classes
        state["trained_on"] = self.run.facts["data"]
        state |= {name: monitor.state_dict() for name, monitor in self.monitors.items()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return {"model": whole(self.objective.state_dict()), "optimizer": whole(tensors)}, state

    def save(self, step: int, cfg: CheckpointConfig, steps_per_epoch: int) -> None:
        """A checkpoint, written by the main process and called by all; status.json speaks of it once it is there."""
        begun = time.perf_counter()
        parts = self.snapshot()
        if not self.run.is_main:
            return
        keep_every = (cfg.keep_every or 0) * steps_per_epoch or None
        try:
            path = save_checkpoint(self.run.path, step, *parts, cfg.keep, keep_every)
            self.run.progress(step)
        except (CannotWrite, OSError) as error:
            if cfg.on_error == "stop":
                raise
            say(f"{error}; this one is left out, training goes on (checkpoint.on_error=warn)")
            return
        if not self.saved:  # the cost of one is that of all
            size = sum(file.stat().st_size for file in path.iterdir())
            say(f"checkpoint: {path.name}, {size / 1e6:.1f} MB in {1000 * (time.perf_counter() - begun):.0f} ms")
        self.saved = True

    def give_up(self, step: int, reason: str, faults: list[dict[str, Any]]) -> None:
        """Stop on a number, and leave what leads into the step after `step` done ones in incidents/.

        Its folder is itself a run folder: config, environment, a checkpoint of the weights, optimizer and objective,
        and incident.json with the reason and the faults (step, reason, image indices). Order, crops, masks and noise
        follow from the config's seed and the step.
        """
        folder = self.run.path / f"incidents/after_step_{step}"
        parts = self.snapshot()
        if self.run.is_main:
            self._leave(folder, step, {"step": step, "reason": reason, "steps": faults}, *parts)
        self.accelerator.wait_for_everyone()  # else the launcher kills the one that writes
        raise NumericStop(f"{reason}; what led to it is in {folder}")

    def _leave(self, folder: Path, step: int, told: dict[str, Any], tensors: Any, state: dict[str, Any]) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier start that came to the same end
        for name in self.monitors:  # they saw nothing yet, and the losses of later steps do not judge the first
            del state[name]
        try:
            folder.mkdir(parents=True)
            for name in ("config.yaml", "env.json"):
                shutil.copyfile(self.run.path / name, folder / name)
            atomic_write(folder / "incident.json", json.dumps(told, indent=1) + "\n")
            save_checkpoint(folder, step, tensors, state, keep=2)
        except (OSError, CannotWrite) as error:
            say(f"{folder}: not written: {error}")


def check_common(folder: Path, shared: tuple[bool, ...], steps: tuple[int, ...], data: tuple[str, ...]) -> None:
    """UserError where the processes, each with its own values, do not work on one run."""
    if not all(shared):
        found = f"{folder} is another folder for process {shared.index(False)} than for the main process"
        raise UserError(f"out: {found}; give a folder that all share")
    if len(set(steps)) > 1:
        found = f"the processes find other steps in {folder}: {list(steps)}"
        raise UserError(f"out: {found}; give a folder that all share")
    if len(set(data)) > 1:
        raise UserError("data.path: the processes find other images or labels there; give all the same ones")


def checkpoint_bytes(objective: nn.Module, optimizer: str) -> tuple[int, int]:
    """(of the objective's state, of the optimizer's)."""
    weights = sum(t.numel() * t.element_size() for t in objective.state_dict().values())
    slots = {"adamw": 2, "lamb": 2, "sgd": 1, "lars": 1}[optimizer]
    trained = (p for p in objective.parameters() if p.requires_grad)
    return weights, slots * sum(p.numel() * p.element_size() for p in trained)


def saves_at(step: int, cfg: CheckpointConfig, sizes: Sizes) -> bool:
    """Is there to be a checkpoint after `step`: each checkpoint.every, and those that are kept for ever?"""
    periods = [max(1, round(cfg.every * sizes.steps_per_epoch)), (cfg.keep_every or 0) * sizes.steps_per_epoch]
    return any(period and step % period == 0 for period in periods)
