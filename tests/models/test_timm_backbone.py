"""The wrapper around timm's models: the map it promises, sizes it refuses, what trying a model out leaves behind."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gcssl.checkpoint import write_backbone
from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.models.build import backbone_info, build_backbone
from gcssl.models.load import AskedModel, load_backbone
from gcssl.models.timm_backbone import TimmBackbone
from gcssl.ssl.base import Setup
from gcssl.ssl.byol import BYOL, BYOLConfig
from gcssl.ssl.objectives import OBJECTIVES


def wrapped(name: str, size: int = 64, **kw: object) -> TimmBackbone:
    torch.manual_seed(0)
    model = build_backbone(name, size, **kw)
    assert isinstance(model, TimmBackbone)
    return model.eval()


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mobilenetv2_035", "fastvit_t8", "mambaout_femto"])
def test_a_head_that_widens_the_features_is_run_at_every_position(name: str) -> None:
    model = wrapped(name)
    stated = model.model.feature_info[-1]["num_chs"]
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = model.forward_pyramid(x)
        assert stated < model.num_features == model.channels[-1] == maps[-1].shape[1]
        assert [m.shape[1:] for m in maps] == [
            (c, 64 // s, 64 // s) for c, s in zip(model.channels, model.strides, strict=True)
        ]
        torch.testing.assert_close(model.forward_features(x), maps[-1])
        one = torch.randn(2, 3, 32, 32)  # its map has one position, so its mean is the pooled feature
        torch.testing.assert_close(model.forward_features(one).flatten(1), model(one))
    assert model.freeze_unused() == []


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_the_last_map_is_normed_as_the_pooled_features_are(name: str) -> None:
    model, x = wrapped(name), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.model.norm.bias.fill_(7.0)
        assert model.forward_features(x).mean().sub(7).abs() < 1e-4
        assert model.pooled(x)["last"].mean().sub(7).abs() < 1e-4


@pytest.mark.parametrize(
    "name", ["fastvit_t8", "hiera_tiny_224", "pit_ti_224", "swin_tiny_patch4_window7_224", "resnet18"]
)
def test_pooled_features_are_those_of_timms_head_and_of_the_maps(name: str) -> None:
    model, x = wrapped(name), torch.randn(2, 3, 64, 64)
    runs: list[int] = []
    next(model.model.children()).register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        features = model.pooled(x)
        assert len(runs) == 1  # the images went through once
        torch.testing.assert_close(
            features["last"], model.model.forward_head(model.model.forward_features(x), pre_logits=True)
        )
        means = [m.mean((2, 3)) for m in model.forward_pyramid(x)[-2:]]
        torch.testing.assert_close(features["stages34"], torch.cat(means, 1))


def test_maps_that_do_not_tile_the_image_are_left_out() -> None:
    model = wrapped("pit_ti_224")
    assert [level["reduction"] for level in model.model.feature_info] == [8, 16, 32]  # of 7 x 7, 4 x 4 and 2 x 2
    assert (model.strides, model.channels) == ((16, 32), (128, 256))
    maps = model.forward_pyramid(torch.randn(1, 3, 64, 64))
    assert [m.shape for m in maps] == [(1, 128, 4, 4), (1, 256, 2, 2)]
    cls, schema = OBJECTIVES["localmim"]
    batch = {"views": [torch.randn(2, 3, 64, 64)], "masks": [torch.arange(32).view(2, 4, 4) % 4 > 0]}
    assert cls(schema(mask_unit=16), model, Setup(AugmentConfig(), (64, 64), 1, 1))(batch, 0)["loss"].isfinite()


def test_hieras_map_has_no_norm_and_its_heads_norm_is_frozen() -> None:
    model = wrapped("hiera_tiny_224")
    assert model.no_map is None and model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 768, 2, 2)
    assert model.freeze_unused() == ["head.norm.weight", "head.norm.bias"]


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("crossvit_tiny_240", 240, "timm states no pyramid of maps"),
        ("efficientvim_m1", 64, "its head pools several maps"),
        ("inception_v3", 96, "its last map is "),
    ],
)
def test_without_a_map_pooled_features_serve_and_what_needs_a_map_is_refused(name: str, size: int, why: str) -> None:
    model = wrapped(name, size)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert model(x).shape == (2, model.num_features)
        assert model.pooled(x).keys() == {"last"}
    assert backbone_info(model)["num_features"] == model.num_features
    for call in (model.forward_features, model.forward_pyramid):
        with pytest.raises(UserError, match=rf"model.name={name}: has no map .*\({why}.* or another backbone$"):
            call(x)
    for objective in ("simmim", "localmim", "ummae"):
        cls, schema = OBJECTIVES[objective]
        with pytest.raises(UserError, match=f"model.name={name}: has no map"):
            cls(schema(mask_unit=16), model, Setup(AugmentConfig(), (size, size), 1, 1))


def test_a_size_that_timms_model_does_not_take_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="halonet26t does not run on 64x64 images .* its own is 256x256$") as built:
        wrapped("halonet26t")
    model = wrapped("convit_tiny")
    for call in (model, model.forward_features, model.pooled):
        with pytest.raises(UserError, match="32x32: convit_tiny built for 64x64 images does not take it") as run:
            call(torch.randn(1, 3, 32, 32))
        assert "\n" not in str(built.value) + str(run.value)


def test_faults_at_the_models_own_size_and_a_full_memory_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("test_vit")

    def fail(error: Exception) -> nn.Module:
        def forward(_: torch.Tensor) -> torch.Tensor:
            raise error

        monkeypatch.setattr(model.model, "forward", forward)
        return model

    with pytest.raises(RuntimeError, match="a fault"):
        fail(RuntimeError("a fault"))(torch.randn(1, 3, 64, 64))
    with pytest.raises(torch.OutOfMemoryError):
        fail(torch.OutOfMemoryError("full"))(torch.randn(1, 3, 32, 32))


def test_trying_a_model_out_leaves_nothing_behind() -> None:
    """LeViT keeps its biases in eval mode: a model tried out in place would go on with those it was born with."""
    model, x = wrapped("levit_128s"), torch.randn(1, 3, 64, 64)
    for act in (lambda: None, model.freeze_unused):
        act()
        fresh = wrapped("levit_128s")
        for one in (model, fresh):
            for name, parameter in one.named_parameters():
                nn.init.constant_(parameter, 0.1) if "attention_biases" in name else None
        modules = [module for m in (model, fresh) for module in m.modules() if hasattr(module, "attention_bias_cache")]
        assert modules and not any(module.attention_bias_cache for module in modules)
        with torch.no_grad():
            assert torch.equal(model(x), fresh(x))
        model.train().eval()


def test_a_teacher_that_keeps_its_biases_follows_its_student() -> None:
    student, x = wrapped("levit_128s"), torch.randn(1, 3, 64, 64)
    objective = BYOL(
        BYOLConfig(hidden_dim=8, out_dim=4, momentum=0.0), student, Setup(AugmentConfig(), (64, 64), 10**9, 1)
    )
    objective.eval()  # one image is no batch for its norms
    with torch.no_grad():
        objective.teacher(x)
        for name, parameter in student.named_parameters():
            nn.init.normal_(parameter) if "attention_biases" in name else None
        objective.after_step(0)
        assert torch.allclose(objective.teacher(x), student.eval()(x), atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"])
def test_saved_weights_serve_at_another_image_size(name: str, tmp_path: Path) -> None:
    saved = wrapped(name)
    write_backbone(tmp_path, saved.state_dict(), backbone_info(saved))
    larger, info = load_backbone(str(tmp_path), AskedModel(img_size=128))
    assert larger.img_size == (128, 128) and len(info["notes"]) == 1 and "resized as timm does" in info["notes"][0]
    x = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert larger.eval()(x).shape == (1, saved.num_features)
        if name == "test_vit":  # its own resizing, on the fly, is the same
            torch.testing.assert_close(larger(x), saved(x))
    again, info = load_backbone(str(tmp_path), AskedModel())
    assert info["notes"] == [] and torch.equal(again.eval()(x[..., :64, :64]), saved(x[..., :64, :64]))


def test_positions_of_images_that_are_not_square_are_not_resized(tmp_path: Path) -> None:
    """timm's rule takes them for a square of as many."""
    saved = build_backbone("test_vit", img_size=(64, 256)).eval()
    write_backbone(tmp_path, saved.state_dict(), backbone_info(saved))
    with pytest.raises(UserError, match=r"1 of other shape \(model.pos_embed"):
        load_backbone(str(tmp_path), AskedModel(img_size=64))


def test_tables_that_no_rule_resizes_are_refused(tmp_path: Path) -> None:
    saved = wrapped("convit_tiny")
    write_backbone(tmp_path, saved.state_dict(), backbone_info(saved))
    with pytest.raises(UserError, match=r"1 of other shape \(model.pos_embed"):
        load_backbone(str(tmp_path), AskedModel(img_size=128))


def test_checkpointing_is_refused_where_statistics_would_be_updated_twice() -> None:
    with pytest.raises(UserError, match="^model.grad_checkpointing=true: resnet18 has batch norm"):
        build_backbone("resnet18", 64, grad_checkpointing=True)
    assert build_backbone("convnext_atto", 64, grad_checkpointing=True).model_args["grad_checkpointing"]
