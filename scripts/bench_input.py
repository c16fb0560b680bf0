"""Images per second and core from JPEG bytes to normalised batches: our input pipeline beside torchvision's.

    python -m scripts.bench_input [--data PARQUET] [--pipelines one simclr dino] [--images 64] [--rounds 5]

`one` is SimMIM's single crop, `simclr` two views with colour jitter, grey and blur, `dino` two large and eight small
crops. Peers: torchvision's transforms on PIL images (with Pillow's Gaussian blur, as in MoCo v3's code), and its v2
transforms on uint8 tensors. All run on one thread, from encoded bytes in memory to float32, and alternate; the time is
that of this process's CPU. Ours is told in two parts: what a worker does (decode, crop, resize) and what is done in
batches, on the GPU where there is one (colour, blur, normalise); `fast` is augment.colour=fast. Without --data (parquet
with a column `image`) the images are noise over smooth colours, 500 x 375 pixels, JPEG quality 90.
"""

import argparse
import io
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import v2

from gcssl.augment import BYOL_1, BYOL_2, IMAGENET_MEAN, IMAGENET_STD, SIMCLR, SIMMIM, ViewSpec, draw_view
from gcssl.config import AugmentConfig
from gcssl.data import decode
from gcssl.loader import Drawn, ViewMaker, batch_to_device, collate
from gcssl.rng import rng
from gcssl.runtime import entry, keep_freed_memory
from scripts.timing import alternate, device, markdown, ratios, write

SIZE = (224, 224)
LOCAL = replace(BYOL_1, size=(96, 96), scale=(0.05, 0.4), blur_p=0.5)
PIPELINES = {"one": [SIMMIM], "simclr": [SIMCLR] * 2, "dino": [BYOL_1, BYOL_2] + [LOCAL] * 8}
Views = Callable[[bytes], list[Tensor]]


class PillowBlur:
    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


def torchvision_view(spec: ViewSpec, on_tensors: bool) -> v2.Compose:
    """The same view by torchvision's transforms, on PIL images or on uint8 tensors."""
    mode = v2.InterpolationMode(spec.interpolation)
    steps: list[Any] = [v2.RandomResizedCrop(spec.size, spec.scale, spec.ratio, mode), v2.RandomHorizontalFlip()]
    if spec.jitter_p:
        steps.append(v2.RandomApply([v2.ColorJitter(*spec.jitter)], spec.jitter_p))
    if spec.gray_p:
        steps.append(v2.RandomGrayscale(spec.gray_p))
    if spec.blur_p:
        blur = v2.GaussianBlur(23, spec.blur_sigma) if on_tensors else PillowBlur(*spec.blur_sigma)
        steps.append(v2.RandomApply([blur], spec.blur_p))
    if spec.solarize_p:
        steps.append(v2.RandomSolarize(128, spec.solarize_p))
    return v2.Compose(
        [*steps, v2.ToImage(), v2.ToDtype(torch.float32, True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )


def by_torchvision(specs: list[ViewSpec], files: list[bytes], on_tensors: bool) -> Callable[[], object]:
    views = [torchvision_view(spec, on_tensors) for spec in specs]
    to_image = v2.ToImage()

    def run() -> list[Tensor]:
        rows = []
        for file in files:
            image = Image.open(io.BytesIO(file)).convert("RGB")
            source = to_image(image) if on_tensors else image
            rows.append([view(source) for view in views])
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    return run


def by_gcssl(specs: list[ViewSpec], files: list[bytes]) -> dict[str, Callable[[], object]]:
    """What a worker does, and what is done in batches, by exact and by fast jitter."""

    def draw(generator: np.random.Generator, _: tuple[int, int]) -> Drawn:
        return [(spec, draw_view(generator, spec)) for spec in specs], [None] * len(specs)

    maker = ViewMaker(draw, SIZE)

    def work() -> dict[str, Any]:
        return collate([maker(decode(file), None, (0, i)) for i, file in enumerate(files)])

    def in_batches(colour: str) -> Callable[[], object]:
        return lambda: batch_to_device(batch, device(), IMAGENET_MEAN, IMAGENET_STD, AugmentConfig(colour=colour))

    batch = work()
    return {"gcssl, worker": work, "gcssl, batched": in_batches("exact"), "gcssl, batched, fast": in_batches("fast")}


def jpegs(count: int, data: Path | None) -> list[bytes]:
    """Encoded images: the first of a parquet file or folder, or generated ones."""
    if data is not None:
        import pyarrow.parquet as pq

        path = sorted(data.glob("*.parquet"))[0] if data.is_dir() else data
        return [row["bytes"] for row in pq.read_table(path, columns=["image"])["image"][:count].to_pylist()]
    files = []
    for i in range(count):
        generator = rng(7, i)
        smooth = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(smooth, np.int16) + generator.integers(-12, 13, (375, 500, 3))
        out = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=90)
        files.append(out.getvalue())
    return files


def measure(name: str, files: list[bytes], rounds: int) -> list[dict[str, Any]]:
    specs = PIPELINES[name]
    steps = {
        "torchvision on PIL": by_torchvision(specs, files, False),
        "torchvision v2 on tensors": by_torchvision(specs, files, True),
        **by_gcssl(specs, files),
    }
    times = alternate(steps, rounds, warm=1)
    for way, batched in {"gcssl": "gcssl, batched", "gcssl, fast": "gcssl, batched, fast"}.items():
        times[way] = [a + b for a, b in zip(times["gcssl, worker"], times[batched], strict=True)]
    return [
        {"pipeline": name, "way": way, "ms": 1000 * statistics.median(own) / len(files),
         "rate": len(files) / statistics.median(own), **ratios(times["torchvision on PIL"], own)}
        for way, own in times.items()
    ]  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench_input", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="a parquet file or folder with a column `image`")
    parser.add_argument("--pipelines", nargs="+", default=list(PIPELINES), choices=list(PIPELINES))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a json file for the rows")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    files = jpegs(args.images, args.data)
    rows = [row for name in args.pipelines for row in measure(name, files, args.rounds)]
    columns = {"pipeline": "{pipeline}", "way": "{way}", "ms per image": "{ms:.2f}", "images/s a core": "{rate:.0f}"}
    columns["ratio to PIL (min-max)"] = "{speedup:.2f} ({speedup_min:.2f}-{speedup_max:.2f})"
    mean = sum(map(len, files)) / len(files) / 1024
    sys.stdout.write(f"{len(files)} images, {mean:.0f} KiB each\n{markdown(rows, columns)}")
    write(args.out, vars(args), rows)


if __name__ == "__main__":
    entry(main)
