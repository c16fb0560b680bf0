"""Window geometry of GC ViT: legal image sizes, and relative position biases at any window size.

Tables live at the size a model was built for. Other windows read them through constant matrices, one per axis
(cached by size; the tables themselves never are), so a table that changes is never stale.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gcssl.errors import UserError
from gcssl.models.functional import at_least_fp32

STRIDES = (4, 8, 16, 32)
_CONSTANTS: dict[tuple[Any, ...], Tensor] = {}  # index and resize matrices; functions of their key alone


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a side or a pair; UserError for anything else."""
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise UserError(f"image size {size!r}: expected a side or [height, width] in whole pixels")
    return sides


def check_size(size: tuple[int, int], multiple: int) -> None:
    """UserError unless both sides are multiples of `multiple` pixels; names the nearest sizes that are."""
    if all(s > 0 and s % multiple == 0 for s in size):
        return
    near = [[max(1, f(s / multiple)) * multiple for s in size] for f in (math.floor, math.ceil)]
    names = " or ".join(dict.fromkeys(f"{h}x{w}" for h, w in near))
    raise UserError(
        f"image size {size[0]}x{size[1]}: both sides must be multiples of {multiple}; nearest legal: {names}"
    )


def query_levels(window_ratio: Sequence[int]) -> list[int]:
    """Poolings of each stage's query generator: log2(map side / window side), so that its grid is the window.

    UserError when a ratio is not its stage's stride times a power of two: no number of poolings would fit.
    """
    fits = [r >= s and r % s == 0 and (r // s).bit_count() == 1 for r, s in zip(window_ratio, STRIDES, strict=False)]
    if len(window_ratio) != 4 or not all(fits):
        raise UserError(
            f"window_ratio {list(window_ratio)}: expected four values, each its stage's stride "
            f"{list(STRIDES)} times a power of two, such as [32, 32, 16, 32] or [16, 16, 16, 32]"
        )
    return [(r // s).bit_length() - 1 for r, s in zip(window_ratio, STRIDES, strict=True)]


# ---- constants of a window size


def _constant(make: Callable[..., Tensor], key: tuple[Any, ...], like: Tensor) -> Tensor:
    """make(*key, device), kept per device; not kept for traced, fake or otherwise wrapped tensors."""
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return make(*key, like.device)
    full = (make, *key, like.device)
    if full not in _CONSTANTS:
        with torch.inference_mode(False):  # else they could not serve a training step later
            _CONSTANTS[full] = make(*key, like.device)
    return _CONSTANTS[full]


def relative_index(h: int, w: int, device: torch.device) -> Tensor:
    """Row of the bias table for each (query, key) pair of an h x w window: N*N int64 (Swin's order)."""
    row = torch.arange(h, device=device).repeat_interleave(w)  # N
    col = torch.arange(w, device=device).repeat(h)  # N
    dy = row[:, None] - row[None] + h - 1  # N N
    dx = col[:, None] - col[None] + w - 1
    return (dy * (2 * w - 1) + dx).flatten()


def resize_matrix(w0: int, w1: int, mode: str, device: torch.device) -> Tensor:
    """(2*w1-1) x (2*w0-1) float32: one axis of a table for windows of w0 tokens, read at w1 tokens.

    bicubic reads at the same fraction of the window (offset d becomes d*w0/w1; Keys' kernel, a = -1/2), crop
    at the same offset in tokens; beyond the table its edge is repeated. Rows sum to 1.
    """
    scale = w0 / w1 if mode == "bicubic" else 1.0
    at = torch.arange(1 - w1, w1, device=device, dtype=torch.float32) * scale + (w0 - 1)  # 2*w1-1
    tap = at.floor()[:, None] + torch.arange(-1, 3, device=device, dtype=torch.float32)  # 2*w1-1 4
    x = (at[:, None] - tap).abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weight = torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    column = tap.clamp(0, 2 * w0 - 2).long()
    return torch.zeros(2 * w1 - 1, 2 * w0 - 1, device=device).scatter_add_(1, column, weight)


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """Bias table (2*h-1)*(2*w-1) K of window `old` as that of window `new`, in fp32 at least; itself if equal."""
    if old == new:
        return table
    kind = table.device.type
    full = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with full:
        grid = at_least_fp32(table).t().reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1)  # K 2h-1 2w-1
        matrices = (_constant(resize_matrix, (a, b, mode), table) for a, b in zip(old, new, strict=True))
        rows, cols = (matrix.to(grid.dtype) for matrix in matrices)
        return (rows @ grid @ cols.t()).flatten(1).t()


class RelPosBias(nn.Module):
    """Relative position biases, (2*h-1)*(2*w-1) K, for windows of h x w tokens; read at any window size."""

    def __init__(self, window: tuple[int, int], num_heads: int, mode: str) -> None:
        super().__init__()
        self.window, self.mode = window, mode
        n = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(n, num_heads))

    def forward(self, window: tuple[int, int]) -> Tensor:
        """K N N for a window of N = h*w tokens."""
        table = resize_table(self.relative_position_bias_table, self.window, window, self.mode)
        index = _constant(relative_index, window, self.relative_position_bias_table)
        n = window[0] * window[1]
        return table.t().index_select(1, index).view(-1, n, n)
