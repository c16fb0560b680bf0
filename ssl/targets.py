"""What a masked objective predicts, and its loss over the hidden part: pixels, norm_pixels or hog.

pixels: the normalised RGB, absolute error (SimMIM, arXiv:2111.09886). norm_pixels: RGB standardised in each
square of `cell` pixels by its own mean and variance, squared error (MAE, arXiv:2111.06377). hog: a histogram of
oriented gradients a cell and channel, squared error (MaskFeat, arXiv:2112.09133).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gcssl.errors import UserError
from gcssl.models.decoders import PixelHead
from gcssl.models.functional import at_least_fp32
from gcssl.models.hidden import upsample_mask

TARGETS = ("pixels", "norm_pixels", "hog")
BINS = 9  # of a half turn
HOG_CELL = 8  # MaskFeat's, pixels


# ---- targets of images B 3 H W


def unit_moments(x: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + 1e-6) over the channels and pixels of each cell: B 1 H W both."""
    b, c, height, width = x.shape
    cells = at_least_fp32(x).view(b, c, height // cell, cell, width // cell, cell)
    var, mean = torch.var_mean(cells, (1, 3, 5), correction=1)  # B h w
    return tuple(  # type: ignore[return-value]
        m.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None] for m in (mean, (var + 1e-6).sqrt())
    )


def norm_pixels(x: Tensor, cell: int) -> Tensor:
    """B 3 H W, each cell standardised by its own moments."""
    mean, std = unit_moments(x, cell)
    return (at_least_fp32(x) - mean) / std


def hog(x: Tensor, cell: int) -> Tensor:
    """B C H W -> B C*9 H/cell W/cell: votes for 9 unsigned orientations, of l2 norm 1 a cell and channel.

    A pixel's gradient is Sobel's, with the image mirrored at its border; it votes with its magnitude for the bin
    [k, k + 1) * 20 degrees that holds atan2(gx, gy) modulo 180, as in MaskFeat's code (without the Gaussian window
    that it offers). A cell without gradients is all 0.
    """
    x = F.pad(at_least_fp32(x), (1, 1, 1, 1), mode="reflect")  # B C H+2 W+2
    gx, gy = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    gx = gx[..., :-2, :] + 2 * gx[..., 1:-1, :] + gx[..., 2:, :]  # B C H W
    gy = gy[..., :-2] + 2 * gy[..., 1:-1] + gy[..., 2:]
    size = torch.hypot(gx, gy)
    bins = (torch.atan2(gx, gy) * (BINS / math.pi)).floor() % BINS  # 180 degrees are bin 0
    votes = [F.avg_pool2d(torch.where(bins == k, size, 0.0), cell) for k in range(BINS)]  # B C h w each
    return F.normalize(torch.stack(votes, 2), dim=2).flatten(1, 2)


def make_target(kind: str, x: Tensor, cell: int) -> Tensor:
    """B 3 H W, or B 27 H/cell W/cell for hog, of images B 3 H W."""
    return x if kind == "pixels" else norm_pixels(x, cell) if kind == "norm_pixels" else hog(x, cell)


# ---- predictions of them


def check_target(kind: str, unit: int, stride: int) -> None:
    """UserError for an unknown target, or hog where mask units or tokens of `stride` pixels split a HOG cell."""
    if kind not in TARGETS:
        raise UserError(f"objective.target={kind} is unknown; one of {', '.join(TARGETS)}")
    if kind == "hog" and unit % HOG_CELL:
        raise UserError(f"objective.mask_unit={unit}: objective.target=hog needs a multiple of {HOG_CELL} pixels")
    if kind == "hog" and stride % HOG_CELL:
        raise UserError(f"objective.target=hog: needs a backbone whose stride is a multiple of 8, given {stride}")


def target_head(kind: str, dim: int, stride: int, cell: int) -> PixelHead:
    """The linear head from tokens of `stride` pixels, B dim h w, to a map of the target's shape."""
    return PixelHead(dim, *head_shape(kind, stride, cell))


