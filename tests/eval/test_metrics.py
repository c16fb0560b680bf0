"""Counting, the paired test and the rank of features."""

import math

import pytest
import torch

from gcssl.eval.metrics import best, hits, mcnemar, percent, rankme


def test_topk_counts_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.4], [0.9, 0.0, 1.0]])
    top = best(scores)
    assert top.shape == (3, 2, 3)  # five of three classes are all
    assert top[0].tolist() == [pytest.approx([0.7, 0.2, 0.1]), [1, 2, 0]]
    got = hits(top, torch.tensor([1, 2, 0]), (1, 2, 5))
    assert got[1].tolist() == [True, False, False]
    assert got[2].tolist() == [True, True, True]
    assert got[5].all()
    assert percent(got[1]) == pytest.approx(100 / 3)


def test_of_many_classes_five_are_kept_with_their_numbers() -> None:
    scores = torch.arange(30_000).bfloat16()[None].float()
    scores[0, 29_999] = 1e6
    top = best(scores)
    assert top.shape == (1, 2, 5) and top[0, 1, 0] == 29_999
    assert best(torch.tensor([[0.0, math.nan, 1.0]]))[0, 0].isnan().any()  # which forward_all then refuses


def exact_p(only_a: int, only_b: int) -> float:
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (5, 5), (10, 2), (2, 10), (60, 31)])
def test_mcnemar_equals_the_binomial_sum(only_a: int, only_b: int) -> None:
    a = torch.tensor([True] * only_a + [False] * only_b + [True] * 7 + [False] * 3)
    b = torch.tensor([False] * only_a + [True] * only_b + [True] * 7 + [False] * 3)
    got = mcnemar(a, b)
    assert (got["only_a"], got["only_b"]) == (only_a, only_b)
    assert got["p"] == pytest.approx(exact_p(only_a, only_b))


def test_mcnemar_of_many_images_does_not_overflow() -> None:
    a = torch.arange(50_000) < 30_000
    assert mcnemar(a, ~a)["p"] == 0.0 or mcnemar(a, ~a)["p"] < 1e-300
    half = torch.arange(50_000) % 2 == 0
    assert mcnemar(half, ~half)["p"] == pytest.approx(1.0)


def test_rankme_counts_directions() -> None:
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(32, 5)).Q.T  # 5 orthonormal rows
    assert rankme(torch.randn(4096, 5) @ directions) == pytest.approx(5.0, abs=0.05)
    assert rankme(torch.ones(100, 8)) == pytest.approx(1.0, abs=1e-3)
    x = torch.randn(50, 8)
    p = torch.linalg.svdvals(x.double())
    p = p / p.sum()
    assert rankme(x) == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-4)
