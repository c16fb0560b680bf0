"""Functions that hold no parameters, of GC ViT above all; gcvit.py explains the layouts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_WINDOWS = 65_535  # in a batch: with more, torch's memory-efficient kernel fails in its backward pass


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, body: str | None = None, blind: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v: B W K N D.

    q: B W K N D, or B 1 K N D shared by all windows; k, v: B W K N D; bias: K N N, or B 1 K N N, each image's own;
    blind: B W N, keys left out.
    body: "matmul", "sdpa", or None: what is faster: matmul on a CPU where the bias needs a gradient or in bf16.
    """
    if body is None:
        narrow = k.dtype in (torch.bfloat16, torch.float16)
        body = "matmul" if q.device.type == "cpu" and (bias.requires_grad or narrow) else "sdpa"
    q, bias = q.to(k.dtype), bias.to(k.dtype).view(-1, 1, *bias.shape[-3:])  # bias: B W K N N, or 1 for B and W
    away = None if blind is None else torch.zeros_like(blind, dtype=k.dtype).masked_fill(blind, -math.inf)  # B W N
    if body == "matmul":
        scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).add_(bias)  # B W K N N
        return (scores if away is None else scores.add_(away[:, :, None, None])).softmax(-1) @ v
    if body != "sdpa":
        raise ValueError(f"body must be 'matmul', 'sdpa' or None, got {body!r}")
    bias, shape = bias if away is None else bias + away[:, :, None, None], k.shape
    q, k, v = (t.expand(shape).flatten(0, 1) for t in (q, k, v))  # B*W K N D: what the fast kernels take
    bias = bias.flatten(0, 1)  # B*W K N N, or 1 for B*W
    if len(k) <= MOST_WINDOWS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).view(shape)
    cut = [t.split(MOST_WINDOWS) for t in (q, k, v, bias.expand(len(k), -1, -1, -1))]
    out = [F.scaled_dot_product_attention(q, k, v, attn_mask=part) for q, k, v, part in zip(*cut, strict=True)]
    return torch.cat(out).view(shape)


def drop_path(x: Tensor, rate: float, noise: Tensor | None) -> Tensor:
    """x (B ...): a sample is dropped where noise (B, in [0, 1)) < rate, else scaled by 1 / (1 - rate)."""
    if noise is None or rate == 0.0:
        return x
    keep = (noise >= rate).to(x.dtype) / (1 - rate)
    return x * keep.view(-1, *[1] * (x.ndim - 1))


def conv(x: Tensor, layer: nn.Module) -> Tensor:
    """A convolution or pooling on B H W C: permuted, it is B C H W in channels-last memory."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """B H W C -> B W N C."""
    b, h, w, c = x.shape
    (wh, ww), rows, cols = window, h // window[0], w // window[1]
    return x.reshape(b, rows, wh, cols, ww, c).transpose(2, 3).reshape(b, rows * cols, wh * ww, c)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32 when it is narrower, unchanged otherwise (float64 stays, for tests and gradient checks)."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
