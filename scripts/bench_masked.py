"""How much a masked training step costs: GC ViT's plain pass with mask tokens, and visible units only, dense and fast.

    python -m scripts.bench_masked [--variant gcvit_tiny] [--size 224] [--batch 4] [--ratio 0.5 0.6 0.75] [--rounds 5]

A step is forward and backward of the encoder with a light loss, without an optimizer, in CPU seconds of one thread, or
in seconds of the wall on a GPU.
Beside them, at the last ratio: a plain pass at 128 px, what FastMIM trains at and UM-MAE's encoder sees of an image of
256 px, and the plain pass of timm's swin_tiny under SimMIM.
The ways alternate, so that a load on the machine falls on all of them. Speed-up: the plain pass's time over a way's
time of the same round; median, smallest and largest. Activations: what autograd keeps, each storage once, parameters
left out.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gcssl.errors import UserError
from gcssl.models.build import Backbone, build_backbone
from gcssl.models.gcvit import GCViT
from gcssl.models.visible import count_visible
from gcssl.plan import saved_mib
from gcssl.runtime import entry
from gcssl.ssl.masking import draw_mask, hide_pixels
from scripts.timing import Step, alternate, device, markdown, ratios, write


def masks(n: int, side: int, ratio: float) -> Tensor:
    """n side/32 side/32, each image its own."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([draw_mask(rng, (side // 32, side // 32), ratio) for _ in range(n)]))


Way = tuple[str, float]  # name, ratio


def training_step(model: nn.Module, forward: Callable[[], Tensor], bf16: bool) -> Step:
    """The loss is a fixed direction of the features, so that every token has a gradient."""
    with torch.no_grad():
        target = torch.randn_like(forward(), dtype=torch.float32)

    def run() -> None:
        model.zero_grad()
        with torch.autocast(target.device.type, torch.bfloat16, enabled=bf16):
            features = forward()
        (features * target).mean().backward()

    return run


def ways(
    encoder: GCViT, swin: Backbone, x: Tensor, hidden_shares: list[float], bf16: bool
) -> dict[Way, tuple[Any, Step]]:
    """The model and a training step of each way at each ratio, "plain" first."""
    token = nn.Parameter(torch.zeros(encoder.channels[0], device=x.device))

    def step(forward: Callable[[], Tensor], model: Any = encoder) -> tuple[Any, Step]:
        return model, training_step(model, forward, bf16)

    steps: dict[Way, tuple[Any, Step]] = {}
    for ratio in hidden_shares:
        mask = masks(len(x), x.shape[-1], ratio).to(x.device)
        n = count_visible(mask)
        steps["plain", ratio] = step(lambda m=mask: encoder.forward_features(hide_pixels(x, m), m, token))
        steps["visible, dense", ratio] = step(lambda m=mask: encoder.forward_visible(x, m, dense=True))
        steps["visible, fast", ratio] = step(lambda m=mask, n=n: encoder.forward_visible(x, m, n_visible=n))
    small, hidden = x[..., :128, :128], masks(len(x), 128, ratio).to(x.device)
    steps["plain, 128 px", ratio] = step(lambda: encoder.forward_features(hide_pixels(small, hidden), hidden, token))
    steps["swin_tiny, plain", ratio] = step(lambda: swin.forward_features(hide_pixels(x, mask)), swin)
    return steps


def measure(steps: dict[Way, tuple[Any, Step]], rounds: int, batch: int) -> list[dict[str, object]]:
    times = alternate({way: step for way, (_, step) in steps.items()}, rounds, 10 if torch.cuda.is_available() else 1)
    rows: list[dict[str, object]] = []
    for (way, ratio), own in times.items():
        (model, step), (plain, plain_step) = steps[way, ratio], steps["plain", ratio]
        mib = saved_mib(step, model.parameters()) / batch
        share = mib / (saved_mib(plain_step, plain.parameters()) / batch)
        rows.append(
            {"way": way, "ratio": ratio, "seconds": statistics.median(own), **ratios(times["plain", ratio], own),
             "mib_per_image": mib, "mib_share": share}
        )  # fmt: skip
    return rows


COLUMNS = {
    "way": "{way}", "ratio": "{ratio}", "s per step": "{seconds:.3f}",
    "speed-up (min-max)": "{speedup:.2f} ({speedup_min:.2f}-{speedup_max:.2f})",
    "activations MiB/image": "{mib_per_image:.1f}", "share": "{mib_share:.2f}",
}  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench_masked", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="gcvit_tiny")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.5, 0.6, 0.75])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast")
    parser.add_argument("--out", type=Path, help="a json file for the rows")
    args = parser.parse_args(argv)
    if args.size < 128:
        raise UserError(f"--size: given {args.size}, expected at least 128")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = build_backbone(args.variant, img_size=args.size).train().to(device())
    if not isinstance(encoder, GCViT):
        raise UserError(f"--variant: given {args.variant}, expected a GC ViT, which can leave tokens out")
    x = torch.randn(args.batch, 3, args.size, args.size, device=device())
    swin = build_backbone("swin_tiny_patch4_window7_224", img_size=args.size).train().to(device())
    rows = measure(ways(encoder, swin, x, args.ratio, args.bf16), args.rounds, args.batch)
    print(f"{args.variant}, {args.size} px, batch {args.batch}, {device()}, {args.rounds} rounds")
    sys.stdout.write(markdown(rows, COLUMNS))
    write(args.out, vars(args), rows)


if __name__ == "__main__":
    entry(main)
