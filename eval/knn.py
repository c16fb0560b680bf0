"""Weighted k-nearest-neighbour classification of frozen features (arXiv:1805.01978, section 3.4).

`accelerate launch -m gcssl.eval.knn backbone=runs/a [data.path=...] [key=value ...]`

The search is exact: candidates come from FAISS (inner product, flat index) or from torch in fp32, are scored
again in float64 and put in order of (similarity, bank index); where fp32 cannot tell whether a neighbour was
missed, the query is searched again in float64. Both backends therefore give the same neighbours and the same
votes, ties included.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from gcssl.errors import UserError
from gcssl.eval.features import KINDS, Features, gather_rows
from gcssl.eval.inputs import InputConfig, Inputs, evaluate, program
from gcssl.keys import CHOICES
from gcssl.log import say

if TYPE_CHECKING:
    from accelerate import Accelerator

MARGIN = 32  # candidates beyond k, so that a rounding error in fp32 cannot drop a neighbour unseen
SLICE = 16_384  # images of the bank that are compared at once
GROUP = 16  # columns of a slice whose largest is looked at first
TRIAL = 65_536  # images of a bank from which on both backends are tried on a slice first
SCALE = 10**9  # similarities are compared to nine decimals
BACKENDS = CHOICES["eval.backend"]


@dataclass
class SearchConfig:
    backend: str = "auto"  # auto | faiss | torch


@dataclass
class KnnConfig(InputConfig):
    ks: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    temperature: float = 0.07
    features: str = field(default="last", metadata={"choices": KINDS})
    eval: SearchConfig = field(default_factory=SearchConfig)


# ---------------------------------------------------------------------------------------------------- search


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """All of this process's share of the cores while searching: torchrun leaves one thread a process.

    torch and faiss share one OpenMP setting on Linux. On macOS each brings its own OpenMP library and the
    two must stay at one thread.
    """
    faiss = sys.modules.get("faiss")
    before = torch.get_num_threads()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if local and ("TORCHELASTIC_RUN_ID" in os.environ or cores == os.cpu_count()):
        cores //= local  # of all processes; srun gives each its own
    inside = 1 if sys.platform == "darwin" else max(before, cores) if local else before
    try:
        _set_threads(inside, faiss)
        yield
    finally:
        _set_threads(before, faiss)


def _set_threads(n: int, faiss: ModuleType | None) -> None:
    torch.set_num_threads(n)
    if faiss is not None:  # on Linux the same setting; elsewhere faiss may have its own
        faiss.omp_set_num_threads(n)


def _import_faiss() -> ModuleType | None:
    try:
        import faiss
    except (
        ImportError,
        RuntimeError,
        OSError,
    ):  # the GPU wheel raises RuntimeError without its CUDA libraries
        return None
    return faiss


def _similarity_key(similarity: Tensor, index: Tensor, n: int) -> Tensor:
    """int64 that orders by similarity to nine decimals, then by lower index; same shape as similarity."""
    return (similarity * SCALE).round().long() * n + (n - 1 - index)


def _split_key(key: Tensor, n: int) -> tuple[Tensor, Tensor]:
    rank = key.remainder(n)
    return (key - rank).div(n, rounding_mode="floor").double() / SCALE, n - 1 - rank


def _search_exact(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Float64 brute force in slices of both; bank N D, queries M D -> similarity M k, index M k."""
    n, kept = len(bank), []
    for query in queries.split(256):
        best = torch.empty(len(query), 0, dtype=torch.int64, device=bank.device)
        for start in range(0, n, SLICE):
            part = bank[start : start + SLICE].double()
            index = torch.arange(start, start + len(part), device=bank.device)
            key = torch.cat([best, _similarity_key(query.double() @ part.T, index, n)], 1)
            best = key.topk(min(k, key.shape[1]), dim=1).values
        kept.append(best)
    return _split_key(torch.cat(kept), n)


