"""Nothing that happens to the streams ends a program: real ones, closed, full, or without a reader."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, time
from gcssl.log import say
from gcssl.runtime import entry
def main(argv):
    for i in range(400):
        say("a line " * 40)
        print("progress " * 40, file=sys.stderr, flush=True)
    open(argv[0], "w").write("done")
entry(main)
"""


@pytest.mark.fault("standard output or error closed, full, or without a reader", "the run goes on")
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full", "2>&1 | head -n 1"])
def test_a_program_outlives_its_streams(streams: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = f'set -o pipefail; "$0" -c "$1" "$2" {streams}'
    argv = ["bash", "-c", command, sys.executable, PROGRAM, str(out)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert out.read_text() == "done" and done.returncode == 0 and "Traceback" not in done.stderr + done.stdout
