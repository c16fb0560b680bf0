"""Fine-tuning: a full run with resume, the recipe's parts, and a result that `validate` finds again."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gcssl.checkpoint import write_backbone
from gcssl.config import DataConfig, load_config
from gcssl.data import open_data
from gcssl.errors import Preempted, UserError
from gcssl.eval import finetune, validate
from gcssl.eval.finetune import (
    Classifier,
    FinetuneConfig,
    FinetuneOptions,
    TransformMaker,
    in_force,
    layer_groups,
    open_run,
    to_device,
)
from gcssl.eval.inputs import InputConfig, data_of
from gcssl.eval.metrics import best
from gcssl.models.build import backbone_info, build_backbone
from gcssl.models.load import load_backbone
from gcssl.runtime import make_accelerator

SMALL = ["model.name=gcvit_nano", "model.img_size=64", "train.batch_size=16", "train.epochs=2", "train.warmup_epochs=1",
         "data.workers=0", "finetune.ema_decay=0.9"]  # fmt: skip
RECIPES = Path(__file__).parents[2] / "configs/eval"


def config(folder: Path, out: Path, *more: str) -> FinetuneConfig:
    return load_config(FinetuneConfig, ["backbone=none", f"data.path={folder}", f"out={out}", *SMALL, *more])


def backbone(**kw):
    return build_backbone("gcvit_nano", 64, 3, **kw)


@pytest.mark.parametrize("augment", ["none", "light", "full"])
def test_each_augmentation_runs_and_is_reported(augment: str, folder: Path, tmp_path: Path, accelerator) -> None:
    result = finetune.run(config(folder, tmp_path, f"finetune.augment={augment}", "model.drop_path=0.1"), accelerator)
    written = json.loads((tmp_path / "finetune.json").read_text())
    assert {"finetune/top1", "finetune/top5", "finetune/top1_raw"} <= written.keys()
    assert (result["n_test"], written["classes"], written["finetune"]["augment"]) == (27, 3, augment)
    for key in ("protocol", "features", "n_bad", "test_fingerprint", "seconds", "interpolation", "crop", "seeds"):
        assert key in written, key
    for name in ("config.yaml", "status.json", "metrics.jsonl", "checkpoints", "backbone.safetensors"):
        assert (tmp_path / "finetune" / name).exists(), name


def test_workers_do_not_change_a_bit(folder: Path, tmp_path: Path, accelerator) -> None:
    for workers in (0, 2):
        finetune.run(config(folder, tmp_path / str(workers), f"data.workers={workers}"), accelerator)
    a, b = ((tmp_path / w / "finetune/backbone.safetensors").read_bytes() for w in ("0", "2"))
    assert a == b


def test_a_stopped_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path, accelerator) -> None:
    finetune.run(config(folder, tmp_path / "whole", "model.drop_path=0.2"), accelerator)
    cut = config(folder, tmp_path / "cut", "model.drop_path=0.2", "train.max_hours=0.0")
    with pytest.raises(Preempted, match="step 1 of 8"):
        finetune.run(cut, accelerator)
    finetune.run(config(folder, tmp_path / "cut", "model.drop_path=0.2"), accelerator)
    a, b = (load_file(tmp_path / n / "finetune/checkpoints/step_00000008/model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_unfinished_run_of_a_timm_model_keeps_its_head(folder: Path, tmp_path: Path, accelerator) -> None:
    cut = config(folder, tmp_path, "model.name=resnet10t", "model.window_ratio=null", "train.max_hours=0.0")
    with pytest.raises(Preempted):
        finetune.run(cut, accelerator)
    backbone, _ = load_backbone(str(tmp_path / "finetune"))
    assert backbone.num_classes == 3 and backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_an_accelerator_of_another_train_section_is_refused(folder: Path, tmp_path: Path, accelerator) -> None:
    """It would train in fp32, or step after every micro-batch, and the result would say otherwise."""
    for key in ("train.precision=bf16", "train.accumulate=2"):
        with pytest.raises(ValueError, match=r"given precision and accumulation \('no', 1\), expected"):
            finetune.run(config(folder, tmp_path / key, key), accelerator)


def test_a_result_tells_the_options_in_force(folder: Path, tmp_path: Path, accelerator, capsys) -> None:
    keys = ["train.steps=1", "finetune.augment=light", "finetune.mixup=0.5", "finetune.scale=[0.5,1.0]"]
    result = finetune.run(config(folder, tmp_path, *keys), accelerator)
    off = dict.fromkeys(("auto_augment", "color_jitter", "reprob", "mixup", "cutmix"))
    assert off.items() <= result["finetune"].items()
    assert (result["finetune"]["scale"], result["finetune"]["layer_decay"]) == ([0.5, 1.0], 1.0)
    told = capsys.readouterr().out
    assert "finetune.mixup=0.5: not used with finetune.augment=light\n" in told and "cutmix" not in told
    plain = in_force(FinetuneConfig(finetune=FinetuneOptions(augment="none", layer_decay=None)), "runs/a")
    assert (plain["scale"], plain["layer_decay"]) == (None, 0.95)
    full = FinetuneConfig(finetune=FinetuneOptions(layer_decay=0.8))
    assert in_force(full, "none") == dataclasses.asdict(full.finetune)


def test_validate_finds_the_fine_tuned_accuracy_again(folder: Path, tmp_path: Path, accelerator) -> None:
    result = finetune.run(config(folder, tmp_path), accelerator)
    argv = [f"backbone={tmp_path / 'finetune'}", f"data.path={folder}", f"out={tmp_path / 'v'}", "data.workers=0"]
    again = validate.run(load_config(InputConfig, argv), accelerator)
    top1 = next(value for name, value in again.items() if name.endswith("/top1"))
    assert top1 == pytest.approx(result["finetune/top1"])


def test_validate_crops_as_the_fine_tuned_weights_were_judged(folder: Path, tmp_path: Path, accelerator) -> None:
    asked = ["crop_pct=0.5", "interpolation=nearest", "train.steps=4"]
    result = finetune.run(config(folder, tmp_path, *asked), accelerator)
    assert (result["crop"]["crop_pct"], result["interpolation"]) == (0.5, "nearest")
    argv = [f"backbone={tmp_path / 'finetune'}", f"data.path={folder}", f"out={tmp_path / 'v'}", "data.workers=0"]
    again = validate.run(load_config(InputConfig, argv), accelerator)
    for key in ("crop", "interpolation"):
        assert again[key] == result[key]
    assert again["validate/top1"] == pytest.approx(result["finetune/top1"])


@pytest.mark.usefixtures("accelerator")  # sets the device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_judged_in_its_own_precision(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    judged: list[Tensor] = []
    monkeypatch.setattr(validate, "best", lambda logits: judged.append(logits.float()) or best(logits))
    cfg = config(folder, tmp_path, f"train.precision={precision}", "train.steps=1", "train.batch_size=4")
    finetune.run(cfg, make_accelerator(cfg.train, cfg.runtime))
    assert len(judged) > 2 and max(map(len, judged)) == 8  # no more at once than training shows to fit
    for logits in judged:
        assert torch.equal(logits, logits.bfloat16().float()) == (precision == "bf16")


def saved(path: Path, seed: int = 1, **kw: Any) -> Path:
    """An exported encoder; not the architecture and size that configs have by default."""
    torch.manual_seed(seed)
    model = build_backbone("gcvit_nano", 96, window_ratio=[16, 16, 16, 32])
    write_backbone(path, model.state_dict(), {**backbone_info(model), **kw})
    return path


def test_a_result_is_of_the_weights_that_the_backbone_holds_now(folder: Path, tmp_path: Path, accelerator) -> None:
    """A run may train on between two fine-tunings from it; a key that changes no number may change."""
    spec = saved(tmp_path / "m")
    argv = [f"backbone={spec}", f"data.path={folder}", f"out={tmp_path / 'out'}", *SMALL, "train.steps=1"]
    first = finetune.run(load_config(FinetuneConfig, argv), accelerator)
    more = ["log.every=20", "checkpoint.keep=3", "train.max_hours=5"]
    again = finetune.run(load_config(FinetuneConfig, [*argv, *more]), accelerator)
    assert again["correct"] == first["correct"]
    (tmp_path / "out/finetune.json").unlink()
    there = finetune.run(load_config(FinetuneConfig, [f"backbone={spec}/../m", *argv[1:]]), accelerator)
    assert there["correct"] == first["correct"]  # the same weights by another path: the run goes on
    (tmp_path / "out/finetune.json").unlink()
    saved(spec, seed=2)
    with pytest.raises(UserError, match="backbone: other weights than this run began with"):
        finetune.run(load_config(FinetuneConfig, argv), accelerator)


def test_random_is_compared_at_the_architecture_of_the_backbone_given(
    folder: Path, tmp_path: Path, accelerator
) -> None:
    spec = saved(tmp_path / "m", interpolation="bilinear")
    argv = [
        f"backbone={spec}",
        "compare=random",
        f"data.path={folder}",
        f"out={tmp_path / 'out'}",
        *SMALL[2:],
        "crop_pct=0.6",
    ]
    result = finetune.run(load_config(FinetuneConfig, [*argv, "train.steps=1"]), accelerator)
    assert result["crop"]["size"] == [96, 96] and result["interpolation"] == "bilinear"
    for run in (tmp_path / "out/finetune", tmp_path / "out/finetune/random"):
        described = json.loads((run / "backbone.json").read_text())
        assert described["img_size"] == [96, 96] and described["model_args"]["window_ratio"] == [16, 16, 16, 32]
        for product in ("backbone.json", "backbone.safetensors"):
            (run / product).unlink()
        again, info = load_backbone(str(run))  # from its checkpoint, by what config.yaml says
        trained_on = open_data(DataConfig(path=str(folder))).train.fingerprint
        assert info["trained_on"] == described["trained_on"] == trained_on
        assert info["crop_pct"] == 0.6 and info["class_names"] == described["class_names"] is not None
        assert again.img_size == (96, 96) and again.window_ratio == (16, 16, 16, 32)
    argv = [f"backbone={spec}", f"data.path={folder}", f"out={tmp_path / 'b'}", *SMALL, "train.steps=1"]
    assert finetune.run(load_config(FinetuneConfig, argv), accelerator)["crop"]["size"] == [64, 64]  # SMALL asks for it


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["compare=/abs/x"], "/abs/x"),
        (["compare=radnom"], "compare=radnom: no such run"),
        (["compare=SAVED"], "compares with random or none"),
        (["name=../x"], "expected one word"),
        (["backbone=/nowhere"], "backbone=/nowhere: no such run"),
        (["train.batch_size=15"], "train.batch_size=15: mixup pairs images"),
        (["train.shard=true"], "train.shard: given true, expected false"),
        (["finetune.auto_augment=foo"], "finetune.auto_augment: given foo, which timm cannot read"),
        (["finetune.auto_augment=rand-z9"], "finetune.auto_augment: given rand-z9, which timm cannot read"),
    ],
)
def test_refusals_come_before_the_data_is_opened(
    wrong: list[str], message: str, tmp_path: Path, accelerator, monkeypatch
) -> None:
    monkeypatch.setattr("gcssl.eval.inputs.open_data", lambda *_, **__: pytest.fail("the data was opened"))
    wrong = [key.replace("SAVED", str(saved(tmp_path / "m"))) for key in wrong]
    with pytest.raises(UserError, match=message) as error:
        finetune.run(config(tmp_path, tmp_path / "out", *wrong), accelerator)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_choices_are_checked_with_the_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finetune.augment: given ful, expected one of none, light, full"):
        config(tmp_path, tmp_path, "finetune.augment=ful")


def test_undecodable_test_images_are_counted_and_told(broken_folder: Path, tmp_path: Path, accelerator, capsys) -> None:
    result = finetune.run(config(broken_folder, tmp_path, "train.steps=1", "data.max_bad=0.5"), accelerator)
    assert (result["n_test"], result["n_bad"]) == (26, 1)
    assert "1 of 27 images cannot be decoded" in capsys.readouterr().out


@pytest.mark.usefixtures("accelerator")  # sets the device
def test_a_mixing_run_keeps_its_micro_batch(folder: Path, tmp_path: Path) -> None:
    """Mixup's partners are those of the micro-batch, so 8 + 8 mixes other images than 16."""
    short = ["train.global_batch=16", "train.max_hours=0.0"]
    for augment in ("full", "light"):
        out = tmp_path / augment
        first = config(folder, out, f"finetune.augment={augment}", *short)
        with pytest.raises(Preempted):
            finetune.run(first, make_accelerator(first.train, first.runtime))
        other = config(folder, out, f"finetune.augment={augment}", "train.global_batch=16", "train.batch_size=8")
        if augment == "full":
            with pytest.raises(UserError, match="train.batch_size: 16 -> 8"):
                finetune.run(other, make_accelerator(other.train, other.runtime))
        else:
            finetune.run(other, make_accelerator(other.train, other.runtime))