def _nearer(part: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Those of `part` (m n) that can exceed `least` (m 1), values and columns, m c: of every GROUP columns, taken far
    apart, the largest is looked at first, which costs a tenth of a search for the k largest of all.
    """
    groups = part.unflatten(1, (GROUP, -1))  # m GROUP n/GROUP
    top = groups.amax(1)
    n_near = int((top > least).sum(1).max())
    near = top.topk(n_near, dim=1).indices[:, None].expand(-1, GROUP, -1)  # every group with a larger one, in each row
    first = torch.arange(GROUP, device=part.device)[:, None] * groups.shape[2]
    return groups.gather(2, near).flatten(1), (near + first).flatten(1)


def _candidates_torch(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """fp32 inner products, bank and queries in slices; similarity M k, index M k."""
    values, indices = [], []
    products = bank.new_empty(512, min(SLICE, len(bank)))  # once: fresh memory for each costs a fifth
    for query in queries.split(512):
        best = torch.empty(len(query), 0, device=bank.device)
        where = torch.empty(len(query), 0, dtype=torch.int64, device=bank.device)
        for start in range(0, len(bank), SLICE):
            among = bank[start : start + SLICE]
            part = torch.mm(query, among.T, out=products[: len(query), : len(among)])  # m n
            if best.shape[1] == k and part.shape[1] % GROUP == 0:
                top, column = _nearer(part, best[:, -1:])
            else:
                top, column = part.topk(min(k, part.shape[1]), dim=1)
            best, where = torch.cat([best, top], 1), torch.cat([where, column + start], 1)
            keep = best.topk(min(k, best.shape[1]), dim=1)
            best, where = keep.values, where.gather(1, keep.indices)
        values.append(best)
        indices.append(where)
    return torch.cat(values), torch.cat(indices)


def self_check(index: Any, bank: Tensor, queries: Tensor, k: int) -> bool:
    """Whether a FAISS index of `bank` (N D) finds what brute force finds: the similarities it claims are those
    of the neighbours it names, and of the k nearest of each query (M D)."""
    values, where = (torch.from_numpy(part) for part in index.search(queries.cpu().numpy(), k))  # M k
    if where.min() < 0 or where.max() >= len(bank):
        return False
    named = torch.einsum("md,mkd->mk", queries.cpu().double(), bank.cpu()[where].double()).float()
    truth = _search_exact(bank, queries, k)[0].float().cpu()
    return torch.allclose(values, truth, atol=1e-4) and torch.allclose(named, truth, atol=1e-4)


class _Faiss:
    """A flat inner-product index, on the GPU when faiss has one there and it passes a ten-query check."""

    def __init__(self, faiss: ModuleType, bank: Tensor, queries: Tensor, k: int) -> None:
        self.index = faiss.IndexFlatIP(bank.shape[1])
        self.index.add(bank.cpu().numpy())
        if getattr(faiss, "get_num_gpus", lambda: 0)() > 0 and bank.is_cuda:
            try:
                self.resources = faiss.StandardGpuResources()
                self.index = faiss.index_cpu_to_gpu(self.resources, bank.device.index or 0, self.index)
                right = self_check(self.index, bank, queries[:10], k)
            except Exception as error:  # faiss raises bare RuntimeErrors for a missing kernel or a full GPU
                raise _FaissGpuRefused(str(error).strip().split("\n")[0][:80] or type(error).__name__) from None
            if not right:
                raise _FaissGpuRefused("its neighbours differ from brute force")

    def __call__(self, bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = self.index.search(queries.cpu().numpy(), k)
        return torch.from_numpy(values).to(bank.device), torch.from_numpy(indices).to(bank.device)


class _FaissGpuRefused(Exception):
    pass


def _torch_is_faster(faiss: ModuleType, bank: Tensor, queries: Tensor, k: int) -> bool:
    """On a slice: which of two matrix products is faster depends on the CPU (docs/LOG.md), results do not."""
    bank, queries = bank[:TRIAL], queries[: TRIAL // 256]
    seconds = []
    for way in (_candidates_torch, _Faiss(faiss, bank, queries, k)):
        begin = time.perf_counter()
        way(bank, queries, k)
        seconds.append(time.perf_counter() - begin)
    return seconds[0] < seconds[1]


def _searcher(backend: str, bank: Tensor, queries: Tensor, k: int) -> Any:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    faiss = None if backend == "torch" else _import_faiss()
    if backend == "faiss" and faiss is None:
        raise ValueError("backend 'faiss' was asked for and faiss cannot be imported; install it or use 'torch'")
    if faiss is None or (backend == "auto" and bank.is_cuda and not getattr(faiss, "get_num_gpus", lambda: 0)()):
        return _candidates_torch  # a bank on the GPU is searched there
    if backend == "auto" and not bank.is_cuda and len(bank) >= TRIAL and _torch_is_faster(faiss, bank, queries, k):
        return _candidates_torch
    try:
        return _Faiss(faiss, bank, queries, k)
    except _FaissGpuRefused as error:
        say(f"knn: the FAISS GPU index is not used ({error}); exact torch search instead")
        return _candidates_torch


@torch.no_grad()
def search(bank: Tensor, queries: Tensor, k: int, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The k nearest of `bank` (N D, unit length) of each query (M D): similarity M k float64, index M k.

    Nearest first; equal similarity (nine decimals): lower index first.
    """
    n = len(bank)
    bank, queries = bank.float().contiguous(), queries.float().contiguous()
    m = min(k + MARGIN, n)
    if backend != "torch":
        _import_faiss()  # before the threads are set, which concerns it too
    with _threads():
        rough, index = _searcher(backend, bank, queries, m)(bank, queries, m)  # M m
        parts, error = [], 1e-7
        # 64 queries' neighbours fit the cache
        for part, query, near in zip(rough.split(64), queries.split(64), index.split(64), strict=True):
            fine = torch.einsum("md,mkd->mk", query.double(), bank[near].double())
            error = max(error, (fine - part).abs().max().item())
            parts.append(_similarity_key(fine, near, n).topk(k, dim=1).values)
        values, index = _split_key(torch.cat(parts), n)
        if m < n:  # the last candidate bounds what was left out
            doubt = (values[:, -1] <= rough.min(1).values.double() + 2 * error).nonzero()[:, 0]
            if len(doubt):
                values[doubt], index[doubt] = _search_exact(bank, queries[doubt], k)
    return values, index


# ---------------------------------------------------------------------------------------------------- votes


def _checked(what: str, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Features N D and labels N as tensors; ValueError for what would be compared or counted wrongly."""
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        shapes = f"got {list(x.shape)} and {list(y.shape)}"
        raise ValueError(f"{what}: features N x D and a label for each of the N expected, {shapes}")
    if y.is_floating_point() or y.dtype == torch.bool or (len(y) and y.min() < 0):
        raise ValueError(f"{what}: class ids from 0 on expected as labels, got {y}")
    if len(x) and not (x.amin().isfinite() and x.amax().isfinite()):
        raise ValueError(f"{what}: finite features expected, {int((~x.isfinite()).any(1).sum())} of {len(x)} are not")
    return x, y.long()


def knn_correct(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    backend: str = "auto",
) -> Tensor:
    """Whether each test image is classified rightly, for each k: bool len(ks) M. See knn_accuracy."""
    train_x, train_y = _checked("train", train_x, train_y)
    test_x, test_y = _checked("test", test_x, test_y)
    if not len(train_x) or not len(ks) or min(ks) < 1:
        raise ValueError(f"a bank of at least one feature and ks of at least 1 expected, got {len(train_x)}, {ks}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if train_x.shape[1] != test_x.shape[1]:
        sizes = f"{train_x.shape[1]} in train and {test_x.shape[1]} in test"
        raise ValueError(f"features of equal size expected, got {sizes}")
    if max(ks) > len(train_x):
        say(f"knn: k is capped at the {len(train_x)} images of the bank")
    n_classes = int(max(train_y.max(), test_y.max() if len(test_y) else 0)) + 1
    if not len(test_x):
        return torch.zeros(len(ks), 0, dtype=torch.bool)
    bank, queries = normalize(train_x.float(), dim=1), normalize(test_x.float(), dim=1)
    similarity, index = search(bank, queries, min(max(ks), len(bank)), backend)  # M k
    near, truth = train_y.to(index.device)[index], test_y.to(index.device)
    correct = torch.empty(len(ks), len(test_x), dtype=torch.bool)
    for start in range(0, len(test_x), 1024):
        rows = slice(start, start + 1024)
        weight = (similarity[rows] / temperature).sub(similarity[rows, :1] / temperature).exp()  # m k, largest is 1
        vote = weight[..., None] * one_hot(near[rows], n_classes) if n_classes <= 16 else None
        for row, k in enumerate(ks):
            if vote is not None:
                total = vote[:, :k].sum(1)  # m classes
            else:
                total = torch.zeros(len(weight), n_classes, dtype=torch.float64, device=weight.device)
                total.scatter_add_(1, near[rows, :k], weight[:, :k])
            correct[row, rows] = (total.argmax(1) == truth[rows]).cpu()
    return correct


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    backend: str = "auto",
) -> dict[int, float]:
    """Top-1 in percent for each k. train_x N D, test_x M D: features; train_y N, test_y M: class ids.

    Features are L2-normalised; a neighbour votes exp(cosine / temperature); one search serves all ks. A k
    above N uses all N and keeps its key. backend: auto (FAISS where it can be imported) | faiss | torch.
    """
    correct = knn_correct(train_x, train_y, test_x, test_y, ks, temperature, backend)
    return {k: 100.0 * row.double().mean().item() for k, row in zip(ks, correct, strict=True)}


def sharded_correct(
    bank: Features,
    test: Features,
    kind: str,
    ks: Sequence[int],
    temperature: float,
    backend: str,
    accelerator: "Accelerator",
    device: torch.device,
) -> Tensor:
    """knn_correct of features of one kind, M len(ks), on every process: each searches for every world-th query."""
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    x, queries = bank.x[kind].to(device), test.x[kind][mine].to(device)
    correct = knn_correct(x, bank.y, queries, test.y[mine], ks, temperature, backend)
    return gather_rows(correct.T.contiguous(), len(test.y), accelerator)


# ---------------------------------------------------------------------------------------------------- program


def judge(inputs: Inputs, cfg: KnnConfig) -> dict[str, Any]:
    """kNN of one backbone: "metrics", "notes", and "correct" and "index" of the test images."""
    accelerator, kind = inputs.accelerator, cfg.features
    bank, test = inputs.features(inputs.train, (kind,)), inputs.features(inputs.test, (kind,))
    ks, n = sorted(set(cfg.ks)), len(bank.y)
    how = (ks, cfg.temperature, cfg.eval.backend, accelerator, accelerator.device)
    correct = sharded_correct(bank, test, kind, *how)  # M k
    notes = {
        "protocol": f"weighted kNN, cosine, votes exp(s/{cfg.temperature:g}), exact search",
        "features": kind,
        "neighbours": {str(k): min(k, n) for k in ks},
        "n_train": n,
        "n_test": len(test.y),
        "n_bad": test.n_bad,
    }
    metrics = {f"knn/top1@{k}": 100.0 * correct[:, i].double().mean().item() for i, k in enumerate(ks)}
    first = ks.index(20) if 20 in ks else 0  # the k that published figures use
    paired = {"paired": f"knn/top1@{ks[first]}", "correct": correct[:, first], "index": test.index}
    return {"metrics": metrics, "notes": notes, **paired}


def run(cfg: KnnConfig, accelerator: "Accelerator") -> dict[str, Any]:
    """Classifies the test split by its neighbours in train, writes knn.json and returns what it holds."""
    if cfg.eval.backend == "faiss" and _import_faiss() is None:
        raise UserError("eval.backend=faiss: faiss cannot be imported; install faiss-gpu or faiss-cpu, or use torch")
    return evaluate("knn", cfg, accelerator, judge)


def main(argv: list[str]) -> None:
    program(KnnConfig, run, argv)


if __name__ == "__main__":
    from gcssl.runtime import entry

    entry(main)
