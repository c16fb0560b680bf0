"""Every objective learns: a few minutes of CPU on the generated images lift it above a recorded line.

make test-learning       (minutes each; nightly, not in CI)
"""

from pathlib import Path

import pytest

from scripts.learning import LINES, learn

pytestmark = pytest.mark.learning


@pytest.mark.parametrize("name", LINES)
def test_it_learns(name: str, tmp_path: Path) -> None:
    result = learn(name, tmp_path / name)
    for key, least in LINES[name].items():
        gain = result[key] - result["untrained"][key]
        assert gain >= least, (
            f"{name}: {key} {result[key]:.1f}, untrained {result['untrained'][key]:.1f}, line {least:+}"
        )