def test_nothing_of_a_fit_stays_with_the_accelerator(folder: Path, tmp_path: Path, accelerator) -> None:
    """A second one would unscale and clip the first one's gradients."""
    finetune.run(config(folder, tmp_path), accelerator)
    assert accelerator._models == [] and accelerator._optimizers == []


@pytest.mark.parametrize("augment", [pytest.param("light", marks=pytest.mark.slow), "full"])
def test_two_processes_give_what_one_gives(augment: str, broken_folder: Path, tmp_path: Path) -> None:
    """The program itself. With mixing, one process needs the same micro-batches: two accumulated."""
    keys = ["backbone=none", f"data.path={broken_folder}", *SMALL, "model.drop_path=0.2", "train.steps=3",
            "train.global_batch=16", "data.max_bad=0.5", f"finetune.augment={augment}", "train.warmup_epochs=0",
            "train.blr=0.02"]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for world, command, batch in (("1", [sys.executable], 16 if augment == "light" else 8), ("2", torchrun, 8)):
        command = [*command, "-m", "gcssl.eval.finetune", *keys, f"train.batch_size={batch}", f"out={tmp_path / world}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        environment = json.loads((tmp_path / world / "finetune/env.json").read_text())
        assert environment["processes"] == int(world)
    one, two = (load_file(tmp_path / world / "finetune/checkpoints/step_00000003/model.safetensors") for world in "12")
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    a, b = ([json.loads(line) for line in (tmp_path / w / "finetune/metrics.jsonl").open()] for w in "12")
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)
    a, b = (json.loads((tmp_path / world / "finetune.json").read_text()) for world in "12")
    assert (a["n_test"], a["n_bad"]) == (b["n_test"], b["n_bad"]) == (26, 1)
    assert a["finetune/top1"] == pytest.approx(b["finetune/top1"], abs=4.0)  # one image


