"""validate: a checkpoint's own head, size, crop and interpolation; each test image once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from gcssl.augment import IMAGENET_MEAN, IMAGENET_STD, normalize, resize_center_crop
from gcssl.checkpoint import write_backbone
from gcssl.config import DataConfig, ModelConfig, PretrainConfig, config_dict, to_yaml
from gcssl.data import BadImage, held_out, open_data
from gcssl.errors import UserError
from gcssl.eval.inputs import InputConfig
from gcssl.eval.validate import main, run
from gcssl.models.build import backbone_info, build_backbone

CLASSES = ["blue", "green", "red"]


def export(out: Path, classes: list[str] | None = None, n: int = 3, **info: Any) -> nn.Module:
    torch.manual_seed(3)
    model = build_backbone("gcvit_nano", 64, num_classes=n).eval()
    nn.init.normal_(model.head.fc.weight, std=0.3)
    out.mkdir()
    described = backbone_info(model, class_names=classes, **info)
    write_backbone(out, model.state_dict(), described)
    return model


def config(spec: Path | str, folder: Path | str, out: Path, **kw: Any) -> InputConfig:
    return InputConfig(
        **{"backbone": str(spec), "data": DataConfig(path=str(folder), workers=0), "out": str(out), **kw}
    )


def by_hand(model: nn.Module, folder: Path, pct: float, how: str, side: int = 64) -> float:
    """Top-1, one image at a time, of those that can be decoded."""
    images, right = open_data(DataConfig(path=str(folder)), (64, 64)).test, []
    for i in range(len(images)):
        try:
            image = images.load(i)
        except BadImage:
            continue
        pixels = torch.from_numpy(resize_center_crop(image, (side, side), pct, how))[None] / 255
        with torch.no_grad():
            logits = model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))
        right.append(int(logits.argmax() == images.labels[i]))
    return 100 * sum(right) / len(right)


def test_scores_that_are_not_numbers_are_no_predictions(folder: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    model = export(tmp_path / "m", classes=CLASSES)
    model.head.fc.bias.data[1] = float("nan")
    write_backbone(tmp_path / "m", model.state_dict(), backbone_info(model, class_names=CLASSES))
    with pytest.raises(UserError, match="outputs \\(own\\) are not finite for"):
        run(config(tmp_path / "m", folder, tmp_path / "out"), accelerator)


@pytest.mark.parametrize("batch_size", [4, 100])
def test_each_image_counts_once_with_the_checkpoints_own_crop(
    folder: Path, tmp_path: Path, accelerator: Accelerator, batch_size: int
) -> None:
    model = export(tmp_path / "m", classes=CLASSES, crop_pct=0.6, interpolation="bilinear")
    result = run(config(tmp_path / "m", folder, tmp_path / "out", batch_size=batch_size), accelerator)
    assert result["validate/top1"] == pytest.approx(by_hand(model, folder, 0.6, "bilinear"))
    assert result["validate/top5"] == 100.0
    assert (result["n_test"], result["classes"]) == (27, 3)
    assert result["crop"] == {"size": [64, 64], "crop_pct": 0.6} and result["interpolation"] == "bilinear"
    assert json.loads((tmp_path / "out" / "validate.json").read_text())["n_test"] == 27


def test_crop_size_and_interpolation_can_be_asked_for(folder: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    model = export(tmp_path / "m")
    asked = {"crop_pct": 0.5, "interpolation": "nearest", "model": ModelConfig(name="", img_size=96)}
    result = run(config(tmp_path / "m", folder, tmp_path / "out", **asked), accelerator)
    assert result["crop"] == {"size": [96, 96], "crop_pct": 0.5} and result["interpolation"] == "nearest"
    assert result["validate/top1"] == pytest.approx(by_hand(model, folder, 0.5, "nearest", side=96))


def test_a_checkpoint_that_squashes_images_does_so_unless_a_crop_is_asked_for(
    folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    export(tmp_path / "m", crop_mode="squash")
    for asked, crop in ((None, {"squash": True}), (0.9, {"crop_pct": 0.9})):
        result = run(config(tmp_path / "m", folder, tmp_path / str(asked), crop_pct=asked), accelerator)
        assert result["crop"] == {"size": [64, 64], **crop}


def test_a_test_split_alone_will_do(folder: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    export(tmp_path / "m", classes=CLASSES)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val").symlink_to(folder / "val")
    result = run(config(tmp_path / "m", tmp_path / "data", tmp_path / "out"), accelerator)
    assert result["n_test"] == 27
    whole = run(config(tmp_path / "m", folder / "val", tmp_path / "whole"), accelerator)  # class folders alone
    assert (whole["n_test"], whole["validate/top1"]) == (27, result["validate/top1"])


def test_of_a_runs_own_images_without_a_test_split_the_held_out_ones_are_judged(
    folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    """It has trained on the others; another set is judged whole."""
    export(tmp_path / "m", classes=CLASSES)
    train = PretrainConfig(model=ModelConfig(img_size=64), data=DataConfig(path=str(folder / "train"), workers=0))
    (tmp_path / "m/config.yaml").write_text(to_yaml(config_dict(train)))
    own = run(InputConfig(str(tmp_path / "m")), accelerator)
    assert (own["n_test"], own["test_split"]) == (3, "held-out slice of train")
    named = run(config(tmp_path / "m", f"{folder}/val/../train/", tmp_path / "named"), accelerator)
    assert named["n_test"] == 3  # the same images by another path
    other = run(config(tmp_path / "m", folder / "val", tmp_path / "out"), accelerator)
    assert other["n_test"] == 27


def test_images_that_a_model_was_trained_on_are_known_by_themselves(
    folder: Path, tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an export, of a checkpoint, or by a copy of the set, no path tells."""
    images = open_data(DataConfig(path=str(folder / "train"))).train
    rest, held = held_out(images)
    export(tmp_path / "m", classes=CLASSES, trained_on=images.select(rest).fingerprint)
    shutil.copytree(folder / "train", tmp_path / "copy")
    result = run(config(tmp_path / "m", tmp_path / "copy", tmp_path / "out"), accelerator)
    assert (result["n_test"], result["test_split"]) == (len(held), "held-out slice of train")
    assert "no test" not in capsys.readouterr().out
    export(tmp_path / "all", classes=CLASSES, trained_on=images.fingerprint)
    assert run(config(tmp_path / "all", tmp_path / "copy", tmp_path / "o"), accelerator)["n_test"] == len(images)
    assert "train holds the images that it was trained on: what follows is no test" in capsys.readouterr().out


