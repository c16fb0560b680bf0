"""Reconstruction heads for masked image modelling."""

import torch.nn.functional as F
from torch import Tensor, nn


class PixelHead(nn.Module):
    """SimMIM's head (arXiv:2111.09886, section 3.3): a 1x1 convolution, then PixelShuffle back to pixels.

    B dim h w -> B 3 h*stride w*stride. Output channel c*stride^2 + i*stride + j of a token is channel
    c of the pixel in row i, column j of the token's cell.
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Conv2d(dim, 3 * stride * stride, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.proj(x), self.stride)  # B 3 h*stride w*stride