def test_judged_weights_are_the_average_and_it_moves_from_the_start() -> None:
    model = Classifier(backbone(), FinetuneOptions(ema_decay=0.5))
    start = {k: v.clone() for k, v in model.ema.module.state_dict().items()}
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(1.0)
    model.after_step(0)  # warmed up: the first update takes the weights as they are
    moved = model.ema.module.state_dict()
    assert all(torch.allclose(moved[k], start[k] + 1.0) for k in start if start[k].is_floating_point())
    assert not any(p.requires_grad for p in model.ema.parameters())
    assert model.train().encoder.training and not any(part.training for part in model.ema.modules())


def test_the_average_warms_up() -> None:
    """timm's decay after n updates, 1 - (n + 1) ** (-2 / 3) at most ema_decay: 0, .37, .52, .55."""
    model = Classifier(backbone(), FinetuneOptions(ema_decay=0.55))
    weight, average = model.encoder.stem.conv1.weight, model.ema.module.stem.conv1.weight
    expected = weight.detach().clone()
    for n in range(4):
        with torch.no_grad():
            weight.add_(1.0)
        decay = min(1 - (n + 1) ** (-2 / 3), 0.55)
        expected = decay * expected + (1 - decay) * weight.detach()
        model.after_step(n)
        torch.testing.assert_close(average, expected, msg=f"update {n}")


