"""Weights in timm's and NVlabs' layouts, at other sizes, of other architectures, and hostile ones."""

import argparse
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from timm.models.gcvit import GlobalContextVit
from torch import Tensor

from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.models.convert import describe, from_nvlabs, load_weights, read_state
from gcssl.models.gcvit import GCViT
from gcssl.models.windows import resize_table

NANO = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def nano(seed: int = 0, **kw: object) -> GCViT:
    torch.manual_seed(seed)
    return build_backbone("gcvit_nano", **{"img_size": 64, "num_classes": 5, **kw}).eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- layouts


def test_timms_weights_load() -> None:
    theirs = GlobalContextVit(img_size=64, num_classes=5, **NANO)
    model = nano()
    assert load_weights(model, theirs.state_dict()) == []
    assert same(model.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("layer_scale", [None, 1e-5])
def test_nvlabs_layout_goes_both_ways(layer_scale: float | None, to_nvlabs) -> None:
    source, target = nano(layer_scale=layer_scale), nano(1, layer_scale=layer_scale)
    theirs = to_nvlabs(source.state_dict())
    assert same(from_nvlabs(theirs), source.state_dict())
    assert load_weights(target, theirs) == ["NVlabs' key layout"]
    assert same(target.state_dict(), source.state_dict())


def test_nvlabs_names_are_those_of_the_release(to_nvlabs) -> None:
    """The rules as written down from the released files, not as computed by the code under test."""
    names = nano(layer_scale=0.1).state_dict()
    state = {k: torch.full_like(v, i) for i, (k, v) in enumerate(names.items())}
    theirs = to_nvlabs(state)
    pairs = {
        "patch_embed.proj.bias": "stem.conv1.bias",
        "patch_embed.conv_down.conv.0.weight": "stem.down.conv_block.conv_dw.weight",
        "patch_embed.conv_down.reduction.weight": "stem.down.reduction.weight",
        "patch_embed.conv_down.norm1.bias": "stem.down.norm1.bias",
        "levels.0.downsample.conv.3.weight": "stages.1.downsample.conv_block.conv_pw.weight",
        "levels.2.downsample.norm2.weight": "stages.3.downsample.norm2.weight",
        "levels.0.q_global_gen.to_q_global.2.conv.3.weight":
            "stages.0.global_block.blocks.conv3.conv_pw.weight",
        "levels.1.blocks.0.attn.relative_position_bias_table":
            "stages.1.blocks.0.attn.rel_pos.relative_position_bias_table",
        "levels.3.blocks.1.gamma1": "stages.3.blocks.1.ls1.gamma",
        "levels.3.blocks.1.gamma2": "stages.3.blocks.1.ls2.gamma",
        "levels.2.blocks.1.attn.qkv.weight": "stages.2.blocks.1.attn.qkv.weight",
        "levels.2.blocks.1.mlp.fc2.bias": "stages.2.blocks.1.mlp.fc2.bias",
        "norm.weight": "stages.3.norm.weight",
        "head.bias": "head.fc.bias",
    }  # fmt: skip
    for nv, name in pairs.items():
        assert torch.equal(theirs[nv], state[name]), nv
    linear = theirs["levels.1.downsample.conv.2.fc.2.weight"]
    assert torch.equal(linear[:, :, None, None], state["stages.2.downsample.conv_block.se.fc2.weight"])
    index = theirs["levels.2.blocks.0.attn.relative_position_index"]  # window of 4 x 4: 7 x 7 offsets
    assert index.shape == (16, 16) and index[0, 0] == 24 and index[0, 15] == 0 and index[15, 0] == 48


def test_the_layout_of_june_2022_is_refused(to_nvlabs) -> None:
    theirs = to_nvlabs(nano().state_dict())
    old = {k.replace("q_global_gen.to_q_global", "to_q_global"): v for k, v in theirs.items()}
    with pytest.raises(UserError, match="June 2022"):
        load_weights(nano(), old)


@pytest.mark.parametrize(
    "wrap", ["bare", "state_dict", "model", "module.", "compiled", "ema", "Namespace", "safetensors"]
)
def test_wrappers_and_files(wrap: str, tmp_path: Path) -> None:
    source, other, target = nano().state_dict(), nano(1).state_dict(), nano(2)
    path = tmp_path / "weights.pth.tar"
    prefixed = {f"module.{k}": v for k, v in source.items()}
    content = {
        "bare": source, "state_dict": {"state_dict": source, "epoch": 3}, "model": {"model": source},
        "module.": {"state_dict": prefixed}, "ema": {"state_dict": other, "state_dict_ema": source},
        "compiled": {f"_orig_mod.{k}": v for k, v in prefixed.items()},
        "Namespace": {"state_dict": prefixed, "args": argparse.Namespace(lr=0.1, data="x"), "optimizer": {}},
    }  # fmt: skip
    if wrap == "safetensors":
        path = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(source, path)
    else:
        torch.save(content[wrap], path)
    assert load_weights(target, path) == []
    assert same(target.state_dict(), source)


def test_a_ratio_that_the_hidden_width_rounds_is_its_own() -> None:
    source, target = nano(mlp_ratio=2.7), nano(1, mlp_ratio=2.7)
    load_weights(target, source.state_dict())
    assert same(target.state_dict(), source.state_dict())
    with pytest.raises(UserError, match="mlp_ratio 2.6875 .the model has 3.0."):
        load_weights(nano(), source.state_dict())


# ---- what is said about a state dict


@pytest.mark.parametrize("kw", [{}, {"window_ratio": [16, 16, 16, 32]}, {"layer_scale": 1e-5, "num_classes": 0}])
def test_describe(kw: dict) -> None:
    model = nano(**kw)
    found = describe(model.state_dict())
    assert found == {k: model.model_args[k] for k in found}
    assert describe({"layer1.weight": torch.zeros(1)}) is None


# ---- other sizes, other heads


def test_tables_are_resized_and_said() -> None:
    source, target = nano(), nano(1, img_size=128)
    notes = load_weights(target, source.state_dict())
    assert notes == [
        f"bias tables of stage {i}: {a}x{a} -> {b}x{b} (bicubic)"
        for i, a, b in ((1, 2, 4), (2, 2, 4), (3, 4, 8), (4, 2, 4))
    ]
    equal = [k for k, v in source.state_dict().items() if torch.equal(v, target.state_dict()[k])]
    assert len(equal) == len(source.state_dict()) - 8


def test_tables_are_cropped_where_the_model_asks_for_it() -> None:
    source, target = nano(img_size=128), nano(1, bias_resize="crop")
    notes = load_weights(target, source.state_dict())
    assert notes[0] == "bias tables of stage 1: 4x4 -> 2x2 (crop)"
    name = "stages.0.blocks.0.attn.rel_pos.relative_position_bias_table"
    table, loaded = source.state_dict()[name], target.state_dict()[name]
    assert torch.equal(loaded, resize_table(table, (4, 4), (2, 2), "crop"))
    assert torch.equal(loaded, table.view(7, 7, -1)[2:5, 2:5].flatten(0, 1))  # the nearest offsets, as they were


def test_tables_of_other_window_shapes_need_their_size() -> None:
    source = nano(img_size=(64, 128)).state_dict()
    again = nano(1, img_size=(64, 128))
    assert load_weights(again, source) == []
    with pytest.raises(UserError, match="not square"):
        load_weights(nano(img_size=96), source)
    turned = nano(1, img_size=(128, 64))  # tables of equal length, other meaning
    assert len(load_weights(turned, source, img_size=(64, 128))) == 4
    name = "stages.0.blocks.0.attn.rel_pos.relative_position_bias_table"
    assert not torch.equal(turned.state_dict()[name], source[name])


def test_heads() -> None:
    source = nano(num_classes=7)
    target = nano(1)
    fresh = target.head.fc.weight.clone()
    assert load_weights(target, source.state_dict()) == [
        "head: 7 classes in the file, 5 classes in the model; left fresh"
    ]
    assert torch.equal(target.head.fc.weight, fresh)
    assert load_weights(nano(num_classes=0), source.state_dict()) == [
        "head: 7 classes in the file, no head in the model; ignored"
    ]
    bare = {k: v for k, v in source.state_dict().items() if not k.startswith("head")}
    assert load_weights(nano(), bare) == ["head: no head in the file, 5 classes in the model; left fresh"]


# ---- other architectures


def test_another_architecture_is_refused_and_named() -> None:
    model = nano()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wide = nano(embed_dim=64, depths=[2, 2, 3, 2], num_heads=[2, 4, 8, 16]).state_dict()
    with pytest.raises(UserError, match=r"embed_dim 64 \(the model has 32\).*depths \[2, 2, 3, 2\]") as caught:
        load_weights(model, wide)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="layer scale in the file"):
        load_weights(model, nano(layer_scale=1e-5).state_dict())
    with pytest.raises(UserError, match=r"window_ratio \[32, 32, 16, 32\]"):
        load_weights(model, nano(window_ratio=(16, 16, 16, 32)).state_dict())
    with pytest.raises(UserError, match="not a GC ViT"):
        load_weights(model, {"layer1.0.conv1.weight": torch.zeros(3)})
    cut = {k: v for k, v in before.items() if k != "stages.2.blocks.1.norm2.weight"}
    with pytest.raises(UserError, match=r"1 missing \(stages.2.blocks.1.norm2.weight\)"):
        load_weights(model, cut)
    assert same(model.state_dict(), before)


