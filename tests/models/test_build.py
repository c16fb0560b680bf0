"""Backbones by name, timm's behind the same interface."""

import pytest
import timm
import torch

import gcssl
from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.models.build import BACKBONES, build_backbone
from gcssl.models.timm_backbone import TimmBackbone
from gcssl.ssl.base import Setup
from gcssl.ssl.simmim import SimMIM, SimMIMConfig

# ---- names


def test_timm_knows_every_variant_after_the_import() -> None:
    assert gcssl.__version__ == "0.1.0"
    assert set(BACKBONES) <= set(timm.list_models("gcvit*"))
    with torch.device("meta"):
        for name in ("gcvit_nano", "gcvit_tiny2", "gcvit_small2", "gcvit_large", "gcvit_xxtiny_384"):
            ours, theirs = build_backbone(name, num_classes=1000), timm.create_model(name)
            assert type(theirs).__name__ == "GlobalContextVit"
            shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
            assert shapes[0] == shapes[1], name


def test_unknown_names_and_arguments() -> None:
    with pytest.raises(UserError, match="model.name=gcvit_tny: .*nearest: gcvit_tiny"):
        build_backbone("gcvit_tny")
    with pytest.raises(UserError, match="window_ratio concerns GC ViT alone"):
        build_backbone("resnet18", window_ratio=[16, 16, 16, 32])
    with pytest.raises(UserError, match="model.bias_resize=crop: concerns GC ViT alone, not resnet18; leave it out"):
        build_backbone("resnet18", bias_resize="crop")
    for size in ("64", [64], (64, 64, 64), 0, 64.0, [64, "a"]):
        with pytest.raises(UserError, match="image size"):
            build_backbone("gcvit_nano", img_size=size)


# ---- timm's models

WRAPPED = {
    "vit_tiny_patch16_224": (64, 16, (192,)),
    "swin_tiny_patch4_window7_224": (64, 32, (96, 192, 384, 768)),
    "convnext_atto": (64, 32, (40, 80, 160, 320)),
    "resnet18": (64, 32, (64, 64, 128, 256, 512)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_timm_models_have_the_same_interface(name: str) -> None:
    size, stride, channels = WRAPPED[name]
    model = build_backbone(name, img_size=size, drop_path=0.1).eval()
    assert isinstance(model, TimmBackbone) and model.n_noise == 0 and model.model_args["drop_path"] == 0.1
    assert (model.stride, model.channels) == (stride, channels)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        pooled, maps = model.pooled(x), model.forward_pyramid(x)
        assert model(x, None).shape == pooled["last"].shape == (2, model.num_features)
        assert model.forward_features(x, None, None).shape == (
            2,
            channels[-1],
            size // stride,
            size // stride,
        )
        assert [m.shape[1] for m in maps] == list(channels)
        assert torch.equal(maps[-1], model.forward_features(x))
        larger = torch.randn(1, 3, 2 * size, size)
        assert model.forward_features(larger).shape[2:] == (2 * size // stride, size // stride)
    assert ("stages34" in pooled) == (len(channels) > 1)
    ids, names = model.layer_ids(), {n for n, _ in model.named_parameters()}
    assert ids.keys() == names and min(ids.values()) == 0 and max(ids.values()) > 3
    if name.startswith("vit"):
        assert {"model.pos_embed", "model.cls_token"} <= model.no_weight_decay()
    with pytest.raises(UserError, match=f"multiples of {stride}"):
        model(torch.randn(1, 3, size, size - 8))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


def test_what_forward_features_leaves_out_can_be_frozen() -> None:
    model = build_backbone("convnext_atto", 64, drop_path=0.1).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert model.freeze_unused() == ["head.norm.weight", "head.norm.bias"]
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.forward_features(torch.randn(2, 3, 64, 64)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None) == ("head.norm" not in name), name
    assert build_backbone("resnet18", 64).freeze_unused() == []
    with torch.device("meta"):
        assert build_backbone("convnext_atto", 64).freeze_unused() == []


def test_simmim_trains_every_parameter_that_it_leaves_trainable(capsys: pytest.CaptureFixture[str]) -> None:
    """What DistributedDataParallel asks of a model."""
    objective = SimMIM(SimMIMConfig(), build_backbone("convnext_atto", 64), Setup(AugmentConfig(), (64, 64), 1, 1))
    assert "head.norm.weight, head.norm.bias" in capsys.readouterr().out
    batch = {"views": [torch.randn(2, 3, 64, 64)], "masks": [torch.rand(2, 8, 8) > 0.5]}
    objective(batch, 0)["loss"].backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
