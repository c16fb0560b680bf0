"""What a resume reads back: the loss scale that goes with the checkpoint, and none of an earlier fit; incidents."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gcssl.checkpoint import save_checkpoint
from gcssl.config import RuntimeConfig, TrainConfig
from gcssl.errors import NumericStop, outcome
from gcssl.models.build import build_backbone
from gcssl.runtime import make_accelerator
from gcssl.state import RunState


def state(folder: Path, scale: float) -> RunState:
    accelerator = make_accelerator(TrainConfig(), RuntimeConfig())
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    model = nn.Module()
    model.encoder = build_backbone("gcvit_nano", 64)
    run: Any = Namespace(path=folder, step=0, is_main=True)
    return RunState(run, model, torch.optim.SGD(model.parameters()), accelerator, {})


def test_the_loss_scale_is_that_of_the_checkpoint_or_a_new_one(tmp_path: Path) -> None:
    first = state(tmp_path, scale=4.0)
    assert first.resume() == 0
    assert first.accelerator.scaler.get_scale() == 2.0**16  # torch's own, not that of an earlier fit
    save_checkpoint(tmp_path, 3, *state(tmp_path, scale=8.0).snapshot(), keep=2)
    again = state(tmp_path, scale=4.0)
    assert again.resume() == 3 and again.accelerator.scaler.get_scale() == 8.0


@pytest.mark.fault(
    "an incident that cannot be written",
    "said in one line; still exit 78 with the reason",
)
def test_an_incident_that_cannot_be_written_still_ends_in_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "incidents").write_text("a file where the folder should be")
    with pytest.raises(NumericStop, match="loss is nan") as stop:
        state(tmp_path, scale=4.0).give_up(3, "loss is nan", [])
    (line,) = capsys.readouterr().out.splitlines()
    assert outcome(stop.value)[1] == 78 and "incidents/after_step_3: not written:" in line
