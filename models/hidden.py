"""Hiding a part of a map, by a mask B h' w' of units (True = hidden) whose grid the map's h w are a multiple of.

Two ways: hide_tokens puts a mask token in their place; the others let hidden sites take no part at all. They
do so densely, layer by layer on the whole map: the reference for visible.py, which computes the rest only.
"""

import torch
from torch import Tensor


def spread(mask: Tensor | None, h: int, w: int) -> Tensor | None:
    """The sites B h w 1 that a mask of units covers; None of none."""
    if mask is None:
        return None
    mh, mw = mask.shape[1:]
    if h % mh or w % mw:
        raise ValueError(f"a mask of {mh} x {mw} units does not divide a grid of {h} x {w} tokens")
    return mask.repeat_interleave(h // mh, 1).repeat_interleave(w // mw, 2)[..., None]


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
