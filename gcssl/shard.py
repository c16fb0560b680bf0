"""train.shard: gradients and optimizer state lie cut over the processes, by FSDP2 with the objective as one unit.

A forward pass gathers the weights, which are cut again after the backward pass: between two steps each process keeps an
Nth of parameters, gradients and optimizer state, within one all weights; buffers stay whole. So do checkpoints.
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
from gcssl.errors import UserError, is_main_process
from gcssl.log import say


def check_shard(train: TrainConfig, objective: nn.Module) -> None:
    """UserError where what is asked for does not work with train.shard, or has not been made to."""
    if train.shard and any(p.ndim == 0 for p in objective.parameters()):
        raise UserError("train.shard: given for a backbone with parameters of no dimension, expected another")
    for what, found in {"precision=fp16": train.precision == "fp16", "compile=true": train.compile}.items():
        if train.shard and found:
            raise UserError(f"train.shard: given with train.{what}, expected one without the other")


def shard(objective: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Cut the parameters of `objective`, and those and the state of its optimizer, in place; process 0's count, as
    in DDP, whatever file another one had its own from.
    """
    say(f"train.shard: parameters, gradients and optimizer state cut over {accelerator.num_processes} processes")
    for t in objective.state_dict().values():
        torch.distributed.broadcast(t, src=0)
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
    """The tensors with cut ones put together, on the CPU; all processes call it, the main one gets them all."""
    found: dict[str, Tensor] = {}
    for name, t in tensors.items():
        full = whole_tensor(t)
        if t is full or is_main_process():
            found[name] = full if t is full else full.cpu()
    return found


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
