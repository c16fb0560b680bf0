"""Parameter groups, optimizers, and learning rates as pure functions of the step."""

import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import Lamb, Lars
from torch import Tensor

if TYPE_CHECKING:
    from gcssl.config import TrainConfig
    from gcssl.loader import Sizes


def param_groups(
    named_params: Iterable[tuple[str, Tensor]],
    weight_decay: float,
    no_decay: Collection[str] = (),
    layer_ids: dict[str, int] | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of equal weight decay and lr scale; each trainable parameter once, in the order given.

    Undecayed: vectors and scalars (biases, norms, our tokens), and names in `no_decay` (bias tables, position
    embeddings; also of a part: "a" matches "encoder.a").
    layer_ids: name -> depth, 0 the first layer; scale = layer_decay ** (deepest id - id), as in BEiT
    (arXiv:2106.08254) where there is a head; a name without an id is a new head and keeps scale 1. None: all are 1.
    Group keys: params, names, weight_decay, lr_scale, decay.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
    deepest = max(layer_ids.values(), default=0) if layer_ids else 0
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named_params:
        if not parameter.requires_grad:
            continue
        decay = parameter.ndim >= 2 and not any(f".{name}".endswith(f".{other}") for other in no_decay)
        depth = layer_ids.get(name, deepest) if layer_ids else deepest
        scale = layer_decay ** (deepest - depth)
        group = groups.setdefault(
            (scale, decay),
            {
                "params": [],
                "names": [],
                "weight_decay": weight_decay if decay else 0.0,
                "lr_scale": scale,
                "decay": decay,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return sorted(groups.values(), key=lambda group: (group["lr_scale"], group["decay"]))


def groups_table(groups: list[dict[str, Any]]) -> str:
    """One line a group: lr scale, weight decay, count of tensors and of numbers, first name."""
    lines = ["lr scale  decay   tensors  parameters  first"]
    for group in groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group['lr_scale']:8.4f}  {group['weight_decay']:<6g}  {len(group['params']):7d}  "
            f"{numbers:10,d}  {group['names'][0]}"
        )
    return "\n".join(lines)


def make_optimizer(groups: list[dict[str, Any]], cfg: "TrainConfig") -> torch.optim.Optimizer:
    """AdamW (fused where it can be), SGD with momentum 0.9, LARS (arXiv:1708.03888) or LAMB (arXiv:1904.00962).

    LARS has momentum 0.9 and trust 1e-3; it and LAMB adapt what can be decayed, at a decay of 0 too. The lr is set by
    set_lr every step. Under fp16 AdamW is not fused: a fused one skips its step by itself on infinite gradients, and
    Accelerate would report a step that did not happen.
    """
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    betas = (cfg.betas[0], cfg.betas[1])
    if cfg.optimizer in ("lars", "lamb"):
        groups = [{**group, "always_adapt": group["decay"]} for group in groups]
    if cfg.optimizer == "lars":
        return Lars(groups, lr=0.0, momentum=0.9, trust_coeff=1e-3)
    if cfg.optimizer == "lamb":
        return Lamb(groups, lr=0.0, betas=betas, max_grad_norm=None)  # train.clip_grad clips
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = devices <= {"cpu", "cuda"} and cfg.precision != "fp16"
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fused)


def scaled_lr(cfg: "TrainConfig", global_batch: int) -> float:
    """Peak lr: train.blr x (global batch / train.lr_base) ** p, p = 1 (linear), 1/2 (sqrt) or 0 (none)."""
    powers = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}
    return cfg.blr * (global_batch / cfg.lr_base) ** powers[cfg.lr_rule]


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total` and after."""
    share = min(max(step / max(total, 1), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def lr_at(step: int, total: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of the update after `step` done updates; step 0 is the first.

    Linear warm-up: lr * (step + 1) / (warmup_steps + 1), so the first update is not lost at 0 and step ==
    warmup_steps has lr; then half a cosine that would reach min_lr at step == total, one past the last
    update.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    return cosine(step - warmup_steps, total - warmup_steps, lr, min_lr)


def rates_at(train: "TrainConfig", step: int, sizes: "Sizes") -> tuple[float, float]:
    """Learning rate and weight decay of the update after `step` done updates."""
    warmup = round(train.warmup_epochs * sizes.steps_per_epoch)
    lr = lr_at(step, sizes.total_steps, warmup, scaled_lr(train, sizes.global_batch), train.min_lr)
    end = train.weight_decay if train.weight_decay_end is None else train.weight_decay_end
    return lr, cosine(step, sizes.total_steps, train.weight_decay, end)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None) -> None:
    """Give each group lr x its lr_scale; weight_decay, where given, to the groups that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if weight_decay is not None and group.get("decay", True):
            group["weight_decay"] = weight_decay
