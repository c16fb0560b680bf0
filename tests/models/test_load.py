"""Backbones back from files, run folders and timm's published weights."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import Tensor

from gcssl.checkpoint import save_checkpoint, write_backbone
from gcssl.config import ModelConfig
from gcssl.errors import UserError
from gcssl.models.build import BACKBONES, backbone_info, build_backbone, from_config
from gcssl.models.gcvit import GCViT
from gcssl.models.load import AskedModel, Saved, check_asked, load_backbone, read_weights_file

CONFIG = ModelConfig()


def nano(seed: int = 0, **kw: object) -> GCViT:
    torch.manual_seed(seed)
    return build_backbone("gcvit_nano", **{"img_size": 64, **kw}).eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_random_is_one_model_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    first, info = load_backbone("random", CONFIG)
    drawn = torch.rand(1)
    again, _ = load_backbone("random", CONFIG)
    assert same(first.state_dict(), again.state_dict())
    torch.manual_seed(0)
    assert same(first.state_dict(), from_config(CONFIG).state_dict())  # seed 0, as is promised
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    torch.manual_seed(5)
    none, _ = load_backbone("none", CONFIG)
    torch.manual_seed(5)
    assert same(none.state_dict(), load_backbone("none", CONFIG)[0].state_dict())
    assert not same(none.state_dict(), first.state_dict())
    assert info["name"] == "gcvit_nano" and info["mean"] == [0.485, 0.456, 0.406] and info["crop_pct"] == 1.0


def run_folder(path: Path, **state: str) -> tuple[GCViT, GCViT]:
    """A run as pretraining leaves it after a kill: config and checkpoints, no backbone yet."""
    student, teacher = nano(1, window_ratio=[16, 16, 16, 32]), nano(2, window_ratio=[16, 16, 16, 32])
    config = {"model": {"name": "gcvit_nano", "img_size": 64, "window_ratio": [16, 16, 16, 32]}}
    config |= {"objective": {"name": "mocov3"}, "encoder": None}
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    for step, offset in ((3, 1.0), (6, 0.0)):
        tensors = {f"encoder.{k}": v + offset for k, v in student.state_dict().items()}
        tensors |= {f"teacher.{k}": v + offset for k, v in teacher.state_dict().items()}
        save_checkpoint(path, step, {"model": tensors}, state, keep=2)
    return student, teacher


def test_a_fine_tuned_run_that_is_not_finished_gives_the_average_that_it_judges(tmp_path: Path) -> None:
    raw, average = nano(1, num_classes=3), nano(2, num_classes=3)
    config = {"model": {"name": "gcvit_nano", "img_size": 64}, "encoder": "teacher"}  # of the run it began from
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    tensors = {f"encoder.{k}": v for k, v in raw.state_dict().items()}
    tensors |= {f"ema.module.{k}": v for k, v in average.state_dict().items()}
    save_checkpoint(tmp_path, 3, {"model": tensors}, {"num_classes": 3}, keep=2)
    backbone, info = load_backbone(str(tmp_path))
    assert same(backbone.state_dict(), average.state_dict()) and info["encoder"] == "ema"
    with pytest.raises(UserError, match="no student encoder; leave encoder out"):
        load_backbone(str(tmp_path), encoder="student")


def test_a_new_run_pools_its_queries_as_its_weights_did(tmp_path: Path) -> None:
    """One level of pooling and none have the same weights."""
    backbone = nano(window_ratio=[32, 32, 16, 32])
    write_backbone(tmp_path, backbone.state_dict(), backbone_info(backbone))
    with pytest.raises(UserError, match=r"window_ratio \[32, 32, 16, 32\], \[32, 32, 32, 32\] pools"):
        load_backbone(str(tmp_path), ModelConfig(window_ratio=[32, 32, 32, 32]), exact=True)
    load_backbone(str(tmp_path), ModelConfig(img_size=96, window_ratio=[32, 32, 16, 32]), exact=True)
    torch.save(backbone.state_dict(), tmp_path / "bare.pth")  # its tables alone tell the ratio
    with pytest.raises(UserError, match=r"bare.pth has window_ratio \[32, 32, 16, 32\], \[32, 32, 32, 32\] pools"):
        load_backbone(str(tmp_path / "bare.pth"), ModelConfig(window_ratio=[32, 32, 32, 32]), exact=True)
    for own, other, told in (
        (None, [16, 16, 16, 32], "set model.window_ratio=null$"),
        ([16, 16, 16, 32], [32, 32, 16, 32], r"set model.window_ratio=\[16,16,16,32\]$"),
    ):
        torch.save(nano(window_ratio=own).state_dict(), tmp_path / "bare.pth")
        with pytest.raises(UserError, match=told):
            load_backbone(str(tmp_path / "bare.pth"), ModelConfig(window_ratio=other), exact=True)
    wide = nano(img_size=(64, 96), window_ratio=[32, 32, 32, 32])
    torch.save(wide.state_dict(), tmp_path / "wide.pth")  # whose tables do not
    load_backbone(str(tmp_path / "wide.pth"), ModelConfig(img_size=[64, 96], window_ratio=[32, 32, 32, 32]), exact=True)


def test_a_description_may_give_one_side(tmp_path: Path) -> None:
    backbone = nano(img_size=96)
    info = backbone_info(backbone)
    write_backbone(tmp_path, backbone.state_dict(), {**info, "model_args": {**info["model_args"], "img_size": 96}})
    assert load_backbone(str(tmp_path))[0].img_size == (96, 96)


def test_unfinished_runs_and_single_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = run_folder(tmp_path / "run")
    backbone, info = load_backbone(str(tmp_path / "run"))
    assert same(backbone.state_dict(), student.state_dict())
    assert (info["step"], info["objective"], info["encoder"]) == (6, "mocov3", "student")
    assert "run: the run has not ended; its newest checkpoint is taken, of step 6\n" in capsys.readouterr().out
    backbone, info = load_backbone(str(tmp_path / "run"), encoder="teacher")
    assert same(backbone.state_dict(), teacher.state_dict()) and info["encoder"] == "teacher"
    one = tmp_path / "run" / "checkpoints" / "step_00000003"
    capsys.readouterr()
    backbone, info = load_backbone(str(one))
    assert capsys.readouterr().out == ""
    assert info["step"] == 3 and torch.equal(backbone.stem.conv1.bias, student.stem.conv1.bias + 1)
    with pytest.raises(UserError, match="encoder=both"):
        load_backbone(str(tmp_path / "run"), encoder="both")


def test_an_unfinished_run_gives_the_encoder_that_its_objective_prefers(tmp_path: Path) -> None:
    _, teacher = run_folder(tmp_path / "run", default_encoder="teacher")
    backbone, info = load_backbone(str(tmp_path / "run"))
    assert same(backbone.state_dict(), teacher.state_dict()) and info["encoder"] == "teacher"


def test_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, _ = run_folder(tmp_path / "run")
    info = backbone_info(student, step=6, objective="mocov3", encoder="student", class_names=["a", "b"])
    write_backbone(tmp_path / "run", student.state_dict(), info)
    config = AskedModel(drop_path=0.2, grad_checkpointing=True)
    backbone, found = load_backbone(str(tmp_path / "run"), config)
    assert same(backbone.state_dict(), student.state_dict())
    assert backbone.drop_path == 0.2 and backbone.window_ratio == (16, 16, 16, 32)
    assert found["class_names"] == ["a", "b"] and found["step"] == 6 and found["name"] == "gcvit_nano"
    assert load_backbone(str(tmp_path / "run"), encoder="teacher")[1]["encoder"] == "teacher"
    larger, found = load_backbone(str(tmp_path / "run"), AskedModel(img_size=96))
    assert larger.img_size == (96, 96) and found["img_size"] == [96, 96] and len(found["notes"]) == 4
    assert "bias tables of stage 1" in capsys.readouterr().out
    exact, _ = load_backbone(
        str(tmp_path / "run"), ModelConfig(img_size=128, window_ratio=[16, 16, 16, 32]), exact=True
    )
    assert exact.img_size == (128, 128)
    for wrong in (AskedModel("gcvit_tiny"), AskedModel(window_ratio=[32, 32, 16, 32]), AskedModel(in_chans=4)):
        with pytest.raises(UserError, match="was asked for"):
            load_backbone(str(tmp_path / "run"), wrong)
    with pytest.raises(UserError, match="another architecture"):
        load_backbone(str(tmp_path / "run"), ModelConfig(name="gcvit_xxtiny"), exact=True)


def test_what_is_asked_is_done_or_refused_and_what_is_not_asked_is_the_saved_ones_own(tmp_path: Path) -> None:
    saved = nano(1, img_size=96, bias_resize="crop")
    write_backbone(tmp_path, saved.state_dict(), backbone_info(saved))
    for nothing in (None, AskedModel()):
        backbone, _ = load_backbone(str(tmp_path), nothing)
        assert backbone.img_size == (96, 96) and backbone.model_args["bias_resize"] == "crop"
    backbone, _ = load_backbone(str(tmp_path), AskedModel(img_size=64, bias_resize="bicubic"))  # ModelConfig's defaults
    assert backbone.img_size == (64, 64) and backbone.model_args["bias_resize"] == "bicubic"
    assert load_backbone(str(tmp_path), AskedModel(name="gcvit_nano"))[0].img_size == (96, 96)


def test_variants_of_equal_depth_are_not_taken_for_each_other() -> None:
    with torch.device("meta"):  # tiny, small, base and large have the same depths
        tiny, nano_ = build_backbone("gcvit_tiny"), build_backbone("gcvit_nano")
    for model in (tiny, nano_):
        saved = Saved({}, model.name, model.model_args, {})
        check_asked("x", saved, AskedModel(name=model.name))
        for other in BACKBONES.keys() - {model.name, f"{model.name}_384", f"{model.name}_512"}:
            with pytest.raises(UserError, match=f"model.name={other} was asked for"):
                check_asked("x", saved, AskedModel(name=other))
    check_asked("x", Saved({}, "gcvit_tiny", tiny.model_args, {}), AskedModel(name="gcvit_tiny_384"))


def test_a_run_of_another_version_loads(tmp_path: Path) -> None:
    student, _ = run_folder(tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("name: gcvit_nano", "name: gcvit_nano\n  new_key: 3"))
    assert same(load_backbone(str(tmp_path / "run"))[0].state_dict(), student.state_dict())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"name": "gcvit_nano"}', "\xff"])
def test_damaged_descriptions_are_one_line(content: str, tmp_path: Path) -> None:
    model = nano()
    write_backbone(tmp_path / "run", model.state_dict(), backbone_info(model))
    run_folder(tmp_path / "cut")
    (tmp_path / "timm").mkdir()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    raw = content.encode("latin-1")
    for name in ("run/backbone.json", "cut/config.yaml", "timm/config.json", "a.json"):
        (tmp_path / name).write_bytes(raw)
    for name in ("run", "cut", "timm", *(["a.pt"] if content != "{}" and "name" not in content else [])):
        with pytest.raises(UserError) as error:
            load_backbone(str(tmp_path / name))
        assert "\n" not in str(error.value) and name.removesuffix("pt") in str(error.value)


@pytest.mark.parametrize(
    ("name", "crop"),
    [("xxtiny", 1.0), ("xtiny", 0.875), ("tiny", 1.0), ("small", 0.875), ("base", 1.0), ("large", 1.0)],
)
def test_nvidias_releases_are_judged_with_the_crops_they_were(
    name: str, crop: float, to_nvlabs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with torch.device("meta"):
        state = to_nvlabs(build_backbone(f"gcvit_{name}", num_classes=1000).state_dict())
    monkeypatch.setattr("gcssl.models.load.read_state", lambda _: state)
    saved = read_weights_file(tmp_path / "a.pth.tar")
    assert (saved.name, saved.info["crop_pct"], saved.info["crop_mode"]) == (f"gcvit_{name}", crop, "center")


def test_raw_checkpoints_say_what_they_are(tmp_path: Path, to_nvlabs) -> None:
    model = build_backbone("gcvit_xxtiny", img_size=96, num_classes=3, window_ratio=[16, 16, 16, 32])
    torch.save({"state_dict": model.state_dict()}, tmp_path / "timm.pth")
    torch.save({"state_dict": to_nvlabs(model.state_dict())}, tmp_path / "nvlabs.pth.tar")
    torch.save({"state_dict": to_nvlabs(nano(img_size=384).state_dict())}, tmp_path / "large.pth.tar")
    _, large = load_backbone(str(tmp_path / "large.pth.tar"))
    assert (large["img_size"], large["crop_pct"], large["crop_mode"]) == ([384, 384], 1.0, "squash")
    for name, crop in (("timm.pth", 0.875), ("nvlabs.pth.tar", 1.0)):
        backbone, info = load_backbone(str(tmp_path / name))
        assert same(backbone.state_dict(), model.state_dict())
        assert info["name"] == backbone.name == "gcvit_xxtiny" and info["crop_pct"] == crop
        assert info.get("crop_mode") != "squash"
        assert backbone.img_size == (96, 96) and backbone.num_classes == 3
    resnet = timm.create_model("resnet18", num_classes=0)
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    backbone, _ = load_backbone(str(tmp_path / "resnet.pth"), ModelConfig(name="resnet18"))
    assert same(backbone.model.state_dict(), resnet.state_dict())
    with pytest.raises(UserError, match="not a GC ViT"):
        load_backbone(str(tmp_path / "resnet.pth"))


def test_what_timm_says_of_its_weights_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights of one model differ in it, here in a copy of timm's own entry."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    told = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9, "interpolation": "bilinear"}
    own = dataclasses.replace(timm.get_pretrained_cfg("gcvit_xxtiny"), **told)
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, own.architecture, own)
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, f"{own.architecture}.{own.tag}", own)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(timm.create_model("gcvit_xxtiny").state_dict(), tmp_path / "hub/checkpoints" / Path(own.url).name)
    backbone, info = load_backbone("timm:gcvit_xxtiny")
    assert {key: info[key] for key in told} == told and backbone.mean == told["mean"]


def test_weights_that_timm_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in torch's cache, as after a download: by every program, resized, and for a new run."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = timm.create_model("gcvit_xxtiny")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = timm.get_pretrained_cfg("gcvit_xxtiny").url
    torch.save(theirs.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    backbone, info = load_backbone("timm:gcvit_xxtiny", AskedModel(drop_path=0.2))
    assert same(backbone.state_dict(), theirs.state_dict())
    assert (info["name"], info["crop_pct"], info["source"]) == ("gcvit_xxtiny", 0.875, "timm:gcvit_xxtiny")
    assert backbone.drop_path == 0.2 and backbone.num_classes == 1000 and backbone.img_size == (224, 224)
    smaller, _ = load_backbone("timm:gcvit_xxtiny", AskedModel(img_size=96))
    assert smaller.img_size == (96, 96)
    new, _ = load_backbone("timm:gcvit_xxtiny", ModelConfig("gcvit_xxtiny", 96), exact=True)
    assert new.num_classes == 0 and torch.equal(new.stem.conv1.weight, theirs.stem.conv1.weight)


def test_wrapped_models_keep_the_mean_that_their_weights_were_trained_with(
    tmp_path: Path,
) -> None:
    backbone = build_backbone("vit_tiny_patch16_224", 224)
    backbone.mean, backbone.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    write_backbone(tmp_path, backbone.state_dict(), backbone_info(backbone))
    again, _ = load_backbone(str(tmp_path))
    assert again.mean == (0.1, 0.2, 0.3) and again.std == (0.4, 0.5, 0.6)


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=str(path)) as caught:
            load_backbone(str(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", [None, 5, ""])
def test_what_names_no_backbone_is_refused(spec: object) -> None:
    with pytest.raises(UserError, match="^backbone: .*given.*expected a run folder, a checkpoint, a file"):
        load_backbone(spec)  # type: ignore[arg-type]


def test_a_path_names_a_backbone_too(tmp_path: Path) -> None:
    model = nano()
    write_backbone(tmp_path, model.state_dict(), backbone_info(model))
    assert same(load_backbone(tmp_path)[0].state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["nope", ""])
def test_unknown_names_get_few_suggestions(name: str) -> None:
    with pytest.raises(UserError, match="nearest: [^,]*, [^,]*, [^,]*$"):
        load_backbone(f"timm:{name}")
