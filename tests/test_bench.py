"""`make bench`: one page of all benchmarks, of which a part can be measured again."""

import json
from pathlib import Path

import pytest

from gcssl.errors import UserError
from scripts import bench


@pytest.mark.slow
def test_a_benchmark_measured_again_replaces_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = tuple(f"bench_input --pipelines one --images {n} --rounds 1" for n in (2, 3))
    monkeypatch.setattr(bench, "COMMANDS", commands)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    bench.main(["images 3"])
    bench.main(["images 2"])
    path = Path(capsys.readouterr().out.splitlines()[-1])
    page, rows = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert [row["command"] for row in rows] == list(commands)
    assert page.index("images 2 --rounds 1") < page.index("images 3 --rounds 1") and "| one | gcssl |" in page
    assert all(row["rows"] and row["versions"]["torch"] and "host" not in row["hardware"] for row in rows)
    monkeypatch.setattr(bench, "COMMANDS", commands[1:])  # what is no longer run stays on the page
    bench.main(["images 3"])
    assert len(json.loads(path.with_suffix(".json").read_text())) == 2
    with pytest.raises(UserError, match="no such benchmark; expected a word of bench_input"):
        bench.main(["modle"])
