"""One step's scalars over micro-batches, and the list of bad files, also across a resume."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gcssl.config import RuntimeConfig, TrainConfig
from gcssl.errors import UserError
from gcssl.meter import BadSamples, Meter
from gcssl.runtime import make_accelerator


@pytest.fixture(scope="module")
def accelerator():
    return make_accelerator(TrainConfig(), RuntimeConfig())


def test_means_over_micro_batches_and_flags(accelerator) -> None:
    meter = Meter(accelerator)
    for micro, loss in enumerate((1.0, 3.0)):
        assert meter.micro == micro
        meter.add({"loss": torch.tensor(loss), "accuracy": torch.tensor(0.5), "_parts": {"private": 1}})
    values = meter.reduce(torch.tensor(2.0), stop=False)
    expected = {"loss": 2.0, "accuracy": 0.5, "grad_norm": 2.0, "finite": True, "stop": False, "bad": False}
    assert values == expected and meter.micro == 0


def test_a_step_names_the_images_of_all_its_micro_batches(accelerator) -> None:
    meter = Meter(accelerator)
    for step in range(2):
        for first in (0, 2):
            meter.note({"index": torch.arange(first, first + 2) + 10 * step, "bad": []})
            meter.add({"loss": torch.tensor(1.0)})
        assert torch.cat(meter.indices).tolist() == [10 * step + i for i in range(4)]
        meter.reduce(torch.tensor(1.0), stop=False)


def test_waiting_is_measured_but_for_the_first_batch(accelerator) -> None:
    def loader() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.05)
            yield i

    meter, waits = Meter(accelerator), []
    for _ in meter.waiting(loader()):
        waits.append(meter.take_wait())
    assert meter.take_wait() >= 0.0 and meter.take_wait() == 0.0  # each wait is of one step
    assert waits[0] == 0.0 and min(waits[1:]) >= 0.049  # a sleep of 0.05 is never shorter


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_what_is_not_finite_stop_and_bad_are_told(accelerator, loss: float, norm: float) -> None:
    meter = Meter(accelerator)
    for value in (1.0, loss):
        meter.add({"loss": torch.tensor(value)})
    meter.bad.append((0, "a.png", "broken"))
    values = meter.reduce(torch.tensor(norm), stop=True)
    assert (values["finite"], values["stop"], values["bad"]) == (False, True, True)
    assert meter.take_bad() == [(0, "a.png", "broken")] and meter.bad == []


def test_a_loss_scaler_answers_for_infinite_gradients_until_its_scale_is_1(accelerator, monkeypatch) -> None:
    finite = {}
    for scale in (2.0, 1.0):
        monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=scale))
        accelerator.scaler.scale(torch.ones(1))  # sets the scale up
        meter = Meter(accelerator)
        meter.add({"loss": torch.tensor(1.0), "grad_norm/simmim": torch.tensor(float("inf"))})  # taken at that scale
        finite[scale] = meter.reduce(torch.tensor(float("nan")), stop=False)["finite"]
    assert finite == {2.0: True, 1.0: False}


def listed(folder: Path) -> list[int]:
    return [json.loads(line)["index"] for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def test_a_bad_file_that_is_listed_is_no_news(accelerator) -> None:
    """Telling of it costs a message between all processes."""
    listed = {3}
    meter = Meter(accelerator, listed)
    for index, news in ((3, False), (5, True), (5, True)):
        meter.note({"index": torch.tensor([index]), "bad": [(index, "a.jpg", "broken")]})
        meter.add({"loss": torch.tensor(1.0)})
        assert meter.reduce(torch.tensor(1.0), False)["bad"] is news
        meter.take_bad()
    listed.add(5)  # as BadSamples does
    meter.note({"index": torch.tensor([5]), "bad": [(5, "a.jpg", "broken")]})
    assert not meter.take_bad()


def test_each_bad_file_is_listed_once(accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = BadSamples(tmp_path, 9, 100, 0.03)
    bad.record(3, [(5, "e.png", "broken"), (2, "b.png", "broken"), (5, "e.png", "broken")], accelerator)
    assert listed(tmp_path) == [2, 5] and "b.png (broken)" in capsys.readouterr().out
    again = BadSamples(tmp_path, 9, 100, 0.03)  # a resume
    again.record(9, [(5, "e.png", "broken"), (7, "g.png", "broken")], accelerator)
    assert listed(tmp_path) == [2, 5, 7] and capsys.readouterr().out == ""
    again.summarise()
    assert "3 of 100 images cannot be decoded and were replaced" in capsys.readouterr().out
    with pytest.raises(UserError, match="data.max_bad=0.03: 4 of 100"):
        again.record(9, [(9, "i.png", "broken")], accelerator)


def test_what_was_met_after_the_step_that_a_run_goes_on_from_is_met_again(accelerator, tmp_path: Path) -> None:
    bad = BadSamples(tmp_path, 0, 100, 1.0)
    bad.record(3, [(2, "b.png", "broken")], accelerator)
    bad.record(5, [(4, "d.png", "broken")], accelerator)
    again = BadSamples(tmp_path, 4, 100, 1.0)
    assert again.seen == {2} and listed(tmp_path) == [2]


def test_a_half_written_line_is_dropped(accelerator, tmp_path: Path) -> None:
    BadSamples(tmp_path, 9, 100, 1.0).record(3, [(2, "b.png", "broken")], accelerator)
    with (tmp_path / "bad_samples.jsonl").open("a") as file:
        file.write('{"index": 3, "pa')
    BadSamples(tmp_path, 9, 100, 1.0).record(4, [(3, "c.png", "broken")], accelerator)
    assert listed(tmp_path) == [2, 3]
