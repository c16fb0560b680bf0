import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import gcssl.collapse as collapse
from gcssl.collapse import CollapseWatch
from gcssl.config import AugmentConfig, PretrainConfig, load_config
from gcssl.errors import NumericStop, Preempted
from gcssl.models.gcvit import GCViT
from gcssl.pretrain import pretrain
from gcssl.ssl.base import Setup
from gcssl.ssl.joint import VIEW
from gcssl.ssl.objectives import OBJECTIVES, SCHEMAS

ROOT = Path(__file__).parents[2]
HEALTHY = {"feature_std": 0.04, "feature_rank": 7.0, "loss": 2.0, "teacher_entropy": 3.0, "prediction_std": 0.002}


def told(watch: CollapseWatch, values: dict[str, float], steps: int) -> list[str]:
    return [sign.told for _ in range(steps) for sign in watch.see(values)]


def test_a_healthy_run_is_left_alone() -> None:
    assert told(CollapseWatch({"loss": math.log(64)}), HEALTHY, 300) == []
    assert told(CollapseWatch({}), {"loss": 0.3}, 300) == []  # an objective without signs
    for near in (0.98, 1.02):  # a loss that has begun to fall
        assert told(CollapseWatch({"loss": 4.0}), {"loss": 4.0 * near}, 300) == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"feature_std": 0.004}, "feature_std 0.004"),
        ({"feature_rank": 1.05}, "feature_rank 1.05"),
        ({"prediction_std": 0.0004}, "prediction_std 0.0004.*all images get one prediction"),
        ({"teacher_entropy": 0.0}, "teacher_entropy 0 nats: the teacher gives each image one prototype"),
        ({"loss": math.log(64) * 0.995}, r"loss 4.138 stays at 4.159.*objective.teacher_temp \(0.02\)"),
    ],
)
def test_each_sign_alarms_once_after_its_patience(values: dict[str, float], text: str) -> None:
    watch = CollapseWatch({"loss": math.log(64)}, patience=5)
    assert told(watch, HEALTHY | values, 4) == []
    first = told(watch, HEALTHY | values, 20)
    assert len(first) == 1
    assert re.search(text, first[0])


def test_a_sign_that_goes_away_starts_anew() -> None:
    watch = CollapseWatch({}, patience=5)
    few = [{"feature_std": 0.001}] * 4
    assert not [sign for values in (*few, HEALTHY, *few) for sign in watch.see(values)]


def test_two_signs_of_one_step_are_both_told() -> None:
    assert len(told(CollapseWatch({}, patience=5), {"feature_std": 0.001, "feature_rank": 1.0}, 9)) == 2


def config(out: Path, *more: str) -> PretrainConfig:
    argv = ["data.shapes_n=48", "data.workers=0", "train.batch_size=16", "train.warmup_epochs=0", "train.steps=30"]
    argv += ["eval.online_every=0", "objective.out_dim=32", "objective.hidden_dim=32", "objective.local_crops=0"]
    argv += ["checkpoint.every=1", f"out={out}", *more]
    return load_config(PretrainConfig, [str(ROOT / "configs/pretrain/dino_gcvit_nano.yaml"), *argv], SCHEMAS)


@pytest.mark.fault(
    "a collapse",
    "named with its sign and cure; on_collapse=stop ends with exit 78",
)
def test_a_teacher_without_preference_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DINO with a teacher far too hot: its loss is ln K, and no learning would ever show it."""
    monkeypatch.setattr(collapse, "PATIENCE", 5)
    hot = ["objective.teacher_temp=50", "objective.student_temp=1", "train.blr=1e-5"]
    with pytest.raises(NumericStop, match=r"step \d+: collapse\? for 5 steps loss/view 3.46\d? stays at 3.466"):
        pretrain(config(tmp_path / "a", *hot, "train.on_collapse=stop"))
    status = json.loads((tmp_path / "a/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 78) and "collapse?" in status["reason"]
    pretrain(config(tmp_path / "b", *hot, "train.steps=8"))  # warns, and goes on
    assert capsys.readouterr().out.count("collapse? for 5 steps loss") == 1
    assert json.loads((tmp_path / "b/status.json").read_text())["state"] == "finished"
    monkeypatch.setattr(collapse, "PATIENCE", 2)
    for stop in (Preempted, NumericStop):  # a step a start: the count goes on
        with pytest.raises(stop):
            pretrain(config(tmp_path / "c", *hot, "train.on_collapse=stop", "train.max_hours=0"))


def test_a_masked_run_with_one_prediction_for_all_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SimMIM at a rate that kills it within a few steps: its loss goes on falling to that of the mean image."""
    monkeypatch.setattr(collapse, "PATIENCE", 5)
    argv = ["data.shapes_n=48", "data.workers=0", "train.batch_size=16", "train.steps=60", "train.warmup_epochs=0"]
    argv += ["eval.online_every=0", "train.clip_grad=null", "train.on_collapse=stop", "train.max_bad_steps=100"]
    recipe, SCHEMAS = ROOT / "configs/pretrain/simmim_gcvit_nano.yaml", {"simmim": OBJECTIVES["simmim"][1]}
    cfg = load_config(PretrainConfig, [str(recipe), *argv, "train.blr=5", f"out={tmp_path}"], SCHEMAS)
    with pytest.raises(NumericStop, match=r"step \d+: collapse\? for 5 steps prediction_std .*: all images get one"):
        pretrain(cfg)


def test_nothing_is_watched_during_the_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collapse, "PATIENCE", 5)
    hot = ["objective.teacher_temp=50", "objective.student_temp=1", "train.blr=1e-5"]
    pretrain(config(tmp_path, *hot, "train.steps=12", "train.warmup_epochs=4"))  # epochs of three steps
    assert "collapse?" not in capsys.readouterr().out


def test_chance_losses_are_what_equal_embeddings_give() -> None:
    """Each objective's own loss, when its heads map everything to one point, is the `chance` that it states."""
    small: dict[str, Any] = {"hidden_dim": 8, "out_dim": 16, "bottleneck_dim": 4, "local_crops": 0, "queue": 16}
    for name in [*VIEW, "ibot"]:
        cls, schema = OBJECTIVES[name]
        torch.manual_seed(0)
        known = {f for f in OmegaConf.structured(schema)}
        encoder = GCViT(16, (1, 1, 1, 1), (1, 1, 1, 1), img_size=64)
        cfg = schema(**{key: value for key, value in small.items() if key in known})
        objective = cls(cfg, encoder, Setup(AugmentConfig(), (64, 64), 10, 5))
        with torch.no_grad():
            for key, parameter in objective.named_parameters():
                if "projector" in key or "predictor" in key:
                    parameter.fill_(0.0 if parameter.ndim > 1 and "last" not in key else 1.0)
            if hasattr(objective, "queue"):
                objective.queue.fill_(0.25)  # unit rows, all alike
        batch = {"views": [torch.randn(4, 3, 64, 64)] * 2, "masks": [torch.zeros(4, 2, 2, dtype=torch.bool)] * 2}
        out = objective(batch, 0)
        for key, value in objective.chance(4).items():
            assert out[key].item() == pytest.approx(value, rel=0.01), (name, key)


def test_a_sign_must_stay_for_a_hundred_steps() -> None:
    assert CollapseWatch({}).patience == 100
