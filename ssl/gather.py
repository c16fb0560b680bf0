"""Collectives that carry gradients: N processes must give the loss and gradient of one process on the joined
batch.

The rule behind both functions with gradient: process s computes its own loss L_s, and the loss meant is the
mean of the L_s. Backward *sums* the incoming gradients over the processes, so each process holds the gradient
of sum_s L_s; the mean that DistributedDataParallel takes over processes then gives the gradient of the mean
loss. Without an initialised process group every function is the identity.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes; 1 when no process group exists."""
    return dist.get_world_size() if _many() else 1


def rank() -> int:
    """Index of this process; 0 when no process group exists."""
    return dist.get_rank() if _many() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.n = len(x)  # type: ignore[attr-defined]
        return all_gather_no_grad(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = rank() * ctx.n  # type: ignore[attr-defined]
        return total[start : start + ctx.n]  # type: ignore[attr-defined]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: FunctionCtx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(_ctx: FunctionCtx, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


@torch.no_grad()
def all_gather_no_grad(x: Tensor) -> Tensor:
    """(n, ...) of every process, in process order: (world * n, ...), detached. n must be equal everywhere."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


@torch.no_grad()
def gather_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each of some (n, d) as `all_gather_no_grad` gives it, (world * n, d), by one gather for all."""
    joined = all_gather_no_grad(torch.cat(list(tensors), 1))
    return list(joined.split([x.shape[1] for x in tensors], 1))


def all_gather_with_grad(x: Tensor) -> Tensor:
    """(n, ...) of every process, in process order: (world * n, ...); backward sums over processes."""
    return x if world_size() == 1 else _Gather.apply(x)


def all_reduce_sum_with_grad(x: Tensor) -> Tensor:
    """Sum over processes, same shape; backward sums over processes too (the sum is used by all of them)."""
    return x if world_size() == 1 else _Sum.apply(x)


def reducer() -> Callable[[Tensor], Tensor] | None:
    """The sum over processes with gradient, or None when there is one process."""
    return all_reduce_sum_with_grad if world_size() > 1 else None


@torch.no_grad()
def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean over processes, same shape, detached."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def average_(tensors: list[Tensor]) -> None:
    """Put each tensor's mean over the processes in its place, by one all-reduce."""
    if tensors and world_size() > 1:
        joined = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(joined)
        for t, mean in zip(tensors, (joined / world_size()).split([t.numel() for t in tensors]), strict=True):
            t.copy_(mean.view_as(t))
