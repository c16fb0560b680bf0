"""Exports: timm loads them without gcssl, outputs are equal, nothing is written over or left half done."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import yaml
from safetensors import SafetensorError

from gcssl.checkpoint import save_checkpoint, write_backbone
from gcssl.errors import Failure, UserError
from gcssl.export import ExportConfig, export, largest_difference
from gcssl.models.build import backbone_info, build_backbone
from gcssl.models.load import load_backbone

# what a user of timm runs; gcssl must not be imported by it
READER = """
import json, sys, torch, safetensors.torch, timm
from timm.models.gcvit import GlobalContextVit
for folder in sys.argv[1:]:
    config = json.load(open(folder + "/config.json"))
    result = {}
    if "depths" in config["model_args"]:
        model = GlobalContextVit(num_classes=config["num_classes"], **config["model_args"])
        model.load_state_dict(safetensors.torch.load_file(folder + "/model.safetensors"))
    else:
        model = timm.create_model("local-dir:" + folder, pretrained=True)
        result = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        result["out"] = model.eval()(torch.load(folder + "/images.pt"))
    torch.save(result, folder + "/out.pt")
assert not [m for m in sys.modules if m.split(".")[0] == "gcssl"]
"""

EXPORTS = {
    "head": ("gcvit_xxtiny", {"img_size": (64, 96), "num_classes": 4}),
    "ratio": ("gcvit_xxtiny", {"img_size": 64, "window_ratio": [16, 16, 16, 32]}),
    "ours": ("gcvit_nano", {"img_size": 64, "num_classes": 3, "window_ratio": [16, 16, 16, 32]}),
    "custom": ("gcvit_nano", {"img_size": 96, "layer_scale": 0.1, "depths": [2, 1, 3, 2]}),
}


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def make_run(folder: Path, name: str, **kw: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_backbone(name, **kw).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    classes = [f"class {i}" for i in range(model.num_classes)] or None
    info = backbone_info(model, step=7, objective="simmim", encoder="student", class_names=classes)
    info |= {"mean": MEAN, "std": STD}  # of a run that was given weights with their own
    write_backbone(folder, model.state_dict(), info)
    return model


def test_timm_loads_exports_without_gcssl(tmp_path: Path) -> None:
    models = {}
    for key, (name, kw) in EXPORTS.items():
        models[key] = make_run(tmp_path / f"run_{key}", name, **kw)
        out = export(ExportConfig(str(tmp_path / f"run_{key}"), "timm", str(tmp_path / key)))
        torch.save(torch.randn(2, 3, *models[key].img_size), out / "images.pt")
    subprocess.run([sys.executable, "-c", READER, *EXPORTS], check=True, cwd=tmp_path)
    for key, model in models.items():
        read = torch.load(tmp_path / key / "out.pt")
        with torch.no_grad():
            want = model(torch.load(tmp_path / key / "images.pt"))
        assert (read["out"] - want).abs().max() <= 2e-5 * want.abs().max()
        config = json.loads((tmp_path / key / "config.json").read_text())
        assert config["num_classes"] == model.num_classes
        assert config.get("label_names") == ([f"class {i}" for i in range(model.num_classes)] or None)
        assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]) == (MEAN, STD)
        if key in ("head", "ratio"):  # timm's registry has it: its own transforms follow too
            assert read["crop_pct"] == 1.0 and read["input_size"] == (3, *model.img_size)


@pytest.mark.parametrize("kind", ["timm", "torch"])
@pytest.mark.parametrize("name", ["gcvit_nano", "resnet18"])
def test_exports_load_again_here(kind: str, name: str, tmp_path: Path) -> None:
    model = make_run(tmp_path / "run", name, img_size=64, num_classes=3)
    path = tmp_path / ("out.pt" if kind == "torch" else "out")
    export(ExportConfig(str(tmp_path / "run"), kind, str(path)))
    for spec in (path, path / "model.safetensors") if kind == "timm" else (path,):
        backbone, info = load_backbone(str(spec))
        assert backbone.name == name and info["step"] == 7 and info["class_names"][2] == "class 2"
        for key, value in model.state_dict().items():
            assert torch.equal(backbone.state_dict()[key], value), key
    if (kind, name) == ("torch", "resnet18"):
        timm.create_model(name, num_classes=3).load_state_dict(torch.load(path))
    for file in [path, path.with_suffix(".json")] if kind == "torch" else path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()  # where it came from is nobody's business


@pytest.mark.parametrize("kind, out", [("timm", "out"), ("torch", "out.pt")])
def test_a_full_disk_is_one_line(kind: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("No space left") if kind == "timm" else RuntimeError("unexpected pos 64")

    make_run(tmp_path / "run", "gcvit_nano", img_size=64)
    monkeypatch.setattr("gcssl.export.write_tensors", full)
    monkeypatch.setattr(torch, "save", full)
    cfg = ExportConfig(str(tmp_path / "run"), kind, str(tmp_path / out))
    with pytest.raises((SafetensorError, RuntimeError)):  # on a disk that has room it is something else
        export(cfg)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Failure, match=f"^out: .*{out} cannot be written .*make room on that disk"):
        export(cfg)
    assert not (tmp_path / out).exists()


def test_the_encoder_asked_for_is_exported(tmp_path: Path) -> None:
    """Of a run that is not finished: its checkpoint holds both."""
    encoders = {"encoder": build_backbone("gcvit_nano", img_size=64), "teacher": build_backbone("gcvit_nano", 64)}
    config = {"model": {"name": "gcvit_nano", "img_size": 64}, "objective": {"name": "mocov3"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    tensors = {f"{part}.{k}": v for part, model in encoders.items() for k, v in model.state_dict().items()}
    save_checkpoint(tmp_path, 3, {"model": tensors}, {}, keep=2)
    for asked, part in ((None, "encoder"), ("teacher", "teacher")):
        out = export(ExportConfig(str(tmp_path), "torch", str(tmp_path / f"{part}.pt"), asked))
        found = torch.load(out, weights_only=True)
        assert all(torch.equal(found[k], v) for k, v in encoders[part].state_dict().items())


def test_class_names_without_a_head_of_as_many_are_left_out(tmp_path: Path) -> None:
    """Those of a pretraining's images: timm would take them for the outputs'."""
    model = build_backbone("gcvit_nano", img_size=64)
    write_backbone(tmp_path / "run", model.state_dict(), backbone_info(model, class_names=["a", "b"]))
    export(ExportConfig(str(tmp_path / "run"), "timm", str(tmp_path / "out")))
    assert "label_names" not in json.loads((tmp_path / "out/config.json").read_text())


def test_onnx_runtime_gives_the_same_for_any_number_of_images(tmp_path: Path) -> None:
    model = make_run(tmp_path / "run", "gcvit_nano", img_size=64, num_classes=3, depths=[2, 1, 1, 1])
    path = tmp_path / "a.onnx"
    export(ExportConfig(str(tmp_path / "run"), "onnx", str(path)))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        images = torch.randn(count, 3, 64, 64)
        (read,) = session.run(["output"], {"images": images.numpy()})
        with torch.no_grad():
            want = model(images)
        assert (torch.from_numpy(read) - want).abs().max() <= 2e-5 * want.abs().max()
    told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert told["step"] == 7 and told["class_names"] == [f"class {i}" for i in range(3)] and len(told["mean"]) == 3
    for folder in (tmp_path, Path(__file__).parents[2]):  # no paths of the machine that wrote it
        assert str(folder).encode() not in path.read_bytes()


def test_onnx_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", "gcvit_nano", img_size=64)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript is not installed; pip install 'gcssl\[onnx\]'"):
        export(ExportConfig(str(tmp_path / "run"), "onnx", str(tmp_path / "a.onnx")))


def test_nothing_is_written_over(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "gcvit_nano", img_size=64)
    (tmp_path / "out").mkdir()
    for name in ("a.json", "a.onnx"):
        (tmp_path / name).write_text("mine")
    for kind, out in (("timm", "out"), ("torch", "a.pt"), ("onnx", "a.onnx")):
        with pytest.raises(UserError, match="already there"):
            export(ExportConfig(str(tmp_path / "run"), kind, str(tmp_path / out)))
    for cfg, reason in (
        (ExportConfig("random", "torch", "x"), "ends in .pt"),
        (ExportConfig("random", "onnx", "x.pt"), "ends in .onnx"),
        (ExportConfig("random", "timm", str(tmp_path / "new")), "backbone=random: of which model. pass model.name="),
        (ExportConfig("", "timm", "x"), "backbone: not given"),
        (ExportConfig(str(tmp_path / "run"), "timm", str(tmp_path / "a.json/x")), "a.json is a file"),
    ):
        with pytest.raises(UserError, match=reason):
            export(cfg)
    assert (tmp_path / "a.json").read_text() == (tmp_path / "a.onnx").read_text() == "mine"
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize(
    ("kind", "out"),
    [("timm", "out"), ("torch", "out.pt"), pytest.param("onnx", "out.onnx", marks=pytest.mark.slow)],
)
def test_a_difference_stops_the_export(kind: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", "gcvit_nano", img_size=64)
    monkeypatch.setattr("gcssl.export.TOLERANCE", -1.0)
    with pytest.raises(UserError, match="differ by"):
        export(ExportConfig(str(tmp_path / "run"), kind, str(tmp_path / out)))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_wrong_weight_is_seen() -> None:
    model = build_backbone("gcvit_nano", img_size=64).eval()
    other = build_backbone("gcvit_nano", img_size=64).eval()
    other.load_state_dict(model.state_dict())
    assert largest_difference(model, other) == 0
    other.stages[2].blocks[1].attn.rel_pos.relative_position_bias_table.data += torch.arange(49)[:, None] * 1e-2
    with pytest.raises(UserError, match="differ"):
        largest_difference(model, other)
    other.stem.conv1.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="differ"):
        largest_difference(model, other)


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [("timm", "x.pth", "writes a folder"), ("torch", "x.onnx", "ends in .pt"), ("onnx", "folder", "ends in .onnx")],
)
def test_a_name_of_another_format_is_refused(tmp_path: Path, kind: str, name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        export(ExportConfig("random", kind, str(tmp_path / name)))
    assert not any(tmp_path.iterdir())
