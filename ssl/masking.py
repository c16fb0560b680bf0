"""Masks of masked image modelling. In every mask of this project True means hidden.

A mask is a boolean grid h w of units; a unit is a square of `unit` pixels, a multiple of the stem's stride 4
that divides both sides of the image. Per sample exactly ceil(ratio * h * w) units are hidden, drawn
uniformly.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from gcssl.augment import View, ViewSpec, draw_view
from gcssl.errors import UserError
from gcssl.log import say
from gcssl.models.build import Backbone
from gcssl.models.gcvit import GCViT
from gcssl.models.hidden import upsample_mask
from gcssl.ssl.views import use_maps_alone

STEM_STRIDE = 4


def default_unit(img_size: tuple[int, int]) -> int:
    """Mask unit in pixels for an image of H W pixels: 32 from 192 px up, 16 from 96 px up, 8 below."""
    side = min(img_size)
    return 32 if side >= 192 else 16 if side >= 96 else 8


def check_unit(img_size: tuple[int, int], unit: int) -> None:
    """UserError unless `unit` is a multiple of 4 that divides both sides and leaves at least two units."""
    height, width = img_size
    legal = [
        u
        for u in range(STEM_STRIDE, min(img_size) + 1, STEM_STRIDE)
        if height % u == 0 and width % u == 0 and height * width > u * u
    ]
    if unit not in legal:
        raise UserError(f"objective.mask_unit={unit} does not fit {height}x{width} px images; one of {legal} does")


def check_ratio(n_units: int, ratio: float) -> None:
    """UserError unless 0 < ratio < 1 and at least one of `n_units` units stays visible."""
    if not 0.0 < ratio < 1.0:
        raise UserError(f"objective.mask_ratio={ratio} must lie between 0 and 1, both excluded; 0.6 is SimMIM's")
    if hidden_count(n_units, ratio) >= n_units:
        raise UserError(
            f"objective.mask_ratio={ratio} hides all of the {n_units} mask units; lower it or take a smaller "
            "objective.mask_unit"
        )
    n = hidden_count(n_units, ratio)
    if n / n_units - ratio > 0.02 and torch.get_default_device().type != "meta":  # where it is only tried out
        say(f"mask: {n} of {n_units} units are hidden, {n / n_units:.2f} for objective.mask_ratio={ratio}")


def hidden_count(n_units: int, ratio: float) -> int:
    """ceil(ratio * n_units), free of the rounding of binary fractions (0.55 * 100 counts 55, not 56)."""
    return math.ceil(round(ratio * n_units, 9))


def draw_mask(rng: np.random.Generator, grid: tuple[int, int], ratio: float) -> np.ndarray:
    """Boolean mask h w with exactly `hidden_count` units hidden (True), uniform over all such masks."""
    n = grid[0] * grid[1]
    mask = np.zeros(n, dtype=bool)
    mask[rng.permutation(n)[: hidden_count(n, ratio)]] = True
    return mask.reshape(grid)


@dataclass(frozen=True)
class MaskedDraw:
    """A sample's one crop and its mask: (rng, (H, W)) -> ([(spec, view)], [mask h w])."""

    spec: ViewSpec  # its size is that of the call
    unit: int
    ratio: float

    def __call__(
        self, rng: np.random.Generator, img_size: tuple[int, int]
    ) -> tuple[list[tuple[ViewSpec, View]], list[np.ndarray | None]]:
        spec = replace(self.spec, size=img_size)
        grid = (img_size[0] // self.unit, img_size[1] // self.unit)
        return [(spec, draw_view(rng, spec))], [draw_mask(rng, grid, self.ratio)]


def draw_blocks(rng: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    """Boolean mask h w with exactly `count` units hidden in rectangles (BEiT, arXiv:2106.08254, algorithm 1).

    Rectangles have aspect ratios of 0.3 to 1/0.3 and, as in iBOT's code, a third of the grid's side squared at least,
    where as much is left to hide; they may overlap, and one that would hide too many is trimmed.
    """
    mask, least = np.zeros(grid, dtype=bool), max(1, (min(grid) // 3) ** 2)
    while (left := count - int(mask.sum())) > 0:
        area, ratio = rng.uniform(min(least, left), left), math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h = min(max(round(math.sqrt(area * ratio)), 1), grid[0])
        w = min(max(round(math.sqrt(area / ratio)), 1), grid[1])
        top, first = rng.integers(grid[0] - h + 1), rng.integers(grid[1] - w + 1)
        block = np.zeros(grid, dtype=bool)
        block[top : top + h, first : first + w] = True
        fresh = np.flatnonzero(block & ~mask)
        mask.reshape(-1)[fresh[:left]] = True
    return mask


def draw_uniform_mask(rng: np.random.Generator, grid: tuple[int, int]) -> np.ndarray:
    """Boolean mask h w that leaves one unit of each 2 x 2 block visible, any of the four equally likely."""
    h, w = grid[0] // 2, grid[1] // 2
    mask = np.ones((h, w, 4), dtype=bool)
    np.put_along_axis(mask, rng.integers(4, size=(h, w, 1)), False, axis=2)
    return mask.reshape(h, w, 2, 2).swapaxes(1, 2).reshape(grid)


def keep_units(x: Tensor, mask: Tensor) -> Tensor:
    """B C H W -> B C H/2 W/2: the one visible unit of each 2 x 2 block (draw_uniform_mask), side by side."""
    b, c, height, width = x.shape
    h, w = mask.shape[1] // 2, mask.shape[2] // 2
    kept = (~mask).view(b, h, 2, w, 2).transpose(2, 3).reshape(b, h, w, 4).long().argmax(-1)  # B h w, in 0..3
    blocks = x.reshape(b, c, h, 2, height // (2 * h), w, 2, width // (2 * w))  # B C h 2 u w 2 u
    blocks = blocks.permute(0, 1, 2, 4, 5, 7, 3, 6).flatten(6)  # B C h u w u 4
    index = kept.view(b, 1, h, 1, w, 1, 1).expand(*blocks.shape[:-1], 1)
    return blocks.gather(-1, index).reshape(b, c, height // 2, width // 2)


def hide_pixels(x: Tensor, mask: Tensor, color: Tensor | float = 0.0) -> Tensor:
    """Normalised images B C H W with the pixels of hidden units (mask B h w) set to `color`, a number or C: 0 is the
    mean colour.

    Filled, not multiplied, so that nothing of a hidden pixel is left, not even a NaN or the sign of a zero.
    Hiding pixels before the stem is what keeps GC ViT from leaking: its stem's 3x3 convolutions overlap the
    units and its squeeze-excite pools over the whole image.
    """
    hidden = upsample_mask(mask, *x.shape[-2:]).unsqueeze(1)  # B 1 H W
    if not isinstance(color, Tensor):
        return x.masked_fill(hidden, color)
    return torch.where(hidden, color.to(x.dtype).view(1, -1, 1, 1), x)


def fill_color(encoder: Backbone) -> float:
    """What hidden pixels are set to: for GC ViT 0, the mean colour; for others 0.5 (half a standard deviation off it).

    A stem without biases makes zeros of zeros, and a norm of a zero vector multiplies gradients by 1 / sqrt(eps), a
    thousand at each such layer of ConvNeXt.
    """
    return 0.0 if isinstance(encoder, GCViT) else 0.5


def make_mask_token(encoder: Backbone, objective: str) -> nn.Parameter | None:
    """What stands in for a hidden stem token of GC ViT, C; other backbones have no place for one.

    Of those, the parameters that no map depends on are frozen: DistributedDataParallel stops on them.
    """
    if isinstance(encoder, GCViT):
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(encoder.channels[0]), std=0.02))
    use_maps_alone(encoder, objective)
    return None
