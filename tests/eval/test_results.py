"""The result file, which overwrites nothing silently."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gcssl.errors import Failure, UserError
from gcssl.eval import inputs
from gcssl.eval.results import check_result, comparison, settings_of, table, write_result


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


def test_a_result_of_other_weights_behind_the_same_path_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (100, 100, 200):
        write_result(tmp_path / "knn.json", {"step": step, "test_fingerprint": "a"}, {"backbone": "runs/a"})
        told = capsys.readouterr().out
        assert ("replaces" in told) == (step == 200), told
    assert "(step 100)" in told


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


def test_what_was_measured_is_told_also_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(inputs, "write_result", full)
    result = {"knn/top1@20": 12.34, "n_test": 5, "seconds": 1.0}
    cfg = SimpleNamespace(backbone="runs/a", compare=None)
    with pytest.raises(Failure, match="knn.json: cannot be written .No space left on device.; .* stands above"):
        inputs.report("knn", cfg, tmp_path / "knn.json", {}, result, main=True)
    assert "knn/top1@20   12.34" in capsys.readouterr().out
