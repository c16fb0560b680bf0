"""Hiding a part of a map, by a mask B h' w' of units (True = hidden) whose grid the map's h w are a multiple of.

Two ways: hide_tokens puts a mask token in their place; the others let hidden sites take no part at all. They
do so densely, layer by layer on the whole map: the reference for visible.py, which computes the rest only.
"""

import torch
from torch import Tensor


def upsample_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """B h w -> B height width by repetition. ValueError when h w do not divide height width."""
    h, w = mask.shape[-2:]
    if height % h or width % w:
        raise ValueError(f"a mask of {h}x{w} units does not tile {height}x{width}")
    return mask.repeat_interleave(height // h, -2).repeat_interleave(width // w, -1)  # B H W


def spread(mask: Tensor | None, h: int, w: int) -> Tensor | None:
    """The sites B h w 1 that a mask of units covers; None of none."""
    return None if mask is None else upsample_mask(mask, h, w)[..., None]


def hide(x: Tensor, sites: Tensor | None, value: float = 0.0) -> Tensor:
    """x (B m n C) with `value` at hidden sites (B m n 1): filled, so that nothing of what was there is left."""
    return x if sites is None else x.masked_fill(sites, value)


def average(x: Tensor, sites: Tensor | None) -> Tensor:
    """Mean over the visible sites of x (B m n C), which is 0 at hidden ones (B m n 1): B C."""
    mean = x.mean((1, 2))
    if sites is None:
        return mean
    visible = (~sites).to(torch.promote_types(x.dtype, torch.float32)).mean((1, 2))  # B 1: their share
    return (mean / visible).to(mean.dtype)


def blind_keys(sites: Tensor | None) -> Tensor | None:
    """Of hidden sites B W N 1, the keys B W N that attention must not see.

    None in a window that is hidden as a whole: a softmax over no key is NaN, and nobody reads what comes of it.
    """
    return None if sites is None else (sites & ~sites.all(2, keepdim=True)).squeeze(-1)


def hide_tokens(x: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """Writes `token` (C) over the tokens of x (B h w C) that the mask covers."""
    sites = spread(mask, *x.shape[1:3])
    assert sites is not None
    return torch.where(sites, token.to(x.dtype), x)
