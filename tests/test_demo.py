"""The demo removes an earlier demo, and nothing else."""

from pathlib import Path

import pytest

from gcssl.errors import UserError
from scripts.demo import MARK, clear


def test_only_a_demo_is_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text("{}")
    with pytest.raises(UserError, match="holds something else than a demo"):
        clear(run)
    assert [file.name for file in run.iterdir()] == ["status.json"]
    with pytest.raises(UserError, match="status.json is a file"):
        clear(run / "status.json")
    demo = tmp_path / "demo"
    clear(demo)
    (demo / "status.json").write_text("{}")
    clear(demo)
    assert [file.name for file in demo.iterdir()] == [MARK]
