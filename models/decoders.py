"""Reconstruction heads for masked image modelling."""

import torch.nn.functional as F
from torch import Tensor, nn


class PixelHead(nn.Module):
    """SimMIM's head (arXiv:2111.09886, section 3.3): a 1x1 convolution, then PixelShuffle to a finer map.

    B dim h w -> B channels h*upscale w*upscale. Output channel c*upscale^2 + i*upscale + j of a token is
    channel c of row i, column j of the token's cell. upscale = the stride gives pixels.
    """

    def __init__(self, dim: int, upscale: int, channels: int = 3) -> None:
        super().__init__()
        self.upscale = upscale
        self.proj = nn.Conv2d(dim, channels * upscale * upscale, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.proj(x), self.upscale)  # B channels h*upscale w*upscale
