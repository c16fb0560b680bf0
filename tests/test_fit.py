"""What `fit` gives to each update, and which weights, images and checkpoints a run uses and keeps."""

import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import gcssl.pretrain as program
from gcssl.augment import BYOL_1, draw_view
from gcssl.checkpoint import write_backbone
from gcssl.config import PretrainConfig, load_config
from gcssl.errors import Failure, Preempted
from gcssl.models.build import backbone_info, build_backbone
from gcssl.models.load import load_backbone
from gcssl.pretrain import pretrain
from gcssl.ssl.base import Objective
from gcssl.ssl.objectives import OBJECTIVES, SCHEMAS
from gcssl.ssl.simmim import SimMIM

YAML = Path(__file__).resolve().parent.parent / "configs/pretrain"
TINY = [
    "data.shapes_n=16", "data.workers=0", "train.batch_size=8", "train.warmup_epochs=1", "log.every=1",
    "log.trackers=[]", "eval.online_every=0",
]  # fmt: skip


def config(objective: str, out: Path, *more: str) -> PretrainConfig:
    argv = [str(YAML / f"{objective}_gcvit_nano.yaml"), *TINY, f"out={out}", *more]
    return load_config(PretrainConfig, argv, SCHEMAS)


def watch(monkeypatch: pytest.MonkeyPatch, objective: str, note: Callable[[dict[str, Any], int], None]) -> None:
    """note(batch, step) before each forward pass of the objective."""
    cls = OBJECTIVES[objective][0]
    forward = cls.forward

    def noting(self: Any, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        note(batch, step)
        return forward(self, batch, step)

    monkeypatch.setattr(cls, "forward", noting)


def test_each_update_gets_its_lr_weight_decay_and_clipped_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of linear warm-up, three of cosine."""
    norms, set_lr = [], program.set_lr

    def spying(optimizer: torch.optim.Optimizer, *rest: float) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm().item())
        set_lr(optimizer, *rest)

    monkeypatch.setattr(program, "set_lr", spying)
    keys = ["train.steps=5", "train.blr=1e-3", "train.lr_rule=none", "train.min_lr=1e-4", "train.clip_grad=1e-3"]
    keys += ["train.weight_decay=0.1", "train.weight_decay_end=0.3"]
    out = pretrain(config("simmim", tmp_path, *keys))
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * t / 3)) / 2 for t in range(3)]
    assert [line["lr"] for line in told] == pytest.approx([1e-3 / 3, 2e-3 / 3, *cosine], rel=1e-5)
    decay = [0.3 - 0.2 * (1 + math.cos(math.pi * t / 5)) / 2 for t in range(5)]
    assert [line["wd"] for line in told] == pytest.approx(decay, rel=1e-5)
    assert all(line["grad_norm"] > 1e-2 for line in told)  # as measured, before the clip
    assert norms == pytest.approx([1e-3] * 5, rel=1e-2)


def test_a_bad_step_of_many_micro_batches_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm statistics are those of before its first micro-batch, not of before its last."""
    forward = SimMIM.forward

    def at_step_1(self: SimMIM, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        out = forward(self, batch, step)
        return out | {"loss": out["loss"] * float("nan")} if step == 1 else out

    monkeypatch.setattr(SimMIM, "forward", at_step_1)
    keys = ["train.steps=2", "train.batch_size=4", "train.accumulate=2", "checkpoint.every=0.3"]
    out = pretrain(config("simmim", tmp_path, *keys, "model.name=resnet10t", "model.window_ratio=null"))
    assert [line["skipped"] for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())] == [0, 1]
    one, two = (load_file(out / f"checkpoints/step_0000000{i}/model.safetensors") for i in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


PROTOTYPES = ["hidden_dim=32", "out_dim=16", "local_crops=0", "koleo_weight=0", "freeze_last_layer_epochs=0"]
PROTOTYPES += ["momentum=0.5"]  # of a teacher that follows fast
NOT_DINOS = ["projector_layers=null", "predictor_layers=null", "temperature=null"]
ACCUMULATING = {  # and what makes them quick at 64 px
    "simmim": [],
    "localmim": [],
    "mae": ["decoder_dim=32", "mask_ratio=0.5"],
    "ummae": ["decoder_dim=32"],
    "dino": PROTOTYPES,
    "esvit": PROTOTYPES,
    "ibot": PROTOTYPES,
    "joint": ["view=dino", *PROTOTYPES, *NOT_DINOS],
}
SLOW = ("localmim", "ummae")  # mae's and simmim's loss again


def changes(run: Path) -> dict[str, torch.Tensor]:
    """What the steps after the first changed in each part of the objective, teacher and centres too: a vector each."""
    first, *_, last = (load_file(path / "model.safetensors") for path in sorted((run / "checkpoints").iterdir()))
    parts: dict[str, list[torch.Tensor]] = {}
    for name in last:
        parts.setdefault(name.split(".")[0], []).append((last[name] - first[name]).double().flatten())
    return {part: torch.cat(moved) for part, moved in parts.items()}


def test_what_is_not_tried_below_always_compares_images() -> None:
    others = [objective for name, (objective, _) in OBJECTIVES.items() if name not in ACCUMULATING]
    assert all(objective.couples_batch is True for objective in others)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ACCUMULATING]
)
def test_accumulation_trains_as_the_larger_batch(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps of 4 images against 2 x 2: losses, norms and what changed in each part within 1e-4 (of rounding
    they are 1e-6). By SGD, whose update is as wrong as its gradient, with a clip that always bites.
    """
    keys = ["data.shapes_n=10", "model.img_size=64", "model.drop_path=0.2", "train.steps=3", "train.optimizer=sgd"]
    keys += ["train.blr=1", "train.lr_rule=linear", "train.lr_base=8", "train.clip_grad=0.05"]
    keys += ["checkpoint.every=0.5", "checkpoint.keep=3", *(f"objective.{key}" for key in ACCUMULATING[name])]
    one = pretrain(config(name, tmp_path / "one", *keys, "train.batch_size=4"))
    capsys.readouterr()
    two = pretrain(config(name, tmp_path / "two", *keys, "train.batch_size=2", "train.accumulate=2"))
    told = "global batch 4 = 2 x 1 processes x 2 accumulated; lr 0.5 (linear rule, base 8); 3 steps, 2 an epoch"
    assert told in capsys.readouterr().out
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (one, two)]
    for whole, parts in zip(*(map(json.loads, some) for some in lines), strict=True):
        for key in [key for key in whole if key.startswith("loss") or key in ("grad_norm", "lr")]:
            assert whole[key] == pytest.approx(parts[key], rel=1e-4), f"step {whole['step']} {key}"
        assert whole["grad_norm"] > 0.05
    assert whole["lr"] == pytest.approx(0.5)  # the line's, after two steps of warm-up
    wanted, found = changes(one), changes(two)
    assert wanted.keys() == found.keys()
    for part, moved in wanted.items():
        assert 0 < moved.norm() and (found[part] - moved).norm() < 1e-4 * moved.norm(), part


@pytest.mark.parametrize(
    ("objective", "asked", "which"),
    [
        ("mocov3", [], "student"),
        ("mocov3", ["encoder=teacher"], "teacher"),
        ("dino", ["objective.local_crops=0", "objective.out_dim=16"], "teacher"),  # its own, unasked
    ],
)
def test_the_backbone_file_holds_the_encoder_asked_for(
    objective: str, asked: list[str], which: str, tmp_path: Path
) -> None:
    out = pretrain(config(objective, tmp_path, "train.steps=1", "objective.hidden_dim=32", *asked))
    state = load_file(out / "checkpoints/step_00000001/model.safetensors")
    same = {}
    for prefix in ("encoder.", "teacher."):
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        found = load_file(out / "backbone.safetensors")
        assert found.keys() == part.keys()
        same[prefix] = all(torch.equal(found[name], part[name]) for name in part)
    assert same == {"encoder.": which == "student", "teacher.": which == "teacher"}
    assert json.loads((out / "backbone.json").read_text())["encoder"] == which


def test_prototypes_do_not_move_while_they_are_frozen(tmp_path: Path) -> None:
    """Epochs of two steps, the first of them frozen."""
    keys = ["objective.freeze_last_layer_epochs=1", "objective.local_crops=0", "objective.out_dim=16"]
    keys += ["train.steps=3", "train.warmup_epochs=0", "checkpoint.every=0.5", "checkpoint.keep=3"]
    out = pretrain(config("dino", tmp_path, *keys))
    one, two, three = (
        load_file(out / f"checkpoints/step_{step:08d}/model.safetensors")["projector.last.weight"] for step in (1, 2, 3)
    )
    assert torch.equal(one, two) and not torch.equal(two, three)


def test_frozen_prototypes_have_no_part_in_the_gradients_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is clipped: they would take from the others' share."""
    left_out: list[bool] = []
    clip = Accelerator.clip_grad_norm_

    def watched(self: Accelerator, parameters: Any, most: float) -> Any:
        parameters = list(parameters)
        left_out.append(any(p.requires_grad and p.grad is None for p in parameters))
        return clip(self, parameters, most)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", watched)
    keys = ["objective.freeze_last_layer_epochs=1", "objective.local_crops=0", "objective.out_dim=16"]
    pretrain(config("dino", tmp_path, *keys, "train.steps=3"))
    assert left_out == [True, True, False]


def test_a_worker_that_dies_during_a_step_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's signal handler raises wherever the step is."""
    others = set(multiprocessing.active_children())

    def kill(*_: Any) -> None:
        (worker,) = set(multiprocessing.active_children()) - others
        os.kill(worker.pid or 0, signal.SIGKILL)
        time.sleep(10)

    watch(monkeypatch, "simmim", kill)
    with pytest.raises(Failure, match=r"is killed by signal: Killed.*\(data.workers=1"):
        pretrain(config("simmim", tmp_path, "train.steps=3", "data.workers=1"))
    assert "data.workers=1" in json.loads((tmp_path / "status.json").read_text())["reason"]


def test_an_objective_from_outside_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/objectives.md has it."""

    @dataclass
    class MineConfig:
        name: str = "mine"
        weight: float = 1.0

    class Mine(Objective):
        def __init__(self, cfg: MineConfig, encoder: Any, _: Any) -> None:
            super().__init__()
            self.encoder, self.weight = encoder, cfg.weight

        def draw(self, rng: np.random.Generator, size: tuple[int, int]) -> Any:
            spec = replace(BYOL_1, size=size)
            return [(spec, draw_view(rng, spec))], [None]

        def forward(self, batch: dict[str, Any], _: int) -> dict[str, torch.Tensor]:
            return {"loss": self.weight * self.encoder(batch["views"][0]).square().mean(), **more}

    monkeypatch.setitem(OBJECTIVES, "mine", (Mine, MineConfig))
    keys = [*TINY, "data.path=shapes", "model.name=gcvit_nano", "model.img_size=64", "train.epochs=2", "train.blr=0.1"]
    keys += ["objective.name=mine", "objective.weight=2", f"out={tmp_path}"]
    cfg = load_config(PretrainConfig, keys, {**SCHEMAS, "mine": MineConfig})
    more: dict[str, Any] = {}
    pretrain(cfg)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] < json.loads(lines[0])["loss"] and len(lines) == 4
    for more in ({"step": torch.tensor(9.0)}, {"part": 1.0}, {"part": torch.ones(2)}):
        with pytest.raises(ValueError, match=rf"an objective's forward: .* wrong: \['{next(iter(more))}'\]"):
            pretrain(replace(cfg, out=str(tmp_path / str(len(list(tmp_path.iterdir()))))))


def test_checkpoints_of_every_second_epoch_stay(tmp_path: Path) -> None:
    """Epochs of two steps; beside them the newest two."""
    keys = ["train.steps=7", "checkpoint.every=0.5", "checkpoint.keep=2", "checkpoint.keep_every=2"]
    out = pretrain(config("simmim", tmp_path, *keys))
    assert sorted(path.name[-1] for path in (out / "checkpoints").iterdir()) == ["4", "6", "7"]


def test_a_kept_checkpoint_is_made_between_two_others(tmp_path: Path) -> None:
    """Epochs of two steps: every third epoch is saved at step 6, every second kept at step 4."""
    keys = ["train.steps=9", "checkpoint.every=3", "checkpoint.keep=2", "checkpoint.keep_every=2"]
    out = pretrain(config("simmim", tmp_path, *keys))
    assert sorted(path.name[-1] for path in (out / "checkpoints").iterdir()) == ["4", "8", "9"]


def test_each_step_draws_its_own_drop_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []
    watch(monkeypatch, "simmim", lambda batch, _: drawn.extend(batch["noise"]))
    pretrain(config("simmim", tmp_path, "train.steps=2", "model.drop_path=0.5"))
    first, second = drawn
    assert first.shape == second.shape and not (first == second).any()


def test_a_run_keeps_and_uses_the_normalisation_that_came_with_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = build_backbone("gcvit_nano", 64, window_ratio=[16, 16, 16, 32])
    backbone.mean, backbone.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    (tmp_path / "weights").mkdir()
    write_backbone(tmp_path / "weights", backbone.state_dict(), backbone_info(backbone))
    keys = ["train.steps=3", f"model.weights={tmp_path / 'weights'}"]
    mean, std = (torch.tensor(three)[:, None, None] for three in (backbone.mean, backbone.std))
    seen: list[torch.Tensor] = []
    watch(monkeypatch, "mocov3", lambda batch, _: seen.extend(view * std + mean for view in batch["views"]))
    whole = pretrain(config("mocov3", tmp_path / "whole", *keys))
    with pytest.raises(Preempted, match="step 1 of 3"):
        pretrain(config("mocov3", tmp_path / "cut", *keys, "train.max_hours=0"))
    assert load_backbone(str(tmp_path / "cut"))[1]["mean"] == [0.5, 0.4, 0.3]  # of a run that is not finished
    cut = pretrain(config("mocov3", tmp_path / "cut", *keys))
    for name in ("backbone.safetensors", "backbone.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert json.loads((cut / "backbone.json").read_text())["std"] == [0.2, 0.3, 0.4]
    pixels = torch.cat(seen)
    assert pixels.min() == pytest.approx(0, abs=1e-5) and pixels.max() == pytest.approx(1, abs=1e-5)


def test_a_run_may_save_memory_after_a_stop_and_computes_the_same(tmp_path: Path) -> None:
    """As after a move to a smaller GPU."""
    keys = ["train.steps=3", "model.drop_path=0.3"]
    whole = pretrain(config("mocov3", tmp_path / "whole", *keys))
    with pytest.raises(Preempted, match="step 1 of 3"):
        pretrain(config("mocov3", tmp_path / "cut", *keys, "train.max_hours=0"))
    cut = pretrain(config("mocov3", tmp_path / "cut", *keys, "model.grad_checkpointing=true"))
    assert (whole / "backbone.safetensors").read_bytes() == (cut / "backbone.safetensors").read_bytes()


def test_a_stop_at_the_last_step_has_nothing_left_to_stop(tmp_path: Path) -> None:
    out = pretrain(config("simmim", tmp_path, "train.steps=1", "train.max_hours=0"))
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


def test_losses_of_before_a_term_joined_do_not_judge_those_after(tmp_path: Path) -> None:
    """Epochs of two steps: iBOT's masked term joins at step 2, from 0."""
    keys = ["train.steps=3", "objective.pred_start_epoch=1", "objective.out_dim=16", "objective.local_crops=0"]
    out = pretrain(config("ibot", tmp_path, *keys))
    state = json.loads((out / "checkpoints/step_00000003/state.json").read_text())
    assert len(state["bad_steps"]["losses"]) == 1


def test_a_timm_backbone_drops_the_same_paths_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its drop path draws from torch's generator, ours from the numbers it is handed; each micro-batch has its own."""
    seeds: dict[int, set[int]] = {}
    watch(monkeypatch, "simmim", lambda _, step: seeds.setdefault(step, set()).add(torch.initial_seed()))
    keys = ["model.name=test_vit", "model.drop_path=0.5", "objective.mask_unit=16", "train.steps=3"]
    keys += ["train.batch_size=8", "train.accumulate=2", "model.window_ratio=null"]
    whole = pretrain(config("simmim", tmp_path / "whole", *keys))
    with pytest.raises(Preempted, match="step 1 of 3"):
        pretrain(config("simmim", tmp_path / "cut", *keys, "train.max_hours=0"))
    cut = pretrain(config("simmim", tmp_path / "cut", *keys))
    assert (whole / "backbone.safetensors").read_bytes() == (cut / "backbone.safetensors").read_bytes()
    assert [len(of_step) for of_step in seeds.values()] == [2, 2, 2] and len(set.union(*seeds.values())) == 6


def test_the_seed_reaches_weights_order_crops_drop_path_and_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(batch: dict[str, Any], _: int) -> None:
        crops = {int(i): view for i, view in zip(batch["index"], batch["views"][0], strict=True)}
        seen.append([batch["index"], crops, batch["noise"][0], torch.initial_seed()])

    runs: list[list[Any]] = []
    for place, seed in enumerate((0, 1, 0)):
        seen: list[Any] = []
        with monkeypatch.context() as patch:
            watch(patch, "simmim", note)
            keys = [f"train.seed={seed}", "model.drop_path=0.5", "train.steps=2", "train.blr=1e-30", "train.min_lr=0"]
            run = pretrain(config("simmim", tmp_path / str(place), *keys))
        [first, second] = seen
        crops = first[1] | second[1]  # of all 16 images
        weights = load_file(run / "backbone.safetensors")["stem.conv1.weight"]
        runs.append([weights, first[0], torch.stack([crops[i] for i in range(16)]), first[2], torch.tensor(first[3])])
    for name, *values in zip(("weights", "order", "crops", "drop path", "torch"), *runs, strict=True):
        assert torch.equal(values[0], values[2]) and not torch.equal(values[0], values[1]), name
