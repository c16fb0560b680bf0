"""Counting, the paired test, and the result file that overwrites nothing silently."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gcssl.errors import UserError
from gcssl.eval.metrics import (
    check_result,
    comparison,
    mcnemar,
    percent,
    rankme,
    settings_of,
    table,
    topk_correct,
    write_result,
)


def test_topk_counts_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.4], [math.nan, 0.0, 1.0]])
    got = topk_correct(scores, torch.tensor([1, 2, 0]), (1, 2, 5))
    assert got[1].tolist() == [True, False, False]
    assert got[2].tolist() == [True, True, False]  # a score that is not a number is never the highest
    assert got[5].all()  # five of three classes are all
    assert percent(got[1]) == pytest.approx(100 / 3)


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


def test_two_backbones_are_paired_only_on_the_same_images() -> None:
    def judged(*index: int) -> dict[str, Any]:
        correct = torch.ones(len(index), dtype=torch.bool)
        return {"metrics": {}, "notes": {}, "paired": "m", "index": torch.tensor(index), "correct": correct}

    assert "mcnemar" in comparison("random", judged(0, 2), judged(0, 2))
    assert "mcnemar" not in comparison("random", judged(0, 2), judged(0, 1))  # another one could not be decoded


def test_a_result_is_replaced_only_by_one_of_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "run" / "eval" / "knn.json"
    settings = {"backbone": "a", "ks": [10, 20]}
    write_result(path, {"knn/top1@20": 1.0}, settings)
    write_result(path, {"knn/top1@20": 2.0}, settings)
    result = json.loads(path.read_text())
    assert result["knn/top1@20"] == 2.0 and result["made_by"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert result["made_by"].keys() == {"commit", "versions", "processes", "hardware"}
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"ks: \[10, 20\] there, \[10\] asked.*name="):
        write_result(path, {"knn/top1@20": 3.0}, {"backbone": "a", "ks": [10]})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["knn.json"]  # no temporary file stays


def test_a_comparison_may_be_added_but_not_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "knn.json"
    write_result(path, {"knn/top1@20": 1.0}, {"compare": None})
    write_result(path, {"knn/top1@20": 1.0}, {"compare": "random"})
    with pytest.raises(UserError, match="compare: random there, null asked"):
        check_result(path, {"compare": None})


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "knn.json"
    path.write_text("mine")
    with pytest.raises(UserError, match="name="):
        check_result(path, {})
    assert path.read_text() == "mine"


def test_settings_leave_out_what_does_not_change_the_numbers() -> None:
    config = {
        "ks": [10],
        "backbone": "runs/a/",
        "out": "x",
        "batch_size": 4,
        "data": {"path": "p", "workers": 3},
        "runtime": {"timeout": 1},
    }
    assert settings_of(config) == {"ks": [10], "backbone": "runs/a", "data.path": "p"}


def test_table_is_aligned() -> None:
    lines = table([["", "run"], ["knn/top1@20", 5.0], ["n", 12.345]])
    assert lines == ["               run", "knn/top1@20   5.00", "n            12.35"]


def test_rankme_counts_directions() -> None:
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(32, 5)).Q.T  # 5 orthonormal rows
    assert rankme(torch.randn(4096, 5) @ directions) == pytest.approx(5.0, abs=0.05)
    assert rankme(torch.ones(100, 8)) == pytest.approx(1.0, abs=1e-3)
    x = torch.randn(50, 8)
    p = torch.linalg.svdvals(x.double())
    p = p / p.sum()
    assert rankme(x) == pytest.approx(torch.exp(-(p * p.log()).sum()).item(), rel=1e-4)