def head_shape(kind: str, stride: int, cell: int) -> tuple[int, int]:
    """What is predicted of a token of `stride` pixels: upscale (values a side) and channels of each."""
    return (stride // cell, 3 * BINS) if kind == "hog" else (stride, 3)


def mean_hidden(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of an error B H W over what mask B h w hides: a mean per sample, then over samples.

    Every sample hides the same count, so this is also the mean over all that is hidden in the batch, and the
    mean over N equal processes is the loss of one process on the joined batch.
    """
    hidden = upsample_mask(mask, *error.shape[-2:])  # B H W
    error = torch.where(hidden, error, 0.0)
    return (error.sum((1, 2)) / hidden.sum((1, 2)).clamp(min=1)).mean()


def l1_hidden(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error over hidden sites and channels: pred, target B C H W; mask B h w."""
    return mean_hidden((at_least_fp32(pred) - at_least_fp32(target)).abs().mean(1), mask)


def mse_hidden(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over hidden sites and channels: pred, target B C H W; mask B h w."""
    return mean_hidden((at_least_fp32(pred) - at_least_fp32(target)).square().mean(1), mask)


def target_loss(kind: str, pred: Tensor, x: Tensor, mask: Tensor, cell: int) -> dict[str, Tensor]:
    """Loss of a prediction of the target of images x (B 3 H W) over the hidden units of mask (B h w).

    Beside it `prediction_std`, a sign of collapse: see hidden_std. It is that of this process's images.
    """
    target, loss = make_target(kind, x, cell), l1_hidden if kind == "pixels" else mse_hidden
    out = {"loss": loss(pred, target, mask)}
    if len(x) > 1:
        out["prediction_std"] = hidden_std(pred, mask) / hidden_std(target, mask).clamp(min=1e-6)
    return out


@torch.no_grad()
def hidden_std(values: Tensor, mask: Tensor) -> Tensor:
    """How much B C H W differ between images where mask B h w hides them: at each site the deviation from the mean of
    the images that hide it, in the root mean square over all of these; at 16 to 31 sites an axis, which cost little.

    Of predictions, as a share of that of their targets: 0 where one prediction is made whatever an image shows.
    """
    height, width = values.shape[-2:]
    some = (..., slice(None, None, max(1, height // 16)), slice(None, None, max(1, width // 16)))
    hidden = upsample_mask(mask, height, width)[some][:, None]  # B 1 h w
    values = torch.where(hidden, at_least_fp32(values[some]), 0.0)
    mean = values.sum(0) / hidden.sum(0).clamp(min=1)  # C h w
    squares = torch.where(hidden, values - mean, 0.0).square().sum()
    return (squares / (hidden.sum() * values.shape[1]).clamp(min=1)).sqrt()


# ---- pictures


def reconstruction(
    encoder: Any, x: Tensor, mask: Tensor, seen: Tensor, pred: Tensor | None, kind: str, cell: int
) -> dict[str, Tensor]:
    """original, hidden (`seen` by the encoder), reconstructed (the prediction in hidden units): n 3 H W, 0..1.

    norm_pixels are given back each cell's own mean and deviation, as in MAE's pictures; histograms of gradients
    are no picture, so hog has no third row.
    """
    shown = {"original": x, "hidden": seen}
    if pred is not None and kind != "hog":
        pred = at_least_fp32(pred)
        if kind == "norm_pixels":
            mean, std = unit_moments(x, cell)
            pred = pred * std + mean
        hidden = upsample_mask(mask, *x.shape[-2:]).unsqueeze(1)  # n 1 H W
        shown["reconstructed"] = torch.where(hidden, pred, x)
    mean, std = (x.new_tensor(v).view(1, -1, 1, 1) for v in (encoder.mean, encoder.std))
    return {name: (image * std + mean).clamp(0.0, 1.0) for name, image in shown.items()}
