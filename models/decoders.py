"""Reconstruction heads for masked image modelling."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from gcssl.errors import UserError

HEAD_DIM = 32  # of the decoder's attention, as published: 16 heads at width 512


def check_decoder(dim: int, depth: int) -> None:
    """UserError unless heads of HEAD_DIM fill `dim` and there is a block."""
    if dim < HEAD_DIM or dim % HEAD_DIM or depth < 1:
        raise UserError(
            f"objective.decoder_dim={dim}, objective.decoder_depth={depth}: expected a multiple of {HEAD_DIM} and "
            "at least one block"
        )


def init_linears(decoder: nn.Module) -> None:
    """As published for MAE and FastMIM."""
    for module in decoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


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


class MapDecoder(nn.Module):
    """FastMIM's decoder (arXiv:2212.06593): transformer blocks among all tokens of the last map, B C h w -> B dim h w.

    The encoder has seen the hidden units too, as holes, so there are no mask tokens here, and no positions.
    """

    def __init__(self, dim_in: int, dim: int, depth: int) -> None:
        super().__init__()
        check_decoder(dim, depth)
        self.embed = nn.Linear(dim_in, dim)
        self.blocks = nn.ModuleList(Block(dim, dim // HEAD_DIM, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        init_linears(self)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        x = self.embed(x.flatten(2).transpose(1, 2))  # B N dim
        for block in self.blocks:
            x = block(x)
        return self.norm(x).transpose(1, 2).unflatten(2, (h, w))


class TokenDecoder(nn.Module):
    """MAE's light decoder (arXiv:2111.06377): the encoder's tokens and mask tokens, transformer blocks, pixels.

    It works on a grid of cells with fixed 2-d sine-cosine positions and predicts upscale x upscale values of
    `channels` in each (pixels: upscale is the cell's side). `split`: an encoder's token becomes split x split of the
    decoder's (a linear layer, then PixelShuffle), as in UM-MAE (arXiv:2205.10063).
    """

    positions: Tensor

    def __init__(
        self, dim_in: int, grid: tuple[int, int], upscale: int, split: int, dim: int, depth: int, channels: int = 3
    ) -> None:
        super().__init__()
        check_decoder(dim, depth)
        self.grid, self.upscale, self.split = grid, upscale, split
        self.embed = nn.Linear(dim_in, split * split * dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.register_buffer("positions", sincos_positions(*grid, dim), persistent=False)  # N dim
        self.blocks = nn.ModuleList(Block(dim, dim // HEAD_DIM, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.pred = nn.Linear(dim, channels * upscale * upscale)
        nn.init.normal_(self.mask_token, std=0.02)
        init_linears(self)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x: B C h w from the encoder; mask: B h' w' on the decoder's grid, True = hidden -> B channels H W.

        Hidden cells start as the mask token. A grid k times finer than x's tokens repeats each of them k x k
        times, for a mask that leaves one of those visible.
        """
        x = self.embed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # B split*split*dim h w
        x = F.pixel_shuffle(x, self.split)  # B dim h*split w*split
        x = x.repeat_interleave(self.grid[0] // x.shape[2], 2).repeat_interleave(self.grid[1] // x.shape[3], 3)
        x = torch.where(mask[:, None], self.mask_token.to(x.dtype).view(1, -1, 1, 1), x)  # B dim h' w'
        x = x.flatten(2).transpose(1, 2) + self.positions.to(x.dtype)  # B N dim
        for block in self.blocks:
            x = block(x)
        x = self.pred(self.norm(x)).transpose(1, 2).unflatten(2, self.grid)  # B channels*upscale^2 h' w'
        return F.pixel_shuffle(x, self.upscale)  # B channels H W, H = h' * upscale


def sincos_positions(h: int, w: int, dim: int) -> Tensor:
    """h*w dim: a quarter each of sin and cos of the column, sin and cos of the row, at dim / 4 frequencies."""
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # dim/4
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x, y = (at.flatten()[:, None] * rate for at in (col, row))  # h*w dim/4
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float()
