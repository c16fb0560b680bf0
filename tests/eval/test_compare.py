"""Two result files: which images each got right comes back from the bits, and other test images are refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gcssl.errors import UserError
from gcssl.eval.compare import compare, main
from gcssl.eval.metrics import mcnemar, percent
from gcssl.eval.results import packed, unpacked


def written(path: Path, correct: Tensor, fingerprint: str = "x", metric: str = "knn/top1@20") -> Path:
    judged = {"paired": metric, "correct": correct, "index": torch.arange(len(correct))}
    result = {"test_split": "test", "test_fingerprint": fingerprint, metric: percent(correct)}
    result["correct"] = packed(judged, len(correct))
    path.write_text(json.dumps(result))
    return path


@pytest.mark.parametrize("n", [1, 8, 13])
def test_bits_come_back_and_undecodable_images_are_wrong(n: int) -> None:
    correct = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    whole = packed({"paired": "m", "correct": correct, "index": torch.arange(n)}, n)
    assert torch.equal(unpacked(whole), correct) and len(whole["bits"]) == 2 * -(-n // 8)
    part = packed({"paired": "m", "correct": torch.ones(n - 1, dtype=torch.bool), "index": torch.arange(1, n)}, n)
    assert unpacked(part).tolist() == [False] + [True] * (n - 1)


def test_two_results_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = torch.arange(100) < 60, (torch.arange(100) >= 20) & (torch.arange(100) < 70)
    files = written(tmp_path / "a", a), written(tmp_path / "b", b)
    with pytest.raises(UserError, match="given twice; expected the results of two"):
        compare(files[0], tmp_path / "." / "a")
    assert compare(*files) == {"a": 60.0, "b": 50.0, **mcnemar(a, b)}
    main([str(file) for file in files])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[1:] == ["60.00", "20"] and lines[2].split()[1:] == ["50.00", "10"]
    assert lines[3] == "McNemar's exact test: p = 0.099"


def test_the_printed_top1_is_the_results_own_where_an_image_could_not_be_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "a", torch.tensor([True, True, False, False]))
    result = json.loads(file.read_text())
    file.write_text(json.dumps({**result, "knn/top1@20": 66.7, "n_bad": 1}))  # of three images of four
    other = written(tmp_path / "b", torch.tensor([True, True, False, False]))
    assert compare(file, other)["a"] == 66.7
    (told,) = capsys.readouterr().out.splitlines()
    assert told == f"{file}: 1 images could not be decoded: its top-1 leaves them out, the test counts them as wrong"


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    a = written(tmp_path / "a", torch.ones(3, dtype=torch.bool))
    other = written(tmp_path / "b", torch.ones(3, dtype=torch.bool), fingerprint="y")
    with pytest.raises(UserError, match="b: judged on other images"):
        compare(a, other)
    top5 = written(tmp_path / "c", torch.ones(3, dtype=torch.bool), metric="linear/top1")
    with pytest.raises(UserError, match="linear/top1 cannot be paired with knn/top1@20"):
        compare(a, top5)
    old = tmp_path / "old"
    old.write_text('{"knn/top1@20": 3.0}')
    damaged = tmp_path / "damaged"
    damaged.write_text(a.read_text().replace('"bits": "', '"bits": "zz'))
    for bad, why in (
        (old, "evaluate again"), (tmp_path / "none", "none: no such file"), (Path(__file__), "no result"),
        (damaged, "damaged: no result of an evaluation"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why):
            compare(a, bad)
    with pytest.raises(UserError, match="given 1 files, expected two"):
        main([str(a)])
