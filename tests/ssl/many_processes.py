"""Run by torchrun with N processes, a path and the names of cases: each of them on its share of a batch, those that
gather on the next process's share too, then rank 0 alone on all.

Writes {case: (loss, {parameter: gradient}, ...)} of the three to the path, and the order of the samples over the
processes in the second. float64, so that only a wrong formula can make them differ.
"""

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gcssl.config import AugmentConfig
from gcssl.loader import collate
from gcssl.models.gcvit import GCViT
from gcssl.models.heads import BatchNorm, mlp
from gcssl.ssl import gather
from gcssl.ssl.base import Setup
from gcssl.ssl.joint import VIEW
from gcssl.ssl.objectives import OBJECTIVES

N = 6  # images of the joined batch
HEADS = {"hidden_dim": 32, "out_dim": 16}
CROPS = {"bottleneck_dim": 12, "local_crops": 2, "local_size": 32}
SIDES = {"ummae": 128, "joint-ummae": 128}  # of the images, else 64: the encoder sees half of it
CASES: dict[str, dict[str, Any]] = {
    "simmim": {"name": "simmim"},
    "localmim": {"name": "localmim"},
    "mae": {"name": "mae", "mask_ratio": 0.5, "decoder_dim": 32, "decoder_depth": 2},  # one token has no attention
    "ummae": {"name": "ummae", "mask_unit": 16, "decoder_dim": 32},
    "simclr": {"name": "simclr", **HEADS},
    "mocov3": {"name": "mocov3", **HEADS},
    "moby": {"name": "moby", "queue": 6, **HEADS},
    "byol": {"name": "byol", **HEADS},
    "vicreg": {"name": "vicreg", **HEADS},
    "dino": {"name": "dino", **HEADS, **CROPS},
    "simdino": {"name": "simdino", "hidden_dim": 32, **CROPS},
    "dino-koleo": {"name": "dino", "koleo_weight": 0.1, **HEADS, **CROPS},
    "esvit": {"name": "esvit", "koleo_weight": 0.1, **HEADS, **CROPS},
    "ibot": {"name": "ibot", "koleo_weight": 0.1, **HEADS, **CROPS},
    "joint": {"name": "joint", "weights": [2.0, 1.0], **HEADS},
    "joint-balance": {"name": "joint", "weights": [2.0, 1.0], "balance": True, **HEADS},
    "joint-share": {"name": "joint", "share": True, **HEADS},
    "joint-localmim": {"name": "joint", "masked": "localmim", "share": True, "target": "hog", **HEADS},
    "joint-mae": {"name": "joint", "masked": "mae", "mask_ratio": 0.5, "decoder_dim": 32, "decoder_depth": 1, **HEADS},
    "joint-ummae": {"name": "joint", "masked": "ummae", "decoder_dim": 32, **HEADS},
    "joint-simclr": {"name": "joint", "view": "simclr", **HEADS},
    "joint-dino": {"name": "joint", "view": "dino", **HEADS, **CROPS},
}
GATHERING = [*VIEW, "ibot"]  # these compare or average over processes


def make_batch(names: slice, draw: Any, noise_rows: int, side: int) -> dict[str, Any]:
    """Samples `names` of the joined batch: random views and masks of the shapes that the objective draws."""
    g = torch.Generator().manual_seed(1)
    drawn = [draw(np.random.default_rng(i), (side, side)) for i in range(N)]
    views = [torch.randn(N, 3, *spec.size, generator=g, dtype=torch.float64) for spec, _ in drawn[0][0]]
    masks = collate([{"masks": hidden} for _, hidden in drawn])["masks"]
    noise = [torch.rand(noise_rows, N, generator=g) for _ in views]
    return {
        "position": torch.arange(N)[names],
        "views": [v[names] for v in views],
        "masks": [mask if mask is None else mask[names] for mask in masks],
        "noise": [n[:, names] for n in noise],
    }


