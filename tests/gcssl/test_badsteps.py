"""Steps that must not count: what is bad, that nothing is left of it, what a run that ends on them leaves."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from gcssl.badsteps import WINDOW, BadSteps
from gcssl.config import PretrainConfig, RuntimeConfig, TrainConfig, load_config
from gcssl.errors import NumericStop
from gcssl.pretrain import pretrain
from gcssl.runtime import make_accelerator
from gcssl.ssl.objectives import OBJECTIVES, SCHEMAS

YAML = Path(__file__).parents[2] / "configs/pretrain"
TINY = [
    "data.shapes_n=16", "data.workers=0", "train.batch_size=8", "train.warmup_epochs=0", "log.every=1",
    "log.trackers=[]", "eval.online_every=0", "checkpoint.every=0.5",
]  # fmt: skip


def values(loss: float, finite: bool = True) -> dict[str, float]:
    return {"loss": loss, "grad_norm": 1.0, "finite": finite}


def judge(tmp_path: Path, **train: Any) -> BadSteps:
    return BadSteps(tmp_path, TrainConfig(**train), nn.Identity())


def noisy(i: int) -> float:
    return 1.0 + 0.01 * math.sin(i)  # standard deviation 0.007


@pytest.mark.fault(
    "a loss six deviations above the last 128",
    "the step is skipped; a fall is not",
)
def test_a_spike_is_measured_against_the_last_losses(tmp_path: Path) -> None:
    steps = judge(tmp_path)
    assert steps.judge(values(1e9)) == ""  # there is nothing to measure it against
    assert not any(steps.judge(values(noisy(i))) for i in range(WINDOW))
    assert steps.judge(values(1.03)) == ""  # four deviations
    resumed = judge(tmp_path)
    resumed.load_state_dict(json.loads(json.dumps(steps.state_dict())))
    assert steps.judge(values(1.06)).startswith("loss 1.06: above 1.00")
    assert resumed.judge(values(1.06)).startswith("loss 1.06: above 1.00")
    assert steps.judge(values(0.2)) == ""  # a fall is welcome
    off = judge(tmp_path, spike_sigma=None)
    assert not any(off.judge(values(noisy(i))) for i in range(WINDOW)) and off.judge(values(1e9)) == ""


def test_a_new_level_is_soon_the_normal_one(tmp_path: Path) -> None:
    """Before as many steps were skipped as stop a run."""
    steps = judge(tmp_path)
    for i in range(WINDOW):
        steps.judge(values(noisy(i)))
    skipped = [bool(steps.judge(values(2 + noisy(i)))) for i in range(20)]
    assert skipped[0] and sum(skipped) < TrainConfig().max_bad_steps and not any(skipped[5:])


def test_only_a_good_step_ends_a_row_of_bad_ones(tmp_path: Path) -> None:
    steps = judge(tmp_path)
    for i in range(WINDOW):
        steps.judge(values(noisy(i)))
    steps.in_a_row = [{"step": 1}]
    assert steps.judge(values(9.0)) and steps.judge(values(math.nan, finite=False)) and steps.in_a_row
    assert not steps.judge(values(1.0)) and not steps.in_a_row


def test_batch_norms_are_put_back_after_a_model_was_moved(tmp_path: Path) -> None:
    """Accelerate moves a model to the device it is on, cpu:0, which replaces its buffers."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    bad_steps = BadSteps(tmp_path, TrainConfig(), model)
    assert len(bad_steps.buffers) == 6
    model.to("cpu:0")
    bad_steps.begin()
    model(torch.randn(8, 2) + 3)
    assert model[0].running_mean.min() > 0.1
    assert [b.data_ptr() for b in bad_steps.running()] == [b.data_ptr() for b in list(model[0].buffers())[:2]]
    bad_steps.skip(1, "nan", [torch.tensor([0])], make_accelerator(TrainConfig(), RuntimeConfig()))
    assert not model[0].running_mean.any() and model[0].num_batches_tracked == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.0])
def test_what_is_not_finite_is_bad_and_measures_nothing(tmp_path: Path, loss: float) -> None:
    steps = judge(tmp_path)
    assert "not finite" in steps.judge(values(loss, finite=False))
    assert steps.losses == []


def config(objective: str, out: Path, *more: str) -> PretrainConfig:
    argv = [str(YAML / f"{objective}_gcvit_nano.yaml"), *TINY, f"out={out}", *more]
    return load_config(PretrainConfig, argv, SCHEMAS)


def poison(monkeypatch: pytest.MonkeyPatch, objective: str, bad: Callable[[int], bool]) -> None:
    """The loss of every step that `bad` names (from 1) is not a number, and so each gradient."""
    cls = OBJECTIVES[objective][0]
    forward = cls.forward

    def poisoned(self: Any, batch: dict[str, Any], step: int) -> dict[str, Any]:
        out = forward(self, batch, step)
        if bad(step + 1):
            out["loss"] = out["loss"] * math.nan
            if "_parts" in out:
                out["_parts"] = {name: loss * math.nan for name, loss in out["_parts"].items()}
        return out

    monkeypatch.setattr(cls, "forward", poisoned)


def checkpoint(out: Path, step: int) -> dict[str, torch.Tensor]:
    folder = out / f"checkpoints/step_{step:08d}"
    return {
        f"{kind}.{k}": v
        for kind in ("model", "optimizer")
        for k, v in load_file(folder / f"{kind}.safetensors").items()
    }


def listed(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]


SMALL_HEADS = {
    "simmim": ["model.name=test_resnet", "model.window_ratio=null", "objective.mask_unit=32"],  # batch norms inside
    "moby": ["objective.queue=32"],
    "dino": ["objective.freeze_last_layer_epochs=0"],
    "joint": ["objective.balance=true"],
}


