"""Parameter groups, learning rates, optimizers."""

import math

import pytest
import torch
from torch import nn

from gcssl.config import TrainConfig
from gcssl.keys import CHOICES
from gcssl.loader import Sizes
from gcssl.optim import cosine, groups_table, lr_at, make_optimizer, param_groups, rates_at, scaled_lr, set_lr


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.odd = nn.Parameter(torch.zeros(2, 2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.norm = nn.LayerNorm(4)
        self.mask_token = nn.Parameter(torch.zeros(4))
        self.gamma = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.tied = self.blocks[0].qkv
        self.head = nn.Linear(4, 3)


LAYERS = {name: int(name.split(".")[1]) for name, _ in Net().named_parameters() if name.startswith("blocks")}
DECAYED = {"blocks.0.qkv.weight", "blocks.1.qkv.weight", "head.weight"}


def test_only_matrices_decay_and_each_parameter_is_in_one_group() -> None:
    net = Net()
    groups = param_groups(net.named_parameters(), 0.05, {"relative_position_bias_table", "odd"})
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in net.named_parameters() if p.requires_grad)
    decayed = {name for group in groups if group["decay"] for name in group["names"]}
    assert decayed == DECAYED  # no bias, norm, token, scale, nor what no_decay names inside a part
    assert all(group["weight_decay"] == (0.05 if group["decay"] else 0.0) for group in groups)
    assert [len(group["params"]) for group in groups] == [len(group["names"]) for group in groups]


def test_layer_decay_grows_with_depth_and_leaves_the_head_alone() -> None:
    layers = {
        **LAYERS,
        "mask_token": 0,
        "norm.weight": 1,
        "norm.bias": 1,
        "gamma": 1,
        "head.weight": 2,
        "head.bias": 2,
    }
    groups = param_groups(Net().named_parameters(), 0.05, (), layers, 0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert [scale["blocks.0.qkv.weight"], scale["blocks.1.qkv.weight"], scale["head.weight"]] == [
        0.25,
        0.5,
        1.0,
    ]
    by_depth = sorted((layers[name], value) for name, value in scale.items())
    assert [value for _, value in by_depth] == sorted(value for _, value in by_depth)
    without = {name: depth for name, depth in layers.items() if not name.startswith("head")}
    new_head = param_groups(Net().named_parameters(), 0.05, (), without, 0.5)
    assert {g["lr_scale"] for g in new_head if "head.weight" in g["names"]} == {1.0}
    with pytest.raises(ValueError, match="layer_decay"):
        param_groups(Net().named_parameters(), 0.05, (), layers, 1.5)


def test_the_table_counts_all_parameters() -> None:
    net = Net()
    groups = param_groups(net.named_parameters(), 0.05)
    lines = groups_table(groups).splitlines()
    assert len(lines) == len(groups) + 1
    counted = sum(int(line.split()[3].replace(",", "")) for line in lines[1:])
    assert counted == sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_lr_in_closed_form() -> None:
    total, warmup, lr, end = 110, 10, 1.0, 0.1
    assert lr_at(0, total, warmup, lr, end) == pytest.approx(1 / 11)
    assert lr_at(4, total, warmup, lr, end) == pytest.approx(5 / 11)
    assert lr_at(warmup, total, warmup, lr, end) == lr
    assert lr_at(60, total, warmup, lr, end) == pytest.approx(0.55)  # half of the cosine
    assert lr_at(35, total, warmup, lr, end) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert lr_at(109, total, warmup, lr, end) == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.99 * math.pi)))
    assert lr_at(total, total, warmup, lr, end) == pytest.approx(end)
    rising = [lr_at(step, total, warmup, lr, end) for step in range(total)]
    assert rising[:11] == sorted(rising[:11]) and rising[10:] == sorted(rising[10:], reverse=True)
    assert lr_at(0, 5, 0, lr, end) == lr and lr_at(3, 3, 10, lr, 0.0) > 0  # no warm-up; warm-up longer than the run


def test_warm_up_and_weight_decay_of_an_update() -> None:
    train = TrainConfig(blr=1.0, lr_rule="none", min_lr=0.0, warmup_epochs=0.5, weight_decay=0.04, weight_decay_end=0.4)
    sizes = Sizes(8, 1, 1, 8, steps_per_epoch=10, total_steps=25)
    rates = [rates_at(train, step, sizes) for step in range(25)]
    assert [lr for lr, _ in rates[:6]] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])  # half an epoch
    assert rates[15] == pytest.approx((0.5, 0.4 - 0.18 * (1 + math.cos(0.6 * math.pi))))


def test_cosine_ends() -> None:
    assert (cosine(0, 10, 0.04, 0.4), cosine(10, 10, 0.04, 0.4)) == (pytest.approx(0.04), pytest.approx(0.4))
    assert cosine(5, 10, 0.04, 0.4) == pytest.approx(0.22) and cosine(99, 10, 0.0, 1.0) == 1.0


