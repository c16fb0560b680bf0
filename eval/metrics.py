"""What an evaluation counts: top-k, the paired test of two models, the rank of features."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def best(scores: Tensor, k: int = 5) -> Tensor:
    """The k highest scores (all, where there are fewer) and their classes: N C -> N 2 k float32, the highest first.

    What is kept of logits: those of half a million images and ten thousand classes are 22 GB.
    """
    return torch.stack(scores.float().topk(min(k, scores.shape[1]), dim=1), 1)


def hits(top: Tensor, labels: Tensor, ks: Iterable[int] = (1, 5)) -> dict[int, Tensor]:
    """{k: bool N}, true where the label is among the k highest; top N 2 K, as `best` gives it, labels N."""
    found = top[:, 1].long() == labels[:, None]  # N K
    return {k: found[:, :k].any(1) for k in ks}


def percent(correct: Tensor) -> float:
    """Share of true values, in percent; correct N bool."""
    if not len(correct):
        raise ValueError("no predictions to count")
    return 100.0 * correct.double().mean().item()


def rankme(x: Tensor) -> float:
    """Effective rank of features N C (RankMe, arXiv:2210.02885, equation 1): e^entropy of the normalised singular
    values; between 1 and min(N, C).
    """
    products = sum(part.double().T @ part.double() for part in x.split(65_536))  # C C
    eigenvalues = torch.linalg.eigvalsh(products)  # the squares of the singular values
    p = eigenvalues.clamp(min=0).sqrt()
    p = p / p.sum() + 1e-7
    return math.exp(-(p * p.log()).sum().item())


def mcnemar(correct_a: Tensor, correct_b: Tensor) -> dict[str, float | int]:
    """McNemar's exact paired test of two models on the same images (Psychometrika 1947, binomial form).

    correct_a, correct_b: N bool. Returns how many images only a, and only b, gets right, and the two-sided
    p-value of that split if both were equally good.
    """
    if correct_a.shape != correct_b.shape:
        raise ValueError(f"paired results of equal length expected, got {correct_a.shape} and {correct_b.shape}")
    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((correct_b & ~correct_a).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    p = min(1.0, 2 * math.fsum(math.exp(x) for x in logs))
    return {"only_a": only_a, "only_b": only_b, "p": p}