def test_holdout_trains_without_the_slice_that_it_is_judged_on(folder: Path, tmp_path: Path, accelerator) -> None:
    def where(*keys: str) -> list[set[str]]:
        cfg = config(folder, tmp_path, *keys)
        inputs = open_run(dataclasses.replace(cfg, data=data_of(cfg, None)), accelerator, "none")
        return [{images.where(i) for i in range(len(images))} for images in (inputs.train, inputs.test)]

    (rest, held), (train, test) = where("finetune.holdout=true"), where()
    assert held and not rest & held and rest | held == train
    assert not train & test


def test_layer_decay_is_per_block_and_absent_for_the_baseline() -> None:
    model, cfg = backbone(), FinetuneConfig(finetune=FinetuneOptions(layer_decay=0.5))
    scales = sorted({g["lr_scale"] for g in layer_groups(cfg, model, "runs/a")})
    assert scales == [0.5**k for k in range(9, -1, -1)]  # stem, eight blocks, head
    unasked = layer_groups(FinetuneConfig(), model, "runs/a")
    assert min(g["lr_scale"] for g in unasked) == pytest.approx(0.95**9)
    recipes = [load_config(FinetuneConfig, [str(yaml)]) for yaml in sorted(RECIPES.glob("finetune*.yaml"))]
    assert len(recipes) > 1
    for one in (FinetuneConfig(), *recipes):
        assert {g["lr_scale"] for g in layer_groups(one, model, "none")} == {1.0}


