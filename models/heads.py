"""Heads of the view objectives: MLPs whose batch norms use the statistics of the global batch, and only
those.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcssl.models.functional import at_least_fp32

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over the processes, with gradient, on any backend


class BatchNorm(nn.Module):
    """Batch normalisation of B C without running statistics, over the samples of all processes.

    Train and eval mode are the same: the head is used only in pretraining, always on whole batches.
    Statistics are taken in fp32 and in two passes (mean, then squares around it), so a large common offset
    costs no accuracy. `reducer` is asked at each call: None for one process, else the sum over processes
    (`gcssl.ssl.gather.reducer`; handed in because models know nothing of processes). torch's SyncBatchNorm
    refuses CPU tensors. `affine`: a scale and a shift a channel; scale=True without affine: a scale alone.
    """

    def __init__(
        self, dim: int, reducer: Callable[[], Reduce | None], affine: bool = True, scale: bool | None = None
    ) -> None:
        super().__init__()
        self.reducer, self.eps = reducer, 1e-5
        self.weight = nn.Parameter(torch.ones(dim)) if (affine if scale is None else scale) else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        x, reduce = at_least_fp32(x), self.reducer()
        if reduce is None:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        packed = reduce(torch.cat([x.sum(0), x.new_full((1,), len(x))]))  # C + 1: sums, count
        count = packed[-1].detach()
        centred = x - packed[:-1] / count
        var = reduce(centred.square().sum(0)) / count  # C, biased as torch's
        y = centred * torch.rsqrt(var + self.eps)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


def mlp(dims: list[int], norm: Callable[[int, bool], nn.Module]) -> nn.Sequential:
    """Linear (no bias) - norm - ReLU for each step of `dims`; after the last Linear a norm without affine, no
    ReLU.

    B dims[0] -> B dims[-1]. `norm(dim, affine)` makes a norm. MoCo v3's projector is dims [C, 4096, 4096,
    256], its predictor [256, 4096, 256] (arXiv:2104.02057, appendix A).
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        last = i == len(dims) - 2
        layers += [nn.Linear(a, b, bias=False), norm(b, not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Prototypes(nn.Module):
    """n d of unit rows -> n K: products with K prototypes, rows of unit length times a gain (weight
    normalisation).

    The gain is 1 and stays so unless `learn_gain`, as in DINO's norm_last_layer.
    """

    def __init__(self, dim: int, count: int, learn_gain: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # torch's own for a Linear
        self.gain = nn.Parameter(torch.ones(count, 1), requires_grad=learn_gain)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.gain * F.normalize(self.weight, dim=1))


class DINOHead(nn.Module):
    """DINO's head (arXiv:2104.14294, appendix C): three Linears with GELU between them, l2 norm, prototypes.

    ... dim -> ... count. count 0: no prototypes, the unit vectors ... bottleneck themselves (SimDINO).
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, count: int, learn_gain: bool = False) -> None:
        super().__init__()
        dims = [dim, hidden, hidden, bottleneck]
        layers = [m for a, b in pairwise(dims) for m in (nn.Linear(a, b), nn.GELU())][:-1]
        self.mlp = nn.Sequential(*layers)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = Prototypes(bottleneck, count, learn_gain) if count else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(at_least_fp32(self.mlp(x)), dim=-1, eps=1e-6))
