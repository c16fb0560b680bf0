"""say, the progress lines, metrics.jsonl and TensorBoard, also across a resume."""

import contextlib
import fcntl
import io
import json
import os
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gcssl.log
from gcssl.log import RunLog, cut_after, say
from gcssl.runtime import quiet_libraries


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder: Path, first: int, last: int, total: int = 10, every: int = 2, trackers: tuple[str, ...] = ()) -> RunLog:
    log = RunLog(folder, total, first, every, trackers, enabled=True)
    for step in range(first + 1, last + 1):
        log.step(step, {"loss": 1.0 / step}, 8, data_wait=0.001)
    log.close()
    return log


def test_records_every_n_steps_and_the_last(tmp_path: Path) -> None:
    run(tmp_path, 0, 5, total=5)
    assert steps_of(tmp_path) == [2, 4, 5]
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert record["loss"] == 0.5 and record["images_per_s"] > 0 and 0 <= record["data_wait"]


def test_pauses_count_in_no_speed(tmp_path: Path) -> None:
    with RunLog(tmp_path, 2, 0, 1, (), enabled=True) as log:
        for step in (1, 2):
            log.step(step, {"loss": 1.0}, 1000)
            with log.pause():
                time.sleep(0.3)
        told = log.summary()
    speeds = [json.loads(line)["images_per_s"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert min(speeds) > 1000 / 0.3 and float(told.split("images in ")[1].split(" s:")[0]) < 0.3


def test_a_resume_drops_what_came_after_it_and_half_a_line(tmp_path: Path) -> None:
    run(tmp_path, 0, 8)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # killed while it wrote
    run(tmp_path, 4, 10)
    assert steps_of(tmp_path) == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("last", [b'{"step": 4, "loss": 1.0}', b'{"step": 4, "path": "caf\xc3'])
def test_a_last_line_without_its_end_is_no_line(last: bytes, tmp_path: Path) -> None:
    """What is appended later would run on from it; a name may be cut in the middle of a letter."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 2}\n' + last)
    cut_after(path, 8)
    assert path.read_bytes() == b'{"step": 2}\n'


def test_numbers_that_are_not_finite_stay_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, 1, 0, 1, (), enabled=True) as log:
        log.scalars(1, {"loss": float("nan"), "norm": float("inf")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "loss": None,
        "norm": None,
    }


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    run(tmp_path, 0, 8, trackers=("tensorboard",))
    time.sleep(1.01)  # files of one second and one process are read by their number as text, 10 before 9
    run(tmp_path, 4, 10, trackers=("tensorboard",))
    time.sleep(1.01)
    log = RunLog(tmp_path, 10, 10, 2, ("tensorboard",), enabled=True)
    log.images(10, {"original": torch.zeros(3, 3, 8, 8), "hidden": torch.ones(3, 3, 8, 8)})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [2, 4, 6, 8, 10]
    with Image.open(io.BytesIO(board.Images("reconstructions")[0].encoded_image_string)) as picture:
        assert picture.size == (24, 16)
        assert np.array_equal(np.asarray(picture)[:, 0, 0], [0] * 8 + [255] * 8)


def test_other_processes_write_and_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    log = RunLog(tmp_path, 2, 0, 1, ("tensorboard",), enabled=False)
    log.step(1, {"loss": 1.0}, 4)
    log.images(1, {"x": torch.rand(1, 3, 4, 4)})
    log.close()
    say("hello")
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    say("hello")
    assert capfd.readouterr() == ("hello\n", "")


def test_without_a_terminal_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    log = run(tmp_path, 0, 10)
    assert len(capfd.readouterr().err.splitlines()) == 1  # ten quick steps: only the last one
    assert log.summary().startswith("10 steps, 80 images in ")
    monkeypatch.setattr(gcssl.log, "PLAIN_SECONDS", 0.0)
    run(tmp_path, 0, 3)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("step 1/10, loss 1.0000, ")
    assert "img/s" in lines[0] and lines[0].endswith("left")


@pytest.mark.parametrize("columns", [100, 0])
def test_on_a_terminal_a_bar(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one without a width, as containers have, it would not be seen: lines."""
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    with os.fdopen(its, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        run(tmp_path, 0, 10)
    heard = b""
    with contextlib.suppress(OSError):  # Linux's end of a terminal
        while part := os.read(ours, 4096):
            heard += part
    os.close(ours)
    told = heard.decode()
    assert "10/10" in told and "loss 0.1000" in told and "img/s" in told
    assert ("100%|" in told) == bool(columns) and ("step 10/10" in told) == (not columns)


def test_tensorboard_starts_silently(tmp_path: Path) -> None:
    code = (
        "from gcssl.runtime import quiet_libraries; quiet_libraries()\n"
        "import sys; from pathlib import Path; from gcssl.log import RunLog\n"
        "RunLog(Path(sys.argv[1]), 1, 0, 1, ('tensorboard',), True).close()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("asked", [[], ["default"]])
def test_warnings_are_silent_unless_asked_for(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", asked)  # of -W and PYTHONWARNINGS
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        quiet_libraries()
        warnings.warn("told", stacklevel=1)
    assert bool(told) == bool(asked)


def test_a_finished_run_that_is_started_again_says_so(tmp_path: Path) -> None:
    run(tmp_path, 0, 10)
    assert run(tmp_path, 10, 10).summary() == "all 10 steps are done already"
