"""train.shard: gradients and optimizer state lie cut over the processes, by FSDP2 with the objective as one unit.

A forward pass gathers the weights, which are cut again after the backward pass: of what does not grow with the batch
each process keeps an Nth between two steps, and all weights within one. Checkpoints are whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gcssl.config import TrainConfig
from gcssl.errors import UserError


def check_shard(train: TrainConfig) -> None:
    """UserError where what is asked for has not been made to work with train.shard."""
    for what, found in {"precision=fp16": train.precision == "fp16", "compile=true": train.compile}.items():
        if train.shard and found:
            raise UserError(f"train.shard: given with train.{what}, expected one without the other")


def shard(objective: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Cut the parameters of `objective`, and those and the state of its optimizer, in place."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    before = list(objective.parameters())
    fully_shard(objective, mesh=mesh)
    cut: dict[Tensor, Any] = dict(zip(before, objective.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [cut[p] for p in group["params"]]
    for p in before:
        for slot, value in optimizer.state.pop(p, {}).items():
            own = isinstance(value, Tensor) and value.shape == p.shape
            optimizer.state[cut[p]][slot] = distribute_tensor(value, mesh, cut[p].placements) if own else value


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with cut ones put together, on the CPU; all processes call it."""
    return {name: whole_tensor(t).cpu() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def whole_tensor(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


@contextmanager
def gathered(objective: nn.Module) -> Iterator[None]:
    """Inside, the parts of a cut objective can be called on their own; all processes enter and leave it."""
    if isinstance(objective, FSDPModule):
        objective.unshard()
    try:
        yield
    finally:
        if isinstance(objective, FSDPModule):
            objective.reshard()
