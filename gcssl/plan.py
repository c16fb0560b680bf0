"""What a pretraining run will cost, before it starts: parameters, FLOPs, memory, hours, money.

    python -m gcssl.plan configs/pretrain/x.yaml [key=value ...] plan.processes=8 [plan.images_per_s=568] [plan.price=2]

FLOPs and memory are counted on the real objective and two and four images of the data, by shapes alone: nothing is
computed. Its speed is plan.images_per_s of one process where that is given, else that of plan.minutes of real training
here, by one process. Without the images at hand, say data.path=shapes data.shapes_n=<how many there will be>. Nothing
is written.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from gcssl.config import PretrainConfig, load_config
from gcssl.dryrun import DoctorConfig, DoctorOptions, DryRun, examine
from gcssl.loader import Sizes
from gcssl.log import say
from gcssl.rng import MODEL, seed_torch
from gcssl.runtime import bf16_is_fast, entry
from gcssl.ssl.objectives import SCHEMAS
from gcssl.state import checkpoint_bytes
from gcssl.trial import changed, duration, first_steps, rate

Row = tuple[str, str, str]  # what, how much, where from
Shape = Sequence[int]
CPU_STEP = 3e11  # FLOPs of a step that is timed on a CPU: some seconds


@dataclass
class PlanOptions:
    processes: int = 1  # GPUs, or processes on CPUs
    images_per_s: float | None = None  # of one process; null: measured here
    minutes: float = 0.5  # of real training, to measure it
    efficiency: float = 0.9  # share of that speed which a process keeps beside others
    price: float | None = None  # of one process for one hour


@dataclass
class PlanConfig(PretrainConfig):
    plan: PlanOptions = field(default_factory=PlanOptions)


def saved_mib(step: Callable[[], object], parameters: Iterable[Tensor]) -> float:
    """Storage that autograd keeps for the backward pass of `step`, `parameters` left out."""
    own = {p.untyped_storage()._cdata for p in parameters}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(kept.values()) / 2**20


def conv_backward_flops(grad: Shape, x: Shape, weight: Shape, *args: Any, **_: Any) -> int:
    """A forward pass for each gradient asked for; torch's own count takes a depthwise convolution for a full one."""
    transposed, asked = args[4], args[7]
    return 2 * math.prod(x if transposed else grad) * math.prod(weight[1:]) * (asked[0] + asked[1])


@dataclass
class Counted:
    """Of one process: FLOPs of an image's step, MiB of an image and of all that does not grow with the batch."""

    flops: float
    image_mib: float
    fixed_mib: float


def count(dry: DryRun) -> Counted:
    fake, train = FakeTensorMode(), dry.cfg.train
    with FakeCopyMode(fake):
        objective = copy.deepcopy(dry.objective.train())
    ours = {torch.ops.aten.convolution_backward: conv_backward_flops}
    kept, flops = {}, 0.0
    for images in (2, 4):
        batch = pytree.tree_map_only(Tensor, fake.from_tensor, dry.batch(images))

        def step(batch: dict[str, Any] = batch) -> None:
            seed_torch(train.seed, MODEL)
            with torch.autocast("cpu", torch.bfloat16, enabled=train.precision != "fp32"):
                loss = objective(batch, 0)["loss"]
            loss.backward()
            objective.zero_grad()

        with fake, FlopCounterMode(display=False, custom_mapping=ours) as counter:
            kept[images] = saved_mib(step, objective.parameters())
        flops = counter.get_total_flops() / images
    image = (kept[4] - kept[2]) / 2
    trained = sum(p.numel() * p.element_size() for p in objective.parameters() if p.requires_grad)
    state, optimizer = checkpoint_bytes(dry.objective, dry.cfg.train.optimizer)
    return Counted(flops, image, kept[2] - 2 * image + (state + optimizer + trained) / 2**20)