def make_objective(cfg: dict[str, Any], side: int) -> Any:
    torch.manual_seed(0)
    encoder = GCViT(16, (2, 2, 2, 2), (1, 1, 2, 2), img_size=64, window_ratio=(16, 16, 16, 32), drop_path=0.3)
    cls, schema = OBJECTIVES[cfg["name"]]
    objective = cls(schema(**cfg), encoder, Setup(AugmentConfig(), (side, side), 10, 5)).double().train()
    if hasattr(objective, "teacher"):  # not equal to the student, as after some steps
        for p in objective.teacher.parameters():
            p.data.add_(0.02 * torch.randn_like(p))
    return objective


def run(cfg: dict[str, Any], share: slice, side: int) -> dict[str, Any]:
    objective = make_objective(cfg, side)
    batch = make_batch(share, objective.draw, objective.encoder.n_noise, side)
    model = DistributedDataParallel(objective, broadcast_buffers=False) if dist.is_initialized() else objective
    out = model(batch, 0)
    norms = objective.grad_norms(out, 0)
    out["loss"].backward()
    own = {"prediction_std"}  # of a process's images, as its docstring says
    logged = {k: gather.all_reduce_mean(v) for k, v in out.items() if isinstance(v, Tensor) and k not in own}
    grads = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    objective.after_step(0)  # queue and centre are buffers
    return {"logged": logged, "norms": norms, "grads": grads, "buffers": dict(objective.named_buffers())}


def run_collectives(share: slice) -> dict[str, Any]:
    """A loss through both collectives, and one through a head alone, in fp32 too; gradients of the joined
    inputs.
    """
    torch.manual_seed(2)
    x = torch.randn(N, 6, dtype=torch.float64)[share].requires_grad_()
    w = torch.randn(N, N, dtype=torch.float64)[share]
    joined = gather.all_gather_with_grad(x)  # N 6
    loss = ((x @ joined.T) * w).sum(1).mean() + gather.all_reduce_sum_with_grad(x.sum(0)).pow(3).mean()
    loss.backward()
    torch.manual_seed(3)
    head = mlp([6, 8, 4], lambda dim, affine: BatchNorm(dim, gather.reducer, affine))
    z = (torch.randn(N, 6) + 1.0)[share].requires_grad_()
    y = head(z)
    (y * torch.randn(N, 4)[share]).sum(1).mean().backward()
    own = torch.nn.BatchNorm1d(6, dtype=torch.float64)  # as in a timm backbone: over its process's samples
    own(x.detach())
    gather.average_([own.running_mean, own.bias.data])
    rows = {"x": joined.detach(), "y": gather.all_gather_no_grad(y), "mean": own.running_mean}
    # A process's input gradient is that of the sum over processes; their mean is what DDP gives to weights.
    grads = {k: gather.all_gather_no_grad(v.grad) / gather.world_size() for k, v in (("x", x), ("z", z))}
    grads |= {n: gather.all_reduce_mean(p.grad) for n, p in head.named_parameters() if p.grad is not None}
    return {"logged": {"loss": gather.all_reduce_mean(loss), **rows}, "norms": {}, "grads": grads, "buffers": {}}


def run_cases(names: Iterable[str], share: slice) -> dict[str, Any]:
    return {
        name: run_collectives(share) if name == "collectives" else run(CASES[name], share, SIDES.get(name, 64))
        for name in names
    }


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world, n = dist.get_rank(), dist.get_world_size(), N // dist.get_world_size()
    shares = [slice(first, first + n) for first in range(0, N, n)]
    many = run_cases(names, shares[rank])
    turned = run_cases([name for name in names if name in GATHERING], shares[(rank + 1) % world])
    dist.destroy_process_group()
    if rank == 0:
        found = {"world": world, "many": many, "turned": turned, "one": run_cases(names, slice(0, N))}
        torch.save(found | {"order": torch.arange(N).roll(-n)}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