def test_lr_rules_with_an_explicit_base() -> None:
    assert scaled_lr(TrainConfig(blr=1e-3, lr_rule="linear", lr_base=256), 1024) == pytest.approx(4e-3)
    assert scaled_lr(TrainConfig(blr=1e-3, lr_rule="sqrt", lr_base=256), 1024) == pytest.approx(2e-3)
    assert scaled_lr(TrainConfig(blr=1e-3, lr_rule="none", lr_base=256), 1024) == 1e-3
    assert scaled_lr(TrainConfig(blr=1e-3, lr_rule="linear", lr_base=4096), 1024) == pytest.approx(2.5e-4)


@pytest.mark.parametrize("name", CHOICES["train.optimizer"])
def test_set_lr_and_one_step(name: str) -> None:
    net = Net()
    groups = param_groups(net.named_parameters(), 0.05, (), LAYERS, 0.5)
    optimizer = make_optimizer(groups, TrainConfig(optimizer=name))
    set_lr(optimizer, 0.1, 0.2)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])
        assert group["weight_decay"] == (0.2 if group["decay"] else 0.0)
    before = net.head.weight.detach().clone()
    net.head(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, net.head.weight)
    set_lr(optimizer, 0.3)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_lars_and_lamb_adapt_without_weight_decay_too(name: str) -> None:
    def moved(scale: float) -> tuple[float, float]:
        """How far one step takes a matrix and a bias of ones whose gradients are `scale`."""
        layer = nn.Linear(8, 8)
        groups = param_groups(layer.named_parameters(), 0.0)
        optimizer = make_optimizer(groups, TrainConfig(optimizer=name))
        set_lr(optimizer, 1.0)
        for parameter in layer.parameters():
            parameter.detach().fill_(3.0)
            parameter.grad = torch.full_like(parameter, scale)
        optimizer.step()
        return (layer.weight - 3).norm().item(), (layer.bias - 3).norm().item()

    (weight, bias), (weight_100, bias_100) = moved(1.0), moved(100.0)
    trust = {"lars": 1e-3, "lamb": 1.0}[name]
    assert weight == pytest.approx(trust * 24, rel=1e-3) and weight_100 == pytest.approx(weight, rel=1e-3)
    assert bias_100 == pytest.approx({"lars": 100, "lamb": 1}[name] * bias, rel=1e-3)  # undecayed: not adapted


def test_adamw_equals_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(param_groups(ours.named_parameters(), 0.1), TrainConfig(betas=[0.8, 0.9]))
    other = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.8, 0.9),
    )
    for step in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        set_lr(optimizer, 0.01)
        for net, one in ((ours, optimizer), (theirs, other)):
            one.zero_grad()
            net(x).square().sum().backward()
            one.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_lars_adapts_what_is_decayed_and_has_momentum() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer = make_optimizer(param_groups(net.named_parameters(), 0.1), TrainConfig(optimizer="lars"))
    set_lr(optimizer, 0.5)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    net(torch.ones(4, 3)).square().sum().backward()
    w, g = before["weight"], net.weight.grad
    optimizer.step()
    trust = 1e-3 * w.norm() / (g.norm() + 0.1 * w.norm())  # arXiv:1708.03888, equation 6
    torch.testing.assert_close(net.weight, w - 0.5 * trust * (g + 0.1 * w))
    torch.testing.assert_close(net.bias, before["bias"] - 0.5 * net.bias.grad)
    optimizer.step()  # the same gradients again, with momentum 0.9
    torch.testing.assert_close(net.bias, before["bias"] - 0.5 * (1 + 1.9) * net.bias.grad)


def test_lamb_leaves_clipping_to_the_run_and_has_its_betas() -> None:
    groups = param_groups(Net().named_parameters(), 0.1)
    lamb = make_optimizer(groups, TrainConfig(optimizer="lamb", betas=[0.8, 0.9])).defaults
    assert lamb["max_grad_norm"] is None and lamb["betas"] == (0.8, 0.9)


def test_sgd_has_momentum() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer(param_groups([("weight", weight)], 0.0), TrainConfig(optimizer="sgd"))
    set_lr(optimizer, 1.0)
    weight.grad = torch.ones(1)
    for _ in range(2):
        optimizer.step()
    assert weight.item() == pytest.approx(-(1 + 1.9))


def test_no_fused_optimizer_behind_a_loss_scaler() -> None:
    """A fused AdamW skips its step by itself on infinite gradients, and nobody else learns of it."""
    for precision, fused in (("fp16", False), ("bf16", True), ("fp32", True)):
        groups = param_groups(Net().named_parameters(), 0.1)
        assert make_optimizer(groups, TrainConfig(precision=precision)).defaults["fused"] == fused
