"""GC ViT against timm's class, the measured table of parameters and MACs, and its own promises."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gcssl.errors import UserError
from gcssl.models.build import BACKBONES, build_backbone
from gcssl.models.gcvit import GCViT, attend
from gcssl.plan import saved_mib

NANO = {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter drawn, so that no term is hidden by a zero bias, a unit norm or a tiny layer scale."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = 0.5 * noise + (1 if p.ndim == 1 else 0) if p.ndim == 1 else noise / max(1, p[0].numel()) ** 0.5
    return model.eval()


def images(size: int | tuple[int, int] = 64, n: int = 2, seed: int = 0) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def nano(**kw: object) -> GCViT:
    torch.manual_seed(0)
    return build_backbone("gcvit_nano", **{"img_size": 64, **kw})


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- timm


def check_equals_timm(ours: GCViT, theirs: nn.Module, size: int | tuple[int, int]) -> None:
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())  # strict
    theirs.load_state_dict(ours.state_dict())
    x = images(size)
    with torch.no_grad():
        want = theirs(x)
        assert want.std() > 1e-3
        assert relative(ours.eval()(x), want) <= 2e-5
        maps = theirs.forward_intermediates(x, intermediates_only=True)
        for a, b in zip(ours.forward_pyramid(x), maps, strict=True):
            assert a.shape == b.shape
            assert relative(a, b) <= 2e-5
        assert relative(ours.forward_features(x), theirs.forward_features(x)) <= 2e-5


@pytest.mark.parametrize(
    "size", [32, 64, 96, 128, (64, 96), (128, 64), pytest.param(192, marks=pytest.mark.slow),
             pytest.param(256, marks=pytest.mark.slow), pytest.param(384, marks=pytest.mark.slow)],
)  # fmt: skip
def test_equals_timm_at_any_size(size: int | tuple[int, int]) -> None:
    check_equals_timm(nano(img_size=size, num_classes=7), GlobalContextVit(img_size=size, num_classes=7, **NANO), size)


@pytest.mark.parametrize("ratio", [(16, 16, 16, 32), (8, 16, 32, 32), (64, 32, 16, 64)])
def test_equals_timm_at_other_window_ratios(ratio: tuple[int, ...]) -> None:
    size = 64 if max(ratio) == 64 else 96
    theirs = GlobalContextVit(img_size=size, num_classes=3, window_ratio=ratio, **NANO)
    check_equals_timm(nano(img_size=size, num_classes=3, window_ratio=ratio), theirs, size)


def test_equals_timm_with_layer_scale() -> None:
    theirs = GlobalContextVit(img_size=64, num_classes=3, layer_scale=1e-5, **NANO)
    check_equals_timm(nano(num_classes=3, layer_scale=1e-5), theirs, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gcvit_xxtiny", "gcvit_xtiny", "gcvit_tiny", "gcvit_small", "gcvit_base"])
def test_equals_timms_variants_at_224(name: str) -> None:
    check_equals_timm(build_backbone(name, num_classes=1000), timm.create_model(name), 224)


def test_gradients_equal_timms() -> None:
    theirs = randomise(GlobalContextVit(img_size=64, num_classes=5, **NANO))
    ours = nano(num_classes=5)
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        model(images()).square().mean().backward()
    want = {n: p.grad for n, p in theirs.named_parameters()}
    scale = max(g.abs().max() for g in want.values())
    for n, p in ours.named_parameters():
        assert (p.grad - want[n]).abs().max() <= 1e-4 * want[n].abs().max() + 1e-7 * scale, n


# ---- the measured table (parameters with 1000 classes, GMACs)

TABLE = {
    "gcvit_xxtiny": (11_995_428, 2.121), "gcvit_xtiny": (19_981_294, 2.913),
    "gcvit_tiny": (28_221_974, 4.761), "gcvit_tiny2": (34_535_654, 6.178),
    "gcvit_small": (51_092_173, 8.530), "gcvit_small2": (68_615_197, 11.538),
    "gcvit_base": (90_320_836, 14.816), "gcvit_large": (202_075_570, 32.555),
    "gcvit_large_384": (202_860_610, 103.94), "gcvit_large_512": (203_795_362, 202.14),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_parameters_and_macs(name: str) -> None:
    with torch.device("meta"):
        model = build_backbone(name, num_classes=1000).eval()
        x = torch.empty(1, 3, *model.img_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        body = build_backbone(name)
    assert sum(p.numel() for p in model.parameters()) == TABLE[name][0]
    assert (
        sum(p.numel() for p in body.parameters()) == TABLE[name][0] - 1001 * 1000 + (1000 - model.num_features) * 1000
    )
    assert counter.get_total_flops() / 2e9 == pytest.approx(TABLE[name][1], rel=0.005)


def test_windows_of_the_large_forms() -> None:
    with torch.device("meta"):
        assert build_backbone("gcvit_tiny_384").windows == [(12, 12), (12, 12), (24, 24), (12, 12)]
        assert build_backbone("gcvit_tiny_512").img_size == (512, 512)
        assert build_backbone("gcvit_tiny_384", img_size=224).windows == [(7, 7), (7, 7), (14, 14), (7, 7)]


# ---- attention


@pytest.mark.parametrize("shared", [False, True])
def test_two_attention_bodies_agree(shared: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 1 if shared else 4, 3, 9, 8, requires_grad=True)
    k, v = (torch.randn(2, 4, 3, 9, 8, requires_grad=True) for _ in "kv")
    bias = torch.randn(3, 9, 9, requires_grad=True)
    outs = [attend(q, k, v, bias, body) for body in ("matmul", "sdpa")]
    slow = torch.stack([
        torch.softmax(q[b, 0 if shared else w, h] @ k[b, w, h].T / 8**0.5 + bias[h], -1) @ v[b, w, h]
        for b in range(2) for w in range(4) for h in range(3)
    ]).view(2, 4, 3, 9, 8)  # fmt: skip
    for out in outs:
        torch.testing.assert_close(out, slow, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v, bias)) for out in (*outs, slow)]
    for found in grads[:2]:
        for a, b in zip(found, grads[2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="flash"):
        attend(q, k, v, bias, "flash")


@pytest.mark.parametrize(
    "kind, learns, fused",
    [(torch.bfloat16, False, False), (torch.float32, False, True), (torch.float32, True, False)],
)
def test_the_body_that_is_faster_on_a_cpu_is_chosen(
    kind: torch.dtype, learns: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **named: calls.append(1) or sdpa(*x, **named))
    q, k, v = torch.randn(3, 2, 4, 3, 9, 8, dtype=kind)
    attend(q, k, v, torch.randn(3, 9, 9, requires_grad=learns))
    assert bool(calls) == fused


@pytest.mark.parametrize("own", [False, True])
def test_more_windows_than_a_kernel_takes_are_cut_with_equal_results(own: bool, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 4, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    bias = torch.randn(2, 9, 9, dtype=torch.float64, requires_grad=True)
    blind = torch.zeros(3, 4, 9, dtype=torch.bool)
    blind[:, :, 5] = True
    batches, sdpa = [], F.scaled_dot_product_attention

    def counted(q: Any, *more: Any, **named: Any) -> Any:
        batches.append(len(q))
        return sdpa(q, *more, **named)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    found = []
    for most in (12, 5):
        monkeypatch.setattr("gcssl.models.functional.MOST_WINDOWS", most)
        out = attend(q, k, v, bias, "sdpa", blind if own else None)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))])
    assert batches == [12, 5, 5, 2]
    torch.testing.assert_close(found[1], found[0])


def test_bfloat16_autocast_is_close_in_both_bodies() -> None:
    model = randomise(nano())
    x = images()
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(x)  # matmul: gradients are on
        with torch.no_grad():
            inferred = model(x)
    assert relative(trained.float(), want) < 0.05
    assert relative(inferred.float(), want) < 0.05


# ---- independence of batch-mates


@pytest.mark.parametrize("grad", [True, False])
def test_batch_mates_leave_an_image_alone(grad: bool) -> None:
    model = randomise(nano(img_size=128))
    a, b = images(128, 4), images(128, 4, seed=9)
    b[2] = a[2]
    with torch.set_grad_enabled(grad):
        first, second = model(a), model(b)
        alone = torch.cat([model(x[None]) for x in a])
    assert torch.equal(first[2], second[2])
    assert not torch.equal(first[0], second[0])
    assert relative(alone, first) < 1e-5


# ---- sizes


def test_small_images_are_judged_whole_and_others_without_their_border() -> None:
    with torch.device("meta"):
        assert [nano(img_size=side).crop_pct for side in (64, 128, 160, 224)] == [1.0, 1.0, 0.875, 0.875]


def test_one_object_takes_every_legal_size() -> None:
    model = nano()
    for size in (32, 64, 96, 160, (64, 96), (128, 32)):
        h, w = (size, size) if isinstance(size, int) else size
        assert model.forward_features(images(size, 1)).shape == (1, 256, h // 32, w // 32)
    shapes = [tuple(m.shape[1:]) for m in model.forward_pyramid(images((64, 96), 1))]
    assert shapes == [(32, 16, 24), (64, 8, 12), (128, 4, 6), (256, 2, 3)]


@pytest.mark.parametrize("size", [(200, 224), (48, 48), (64, 16)])
def test_illegal_sizes_name_legal_ones(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]}.*multiples of 32.*nearest legal") as caught:
        nano()(images(size, 1))
    assert "\n" not in str(caught.value)
    if size == (200, 224):
        assert "192x224 or 224x224" in str(caught.value)
    with pytest.raises(UserError, match="multiples of 32"):
        nano(img_size=size)


def test_window_ratio_must_fit_the_poolings() -> None:
    for ratio in ((24, 32, 16, 32), (32, 32, 16), (32, 32, 8, 32), (32, 32, 48, 32)):
        with pytest.raises(UserError, match="window_ratio"):
            nano(window_ratio=ratio)
    with pytest.raises(UserError, match="multiples of 64"):
        nano(window_ratio=(64, 32, 16, 32), img_size=96)


# ---- bias tables


def test_another_size_reads_live_tables_and_sends_them_gradients() -> None:
    model = randomise(nano())
    with torch.inference_mode():
        before = model(images(96))  # constants made here must serve training below
    model(images(96)).sum().backward()
    table = model.stages[0].blocks[1].attn.rel_pos.relative_position_bias_table
    assert table.grad.abs().sum() > 0
    with torch.no_grad():
        table += torch.randn_like(table)
        assert not torch.allclose(model(images(96)), before)


def test_resizing_on_the_fly_equals_a_model_built_there() -> None:
    from gcssl.models.convert import load_weights

    for mode in ("bicubic", "crop"):
        small = randomise(nano(bias_resize=mode))
        large = nano(img_size=(96, 128), bias_resize=mode).eval()
        notes = load_weights(large, small.state_dict())
        assert any("2x2 -> 3x4" in note for note in notes)
        x = images((96, 128))
        torch.testing.assert_close(small(x), large(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="bicubic or crop"):
        nano(bias_resize="nearest")


# ---- initialisation, drop path, checkpointing


def test_initialisation() -> None:
    model = build_backbone("gcvit_xxtiny", num_classes=100, layer_scale=1e-5)
    for name, p in model.state_dict().items():
        if p.ndim == 4 and ".se." not in name:
            fan_in = p[0].numel()
            assert p.std().item() == pytest.approx((1 / (3 * fan_in)) ** 0.5, rel=0.15), name
        elif p.ndim > 1:
            assert p.std().item() == pytest.approx(0.02, rel=0.1 if p.numel() > 1000 else 0.3), name
            assert p.abs().max() < 0.15
        elif name.endswith("gamma"):
            assert torch.all(p == 1e-5)
        elif name != "stem.conv1.bias":
            assert torch.all(p == (1 if name.endswith("weight") else 0)), name


def test_drop_path_follows_the_noise() -> None:
    model = nano(drop_path=0.5).train()
    rates = [block.rate for stage in model.stages for block in stage.blocks]
    torch.testing.assert_close(rates, torch.linspace(0, 0.5, 8).tolist())
    x, keep = images(n=3), torch.ones(model.n_noise, 3) - 1e-6
    drop = keep.clone()
    drop[14, 1] = 0.49  # attention of the last block (rate 0.5) for image 1
    kept, dropped = model(x, keep), model(x, drop)
    assert torch.equal(kept[[0, 2]], dropped[[0, 2]])
    assert not torch.allclose(kept[1], dropped[1])
    assert torch.equal(model(x, drop), dropped)
    for block in (b for s in model.stages for b in s.blocks):
        block.attn.proj.weight.data.zero_(), block.mlp.fc2.weight.data.zero_()
    model.set_drop_path(0.0)
    torch.testing.assert_close(model(x, keep * 0), model(x))  # rate 0 keeps all, whatever the noise


def test_dropped_and_kept_branches_average_to_the_undropped() -> None:
    from gcssl.models.gcvit import drop_path

    x = torch.randn(4, 2, 3)
    grid = (torch.arange(1000) + 0.5) / 1000
    mean = torch.stack([drop_path(x, 0.3, n.expand(4)) for n in grid]).mean(0)
    torch.testing.assert_close(mean, x, atol=1e-4, rtol=1e-4)


def test_drop_path_draws_when_training_and_is_off_in_evaluation() -> None:
    model = nano(drop_path=0.5)
    x = images(n=8)
    torch.manual_seed(0)
    first = model.train()(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(0)
    assert torch.equal(first, model(x))
    model.eval()
    assert torch.equal(model(x), model(x, torch.zeros(model.n_noise, 8)))


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    plain = nano(drop_path=0.3).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    noise = torch.rand(plain.n_noise, 2, generator=torch.Generator().manual_seed(0))
    for model in (plain, saving):
        model(images(), noise).square().sum().backward()
    for (n, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=n)
    assert saved_mib(lambda: saving(images()), saving.parameters()) < 0.6 * saved_mib(
        lambda: plain(images()), plain.parameters()
    )


# ---- masks, features, groups


def test_hidden_tokens_are_written_over() -> None:
    model = randomise(nano())
    x, token = images(), torch.randn(32)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 2:4] = True
    assert torch.equal(model.forward_features(x, torch.zeros_like(mask), token), model.forward_features(x))
    hidden = model.forward_features(x, mask, token)
    assert not torch.allclose(hidden[0], model.forward_features(x)[0])
    assert torch.equal(hidden[1], model.forward_features(x)[1])
    coarse = torch.tensor([[[True, False], [False, False]]] * 2)  # 32-px units
    fine = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert torch.equal(model.forward_features(x, coarse, token), model.forward_features(x, fine, token))
    everything = torch.ones(2, 2, 2, dtype=torch.bool)
    same = model.forward_features(x, everything, token)
    assert torch.equal(same[0], same[1])
    with pytest.raises(ValueError, match="3x3"):
        model.forward_features(x, torch.ones(2, 3, 3, dtype=torch.bool), token)


def test_pooled_features() -> None:
    model = randomise(nano())
    x = images()
    found = model.pooled(x)
    sizes = {"last": 256, "last4": 768, "stages34": 384, "stage1": 32, "stage2": 64, "stage3": 128}
    assert {k: v.shape[1] for k, v in found.items()} == sizes
    maps = model.forward_pyramid(x)
    assert torch.equal(found["last"], model(x))
    for i in range(3):
        torch.testing.assert_close(found[f"stage{i + 1}"], maps[i].mean((2, 3)))
    torch.testing.assert_close(found["stages34"], torch.cat([m.mean((2, 3)) for m in maps[2:]], 1))
    torch.testing.assert_close(found["last4"][:, 128:256], maps[2].mean((2, 3)))  # last block of stage 3
    assert torch.equal(found["last4"][:, -256:], found["last"])


def test_parameter_groups() -> None:
    model = nano(num_classes=3)
    ids, names = model.layer_ids(), [n for n, _ in model.named_parameters()]
    assert list(ids) == names
    want = {
        "stem.conv1.weight": 0, "stages.0.global_block.blocks.conv1.conv_dw.weight": 1,
        "stages.0.blocks.1.norm1.weight": 2, "stages.1.downsample.reduction.weight": 2,
        "stages.1.global_block.blocks.conv1.se.fc1.weight": 3, "stages.1.blocks.0.attn.qkv.bias": 3,
        "stages.3.blocks.1.mlp.fc2.weight": 8, "stages.3.norm.weight": 8, "head.fc.weight": 9,
    }  # fmt: skip
    assert {n: ids[n] for n in want} == want
    assert set(ids.values()) == set(range(10))
    assert len(model.no_weight_decay()) == 8
    assert model.no_weight_decay() == {n for n in names if "relative_position_bias_table" in n}


def test_rebuilt_from_its_arguments_and_works_on_meta() -> None:
    model = nano(num_classes=4, drop_path=0.1, window_ratio=(16, 16, 16, 32))
    again = GCViT(**model.model_args)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(images()), model.eval()(images()))
    with torch.device("meta"):
        empty = build_backbone("gcvit_large", img_size=(224, 256))
        assert empty(torch.empty(2, 3, 64, 96)).shape == (2, 1536)
    filled = nano().to("meta").to_empty(device="cpu")  # nothing but parameters needs filling
    filled.load_state_dict(nano().state_dict())
    assert torch.equal(filled.eval()(images(96)), nano().eval()(images(96)))
    model.reset_classifier(6)
    assert model(images()).shape == (2, 6) and model.model_args["num_classes"] == 6


def test_every_variant_is_listed() -> None:
    for name in ("nano", "xxtiny", "xtiny", "tiny", "tiny2", "small", "small2", "base", "large"):
        assert f"gcvit_{name}" in BACKBONES
