"""Fine-tuning: a full run with resume, the recipe's parts, and a result that `validate` finds again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gcssl.config import load_config
from gcssl.eval import finetune, validate
from gcssl.eval.finetune import Classifier, FinetuneConfig, FinetuneOptions, TransformMaker, layer_groups
from gcssl.models.build import build_backbone
from gcssl.runtime import Preempted

SMALL = ["model.name=gcvit_nano", "model.img_size=64", "train.batch_size=16", "train.epochs=2", "train.warmup_epochs=1",
         "data.workers=0", "finetune.ema_decay=0.9"]  # fmt: skip


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
    for name in ("config.yaml", "status.json", "metrics.jsonl", "checkpoints", "backbone.safetensors"):
        assert (tmp_path / "finetune" / name).exists(), name


def test_workers_do_not_change_a_bit(folder: Path, tmp_path: Path, accelerator) -> None:
    for workers in (0, 2):
        finetune.run(config(folder, tmp_path / str(workers), f"data.workers={workers}"), accelerator)
    a, b = ((tmp_path / w / "finetune/backbone.safetensors").read_bytes() for w in ("0", "2"))
    assert a == b


def test_a_stopped_run_goes_on_bit_for_bit(folder: Path, tmp_path: Path, accelerator, monkeypatch) -> None:
    finetune.run(config(folder, tmp_path / "whole", "model.drop_path=0.2"), accelerator)
    cut = config(folder, tmp_path / "cut", "model.drop_path=0.2", "train.max_hours=0.0")
    with pytest.raises(Preempted, match="step 1 of 8"):
        finetune.run(cut, accelerator)
    finetune.run(config(folder, tmp_path / "cut", "model.drop_path=0.2"), accelerator)
    a, b = (load_file(tmp_path / n / "finetune/checkpoints/step_00000008/model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_validate_finds_the_fine_tuned_accuracy_again(folder: Path, tmp_path: Path, accelerator) -> None:
    result = finetune.run(config(folder, tmp_path), accelerator)
    argv = [f"backbone={tmp_path / 'finetune'}", f"data.path={folder}", f"out={tmp_path / 'v'}", "data.workers=0"]
    again = validate.run(load_config(validate.ValidateConfig, argv), accelerator)
    top1 = next(value for name, value in again.items() if name.endswith("/top1"))
    assert top1 == pytest.approx(result["finetune/top1"])


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


def test_layer_decay_is_per_block_and_absent_for_the_baseline() -> None:
    model, cfg = backbone(), FinetuneConfig(finetune=FinetuneOptions(layer_decay=0.5))
    scales = sorted({g["lr_scale"] for g in layer_groups(cfg, model, "runs/a")})
    assert scales == [0.5**k for k in range(9, -1, -1)]  # stem, eight blocks, head
    plain = layer_groups(FinetuneConfig(), model, "none")
    assert {g["lr_scale"] for g in plain} == {1.0}


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
    image = Image.fromarray(pixels)
    maker = TransformMaker(FinetuneOptions(), (64, 64), (0.5,) * 3, (0.5,) * 3)
    torch.manual_seed(123)
    a = maker(image, 0, (0, 1, 2))["image"]
    torch.manual_seed(321)
    assert torch.equal(a, maker(image, 0, (0, 1, 2))["image"])
    assert not torch.equal(a, maker(image, 0, (0, 1, 3))["image"])
    assert a.shape == (3, 64, 64)
