"""GC ViT beside timm's, same weights: training step, inference and memory.

    python -m scripts.bench_model [--variant gcvit_tiny ...] [--batch 64] [--compile] [--profile]

A training step is forward, backward and AdamW (fused on a GPU); on a GPU under bf16 autocast, on a CPU in fp32 and with
--bf16 also under autocast, one thread. The ways alternate; speed-ups are over "timm" of the same round (on a CPU: in
fp32): median, smallest and largest. TFLOP/s counts a training step as three forward passes; its share is of a square
matrix product of the same precision, measured first. MiB is what a step takes above weights and optimizer state, on a
CPU what autograd keeps for its backward pass.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gcssl.models.build import build_backbone
from gcssl.models.convert import load_weights
from gcssl.plan import saved_mib
from gcssl.runtime import bf16_is_fast, entry
from scripts.timing import Step, alternate, device, markdown, peak_mib, ratios, seconds, write


class Way(NamedTuple):
    model: nn.Module
    bf16: bool  # under autocast


def models(variant: str, size: int, compiled: bool) -> dict[str, nn.Module]:
    """name -> a model with 1000 classes; all have the same weights."""
    peer = timm.create_model(variant, img_size=size).to(device())

    def own() -> Any:
        model = build_backbone(variant, size, num_classes=1000)
        load_weights(model, {name: value.cpu() for name, value in peer.state_dict().items()})
        return model.to(device())

    found: dict[str, nn.Module] = {"timm": peer, "gcssl": own()}
    if compiled:
        again = timm.create_model(variant, img_size=size).to(device())
        again.load_state_dict(peer.state_dict())
        again.compile()
        fast = own()
        fast.compile()
        found |= {"timm, compiled": again, "gcssl, compiled": fast}
    return found


def train_step(way: Way, x: Tensor, target: Tensor) -> Step:
    model = way.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=x.is_cuda)
    model.train()

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=way.bf16):
            loss = nn.functional.cross_entropy(model(x).float(), target)
        loss.backward()
        optimizer.step()

    return run


def inference(way: Way, x: Tensor) -> Step:
    def run() -> None:
        way.model.eval()
        with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=way.bf16):
            way.model(x)

    return run


def gflops(variant: str, size: int) -> float:
    """Of a forward pass of one image; a multiplication and an addition are two."""
    with torch.device("meta"):
        model = build_backbone(variant, size, num_classes=1000)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, size, size))
    return counter.get_total_flops() / 1e9


def matmul_peak(bf16: bool) -> float:
    """TFLOP/s of a square matrix product."""
    n = 8192 if torch.cuda.is_available() else 1536
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16 if bf16 else torch.float32) for _ in "ab")
    times = alternate({"mm": lambda: a @ b}, rounds=5, times=10 if torch.cuda.is_available() else 1)["mm"]
    return 2 * n**3 / statistics.median(times) / 1e12


def measure(
    kind: str, steps: dict[str, Step], ways: dict[str, Way], args: argparse.Namespace, work: float
) -> list[dict[str, Any]]:
    """Rows of one table; work: TFLOP a call."""
    rows: list[dict[str, Any]] = []
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        seconds(step)
        if "compiled" in name:
            print(f"{name}, {kind}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
    memory = {name: peak_mib(step) for name, step in steps.items()}
    if kind == "train" and not torch.cuda.is_available():
        memory = {name: saved_mib(step, ways[name].model.parameters()) for name, step in steps.items()}
    times = alternate(steps, args.rounds, args.times)
    for name, own in times.items():
        row = {"what": kind, "model": name, "images": args.batch / statistics.median(own), **ratios(times["timm"], own)}
        row |= {"tflops": work / statistics.median(own), "mib": memory[name], "memory": memory[name] / memory["timm"]}
        row["bf16"] = ways[name].bf16
        rows.append(row)
    return rows


def profile(name: str, step: Step) -> None:
    """Where the time of a step goes: its kernels, slowest first."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(3):
            step()
        seconds(step)
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    averages = sorted(found.key_averages(), key=lambda e: -getattr(e, key))
    total = sum(getattr(e, key) for e in averages)
    print(f"{name}: {total / 4e3:.1f} ms a step")
    for event in averages[:28]:
        own = getattr(event, key)
        print(f"  {100 * own / total:5.1f} % {own / 4e3:8.2f} ms {event.count // 4:5d} x {event.key[:130]}")


COLUMNS = {
    "what": "{what}", "model": "{model}", "images/s": "{images:.1f}",
    "speed-up (min-max)": "{speedup:.2f} ({speedup_min:.2f}-{speedup_max:.2f})",
    "TFLOP/s": "{tflops:.3g}", "of peak": "{share:.0%}", "MiB": "{mib:.0f}", "memory": "{memory:.2f}",
}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench_model", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", nargs="+", default=["gcvit_xxtiny"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64 if torch.cuda.is_available() else 4)
    parser.add_argument("--compile", action="store_true", help="both under torch.compile as well")
    parser.add_argument("--bf16", action="store_true", help="autocast on a CPU too")
    parser.add_argument("--kinds", nargs="+", choices=("train", "inference"), default=["train", "inference"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=10 if torch.cuda.is_available() else 1, help="calls a measurement")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a training step")
    parser.add_argument("--out", type=Path, help="a json file for the rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    on_gpu = torch.cuda.is_available()
    if args.bf16 and not bf16_is_fast():
        print("bf16 is left out: its products are slower than those of fp32 on this processor")
        args.bf16 = False
    peak = {bf16: matmul_peak(bf16) for bf16 in sorted({on_gpu, on_gpu or args.bf16})}
    told = [f"{value:.3g} in {'bf16' if bf16 else 'fp32'}" for bf16, value in peak.items()]
    print(f"{device()}: TFLOP/s of a matrix product: {', '.join(told)}")
    rows = []
    for variant in args.variant:
        x = torch.randn(args.batch, 3, args.size, args.size, device=device())
        target = torch.randint(1000, (args.batch,), device=device())
        found, work = models(variant, args.size, args.compile), args.batch * gflops(variant, args.size) / 1e3
        ways = {name: Way(model, on_gpu) for name, model in found.items()}
        if args.bf16 and not on_gpu:
            ways |= {f"{name}, bf16": Way(model, True) for name, model in found.items()}
        part = []
        if "train" in args.kinds:
            steps = {name: train_step(way, x, target) for name, way in ways.items()}
            part += measure("train", steps, ways, args, 3 * work)
            if args.profile:
                for name, step in steps.items():
                    profile(f"{variant}, {name}", step)
        if "inference" in args.kinds:
            steps = {name: inference(way, x) for name, way in ways.items()}
            part += measure("inference", steps, ways, args, work)
        part = [{"variant": variant, **row, "share": row["tflops"] / peak[row["bf16"]]} for row in part]
        first = "bf16" if on_gpu else "fp32"
        print(f"\n{variant}, {args.size} px, batch {args.batch}, {first}, {args.rounds} rounds of {args.times}\n")
        sys.stdout.write(markdown(part, COLUMNS))
        sys.stdout.flush()
        rows += part
        del found
    write(args.out, vars(args), rows)


if __name__ == "__main__":
    entry(main)