# ---- hostile and damaged files


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("old_format", [True, False])
@pytest.mark.fault(
    "a malicious pickle beside weights",
    "refused, nothing runs",
)
def test_a_malicious_pickle_runs_nothing(beside: bool, old_format: bool, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    content = {"state_dict": nano().state_dict(), "args": Canary(canary)} if beside else Canary(canary)
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(UserError, match=r"evil.pth: refused: it pickles \S+; only tensors") as caught:
        load_weights(nano(), path)
    assert "\n" not in str(caught.value)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # it does sing


@pytest.mark.fault(
    "an argparse Namespace that holds a malicious object",
    "refused, nothing runs",
)
def test_a_namespace_does_not_smuggle_in_others(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "args": argparse.Namespace(x=Canary(canary))}, path)
    with pytest.raises(UserError, match="refused"):
        read_state(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_and_foreign_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for content in (b"", b"not a checkpoint", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(UserError, match=name) as caught:
            read_state(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read_state(tmp_path / "missing.pth")
    unreadable = tmp_path / f"unreadable{path.suffix}"
    unreadable.symlink_to("/proc/self/mem")  # reading its first byte is an input/output error, for root too
    if unreadable.is_file():
        with pytest.raises(UserError, match="unreadable.*cannot be read|unreadable.*not a readable"):
            read_state(unreadable)
    with pytest.raises(UserError, match="holds no weights"):
        read_state({"epoch": 3})