def speed(cfg: PlanConfig, sizes: Sizes, flops: float) -> tuple[float, str]:
    """(images/s of one process, where that number is from); `flops` of an image's step."""
    if cfg.plan.images_per_s is not None:
        return cfg.plan.images_per_s, "given: plan.images_per_s"
    how = ""
    if not torch.cuda.is_available():  # else a step may take an hour, and memory that is not there
        few = min(sizes.batch_size, max(2, int(CPU_STEP / flops)))
        how = f" of {few} images" if few < sizes.batch_size else ""
        sizes = dataclasses.replace(sizes, batch_size=few, accumulate=1)
        if cfg.train.precision == "bf16" and not bf16_is_fast():
            cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, precision="fp32"))
            how += " in fp32, as bf16 is slower on this processor"
    told = first_steps(cfg, cfg.plan.minutes, sizes)
    rest = ", too few to tell: raise plan.minutes" if len(told) < 5 else ""
    return rate(told), f"measured here: {len(told)} steps{how}{rest}"


def dry_run(cfg: PlanConfig) -> DryRun:
    """The run, built as the doctor does."""
    return examine(DoctorConfig(**vars(changed(cfg, {})), doctor=DoctorOptions(scan=1, processes=cfg.plan.processes)))


def si(number: float) -> str:
    """3.2e13 -> 32 T."""
    number = float(f"{number:.3g}")
    powers = min(int(math.log10(max(number, 1)) // 3), 6)
    return f"{number / 1000**powers:.3g} {' kMGTPE'[powers]}"


def rows(cfg: PlanConfig) -> list[Row]:
    dry = dry_run(cfg)
    sizes, objective, counted = dry.sizes, dry.objective, count(dry)
    images = sizes.total_steps * sizes.global_batch
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    memory = (counted.fixed_mib + counted.image_mib * sizes.batch_size) / 1024
    per_process, source = speed(cfg, sizes, counted.flops)
    share = cfg.plan.efficiency if sizes.world > 1 else 1.0
    hours = images / (per_process * sizes.world * share) / 3600
    found: list[Row] = [
        ("images", f"{len(dry.data.train):,} of {dry.data.train.name}", "counted"),
        ("steps", f"{sizes.total_steps:,}, {sizes.steps_per_epoch:,} an epoch; {images:,} images seen", "config"),
        ("batch", sizes.layout(), "config"),
        ("parameters", f"{sum(p.numel() for p in objective.encoder.parameters()) / 1e6:.2f} M in the encoder, "
         f"{trained / 1e6:.2f} M are trained", "counted"),
        ("FLOPs", f"{si(counted.flops)} an image and step, {si(counted.flops * images)} in all", "counted"),
        ("memory", f"{memory:.2f} GiB a process: {counted.fixed_mib / 1024:.2f} + {counted.image_mib:.1f} MiB an image",
         "counted, without scratch space"),
        ("speed", f"{per_process:.4g} images/s a process, {si(per_process * counted.flops)}FLOP/s", source),
    ]  # fmt: skip
    if sizes.world > 1:
        found.append(("efficiency", f"{share:.0%} on {sizes.world} processes", "assumed: plan.efficiency"))
    found.append(("time", duration(hours), ""))
    if cfg.plan.price is not None:
        cost = hours * sizes.world * cfg.plan.price
        found.append(("price", f"{cost:,.2f}", f"given: plan.price={cfg.plan.price:g} an hour and process"))
    return found


def main(argv: list[str]) -> None:
    cfg = load_config(PlanConfig, argv, SCHEMAS)
    trains = f", then training for up to {cfg.plan.minutes:g} minutes" if cfg.plan.images_per_s is None else ""
    say(f"counting a step of 2 and of 4 images{trains}")
    found = rows(cfg)
    width = max(len(value) for _, value, _ in found)
    for name, value, source in found:
        say(f"{name:<11} {value:<{width}}  {source}".rstrip())


if __name__ == "__main__":
    entry(main)