def test_undecodable_images_are_left_out(broken_folder: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    model = export(tmp_path / "m", classes=CLASSES)
    result = run(config(tmp_path / "m", broken_folder, tmp_path / "out"), accelerator)
    assert result["validate/top1"] == pytest.approx(by_hand(model, broken_folder, 1.0, "bicubic"))
    assert (result["n_test"], result["n_bad"], result["validate/top5"]) == (26, 1, 100.0)


def test_two_checkpoints_are_compared_on_the_same_images(
    folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    export(tmp_path / "a"), export(tmp_path / "b", crop_pct=0.6)
    result = run(config(tmp_path / "a", folder, tmp_path / "out", compare=str(tmp_path / "b")), accelerator)
    alone = run(config(tmp_path / "b", folder, tmp_path / "b_out"), accelerator)
    assert result["compare"]["validate/top1"] == alone["validate/top1"]
    crops = [one["crop"]["crop_pct"] for one in (result, result["compare"])]  # each with its own, and it says so
    assert crops == [1.0, 0.6] and result["compare"]["mcnemar"]["metric"] == "validate/top1"


@pytest.mark.parametrize(
    ("classes", "n", "message"),
    [
        (["green", "blue", "red"], 3, "class 0 is 'green' in the model and 'blue' in the data"),
        (None, 4, "head has 4 classes"),
        (None, 0, "no classification head"),
    ],
)
def test_a_head_of_other_classes_is_refused(
    folder: Path, tmp_path: Path, accelerator: Accelerator, classes: list[str] | None, n: int, message: str
) -> None:
    torch.manual_seed(0)
    model = build_backbone("gcvit_nano", 64, num_classes=n)
    (tmp_path / "m").mkdir()
    write_backbone(tmp_path / "m", model.state_dict(), backbone_info(model, class_names=classes))
    with pytest.raises(UserError, match=message):
        run(config(tmp_path / "m", folder, tmp_path / "out"), accelerator)
    assert not (tmp_path / "out").exists()


def test_specs_without_a_head_and_unknown_timm_names_are_refused(
    folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    for spec, message in (("random", "no trained head"), ("timm:gcvit_xxtinny", "gcvit_xxtiny")):
        with pytest.raises(UserError, match=message) as error:
            run(config(spec, folder, tmp_path / "out"), accelerator)
        assert "\n" not in str(error.value)


def test_timm_weights_that_cannot_be_had_are_one_line(
    folder: Path, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="weights cannot be had") as error:
        run(config("timm:gcvit_xxtiny", folder, tmp_path / "out"), accelerator)
    assert "\n" not in str(error.value) and "checkpoint" in str(error.value)


def test_the_program_refuses_a_key_with_a_typo() -> None:
    with pytest.raises(UserError, match="backbone"):
        main(["backbon=x"])