@pytest.mark.parametrize("objective", SMALL_HEADS)
@pytest.mark.fault(
    "a step whose loss is not a number",
    "parameters, optimizer, teacher, queue, centre, batch norms as before it",
)
def test_nothing_is_left_of_a_bad_step(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, optimizer, teacher, queue, centre, scales and batch norms are those before it, and go on after it."""
    monkeypatch.setattr("gcssl.ssl.joint.BALANCE_EVERY", 2)  # the bad step measures, the one after it does not
    poison(monkeypatch, objective, lambda step: step == 3)
    keys = ["train.steps=5", "checkpoint.keep=4", *SMALL_HEADS[objective]]
    out = pretrain(config(objective, tmp_path, *keys))
    before, after, later, end = (checkpoint(out, step) for step in (2, 3, 4, 5))
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert not different
    if objective == "simmim":
        assert any("running_mean" in name for name in before)
    moved = {name for name in before if not torch.equal(after[name], later[name])}
    assert len(moved) > len(before) / 2 and all(v.isfinite().all() for v in end.values())
    (bad,) = listed(out)
    assert bad["step"] == 3 and "not finite" in bad["reason"] and len(set(bad["indices"])) == 8
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in told] == [0, 0, 1, 1, 1]
    assert [line["loss"] is None for line in told] == [0, 0, 1, 0, 0]


def scale_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 as it is on a GPU but for the precision: a loss scaler, and no fused optimizer."""

    monkeypatch.setattr("gcssl.pretrain.check_accelerator", lambda *_: None)  # it is made for fp32

    def scaling(train: TrainConfig, runtime: RuntimeConfig) -> Accelerator:
        accelerator = make_accelerator(dataclasses.replace(train, precision="fp32"), runtime)
        accelerator.scaler = torch.amp.GradScaler("cpu")

        def unscale() -> None:
            for optimizer in accelerator._optimizers:
                accelerator.scaler.unscale_(optimizer.optimizer)

        accelerator.unscale_gradients = unscale
        return accelerator

    monkeypatch.setattr("gcssl.pretrain.make_accelerator", scaling)


def scale_after(out: Path, step: int) -> float:
    return json.loads((out / f"checkpoints/step_{step:08d}/state.json").read_text())["scaler"]["scale"]


@pytest.mark.parametrize("objective", ["moby", "dino"])
@pytest.mark.fault(
    "a gradient that overflows under a loss scale",
    "parameters, optimizer, teacher, queue, centre as before it",
)
def test_a_step_that_the_loss_scaler_skips_moves_no_teacher_queue_or_centre(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is finite, so it is no bad step: batch norms have seen it, as in torch."""
    cls = OBJECTIVES[objective][0]
    forward = cls.forward

    def overflowing(self: Any, batch: dict[str, Any], step: int) -> dict[str, Any]:
        out = forward(self, batch, step)
        if step + 1 == 3:
            out["loss"].register_hook(lambda grad: grad * math.inf)
        return out

    monkeypatch.setattr(cls, "forward", overflowing)
    scale_losses(monkeypatch)
    keys = ["train.precision=fp16", "train.steps=5", "checkpoint.keep=4", *SMALL_HEADS[objective]]
    out = pretrain(config(objective, tmp_path, *keys))
    before, after, later = (checkpoint(out, step) for step in (2, 3, 4))
    norms = ("running_mean", "running_var", "num_batches_tracked")
    assert not [name for name in before if not torch.equal(before[name], after[name]) and not name.endswith(norms)]
    moved = {name.split(".")[1] for name in before if not torch.equal(after[name], later[name])}
    assert moved >= {"encoder", "teacher", "queue" if objective == "moby" else "center"}
    assert scale_after(out, 3) == scale_after(out, 2) / 2 and not (out / "bad_steps.jsonl").exists()


def test_a_bad_step_under_a_loss_scaler_lowers_the_scale_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler refuses to unscale the next gradients unless it is told that this step is over."""
    poison(monkeypatch, "simmim", lambda step: step == 2)
    scale_losses(monkeypatch)
    out = pretrain(config("simmim", tmp_path, "train.precision=fp16", "train.steps=3", "checkpoint.keep=3"))
    assert [bad["step"] for bad in listed(out)] == [2]
    assert scale_after(out, 3) == scale_after(out, 2) == scale_after(out, 1) / 2


@pytest.mark.fault(
    "bad steps in a row, with a resume between",
    "exit 78; the incident folder goes on from before the first",
)
def test_bad_steps_in_a_row_stop_the_run_and_leave_what_led_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 2 to 4; a resume between them counts on; the incident's own folder goes on where the first began."""
    keys, out = ["train.steps=6", "train.max_bad_steps=3"], tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, "simmim", lambda step: step >= 2)
        with pytest.raises(NumericStop, match="step 3"):
            pretrain(config("simmim", out, *keys, "train.max_bad_steps=2"))
        with pytest.raises(NumericStop, match=r"step 4: 3 steps in a row were skipped.*incidents/after_step_1"):
            pretrain(config("simmim", out, *keys))
    assert [bad["step"] for bad in listed(out)] == [2, 3, 4]
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 78)
    incident = out / "incidents/after_step_1"
    told = json.loads((incident / "incident.json").read_text())
    assert told["step"] == 1 and told["steps"] == listed(out)
    healthy = pretrain(config("simmim", tmp_path / "healthy", "train.steps=6"))
    pretrain(config("simmim", incident, *keys))
    assert (incident / "backbone.safetensors").read_bytes() == (healthy / "backbone.safetensors").read_bytes()
    assert "resumed from step_00000001" in capsys.readouterr().out