def test_soft_targets_are_not_smoothed_twice() -> None:
    model = Classifier(backbone().eval(), FinetuneOptions(smoothing=0.3)).eval()
    x, y = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    soft = torch.nn.functional.one_hot(y, 3).float()
    hard_loss, soft_loss = (model({"image": x, "target": t}, 0)["loss"] for t in (y, soft))
    logits = model.encoder(x)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(soft_loss, expected)
    smooth = soft * 0.7 + 0.3 / 3
    torch.testing.assert_close(hard_loss, -(smooth * logits.log_softmax(1)).sum(1).mean())


def test_transform_is_a_function_of_the_key() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    maker = TransformMaker(FinetuneOptions(), (64, 64), (0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(123)
    a = maker(pixels, 0, (0, 1, 2))["image"]
    torch.manual_seed(321)
    assert torch.equal(a, maker(pixels, 0, (0, 1, 2))["image"])
    assert not torch.equal(a, maker(pixels, 0, (0, 1, 3))["image"])
    assert a.shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("augment", "scale", "interpolation"),
    [("none", (1.0, 1.0), "bicubic"), ("light", (0.3, 0.9), "bicubic"), ("full", (0.3, 0.9), "bilinear bicubic")],
)
def test_training_crops_are_of_the_scale_asked_for(
    tmp_path: Path, augment: str, scale: tuple[float, float], interpolation: str
) -> None:
    """Without crops the whole image; the full recipe alone draws its interpolation, as timm does."""
    cfg = config(tmp_path, tmp_path, f"finetune.augment={augment}", "finetune.scale=[0.3,0.9]")
    crop = TransformMaker(cfg.finetune, (64, 64), (0.5,) * 3, (0.5,) * 3).transform.transforms[0]
    assert tuple(crop.scale) == scale
    assert str(crop).endswith(f"interpolation={interpolation})")


def test_training_images_are_normalised_by_the_backbones_own_mean_and_std(
    folder: Path, tmp_path: Path, accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    seen, forward = [], Classifier.forward

    def noting(self: Classifier, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        seen.append(batch["image"] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])
        return forward(self, batch, step)

    monkeypatch.setattr(Classifier, "forward", noting)
    argv = [f"backbone={saved(tmp_path / 'm', mean=mean, std=std)}", f"data.path={folder}", f"out={tmp_path / 'out'}"]
    argv += [*SMALL, "finetune.augment=light", "train.max_hours=0"]
    with pytest.raises(Preempted):
        finetune.run(load_config(FinetuneConfig, argv), accelerator)
    (pixels,) = seen
    assert pixels.min() == pytest.approx(0, abs=1e-5) and pixels.max() == pytest.approx(1, abs=1e-5)


def test_mixing_is_a_function_of_the_step(tmp_path: Path, accelerator) -> None:
    cfg = config(tmp_path, tmp_path, "model.drop_path=0.2")
    images, labels = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    how = {"cfg": cfg, "accelerator": accelerator, "backbone": backbone()}

    def mixed(step: int) -> list[torch.Tensor]:
        batch = {"image": images.clone(), "label": labels, "position": torch.arange(4), "index": torch.arange(4)}
        batch = to_device(batch, step, **how, classes=3)
        return [batch["image"], batch["target"], batch["noise"][0]]

    first, again, other = mixed(1), mixed(1), mixed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_seed_reaches_weights_head_order_crops_drop_path_and_mixing(
    folder: Path, tmp_path: Path, accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = Classifier.forward, []

    def noting(self: Classifier, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        weights = [self.encoder.stem.conv1.weight.clone(), self.encoder.head.fc.weight.clone()]
        seen.append([*weights, batch["index"], batch["image"][batch["index"].argsort()], batch["noise"][0]])
        return forward(self, batch, step)

    monkeypatch.setattr(Classifier, "forward", noting)
    four = {"label": torch.tensor([0, 1, 2, 0]), "position": torch.arange(4), "index": torch.arange(4)}
    for place, seed in enumerate((0, 1, 0)):
        keys = [f"train.seed={seed}", "model.drop_path=0.5", "train.batch_size=66", "train.steps=1"]
        cfg = config(folder, tmp_path / str(place), *keys, "finetune.augment=light")  # a step sees all 66 images
        finetune.run(cfg, accelerator)
        how = {"backbone": backbone(), "accelerator": accelerator}
        cfg.finetune.augment = "full"
        seen[-1].append(to_device({"image": torch.ones(4, 3, 64, 64), **four}, 0, cfg=cfg, **how, classes=3)["target"])
    for name, *values in zip(("weights", "head", "order", "crops", "drop path", "mixing"), *seen, strict=True):
        assert torch.equal(values[0], values[2]) and not torch.equal(values[0], values[1]), name


def test_without_a_policy_colours_are_jittered(tmp_path: Path) -> None:
    cfg = config(tmp_path, tmp_path / "out", "finetune.auto_augment=null", "finetune.color_jitter=0.9")
    steps = str(TransformMaker(cfg.finetune, (64, 64), (0.5,) * 3, (0.5,) * 3).transform)
    assert "ColorJitter" in steps and "RandAugment" not in steps


def test_the_full_recipe_erases_and_mixes_as_it_says(
    tmp_path: Path, accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for augment, erased in (("light", False), ("full", True)):
        maker = TransformMaker(FinetuneOptions(augment=augment, reprob=0.3), (64, 64), (0.5,) * 3, (0.5,) * 3)
        assert ("RandomErasing(p=0.3, mode=pixel" in str(maker.transform)) == erased
    given: list[Any] = []

    class Noting(finetune.Mixup):
        def __init__(self, *args: Any, **named: Any) -> None:
            given.append((*args, named["label_smoothing"], named["num_classes"]))
            super().__init__(*args, **named)

    monkeypatch.setattr(finetune, "Mixup", Noting)
    cfg = config(tmp_path, tmp_path, "finetune.mixup=0.7", "finetune.cutmix=0.6", "finetune.smoothing=0.2")
    how = {"cfg": cfg, "accelerator": accelerator, "backbone": backbone()}
    four = {"label": torch.tensor([0, 1, 2, 0]), "position": torch.arange(4), "index": torch.arange(4)}
    to_device({"image": torch.rand(4, 3, 64, 64), **four}, 0, **how, classes=3)
    assert given == [(0.7, 0.6, 0.2, 3)]


def test_no_draw_of_the_full_transform_fails() -> None:
    """RandAugment's rarest magnitudes included: its strongest posterize came to be refused by Pillow 13."""
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    maker = TransformMaker(FinetuneOptions(augment="full"), (8, 8), (0.5,) * 3, (0.5,) * 3)
    assert all(maker(image, 0, (0, 1, i))["image"].isfinite().all() for i in range(3000))
