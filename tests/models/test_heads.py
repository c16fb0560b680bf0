"""The heads' layers."""

import pytest
import torch
from torch import nn

from gcssl.models.heads import BatchNorm, DINOHead, Reduce, mlp


def test_batch_norm_equals_torchs_and_keeps_no_state() -> None:
    ours, theirs = BatchNorm(5, lambda: None), nn.BatchNorm1d(5, track_running_stats=False)
    x = torch.randn(7, 5) * 3 + 10
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.eval()(x), theirs(x))
    assert set(ours.state_dict()) == {"weight", "bias"}
    assert not BatchNorm(5, lambda: None, affine=False).state_dict()


def test_batch_norm_over_processes_is_sound_far_from_zero() -> None:
    """The reducing body alone (a sum over one process is the identity), on data whose squares drown its
    variance.
    """
    reducing, plain = BatchNorm(3, lambda: lambda t: t), BatchNorm(3, lambda: None)
    x = torch.randn(64, 3, dtype=torch.float64) + 1e4
    exact = plain.double()(x)
    torch.testing.assert_close(reducing(x), exact)
    torch.testing.assert_close(reducing(x.float()).double(), exact, atol=5e-3, rtol=0)


@pytest.mark.parametrize("reduce", [None, lambda t: t], ids=["one process", "reducing"])
def test_batch_norm_computes_in_fp32_under_autocast(reduce: Reduce | None) -> None:
    norm, x = BatchNorm(3, lambda: reduce), torch.randn(16, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, norm(x.float()))


@pytest.mark.parametrize("reduce", [None, lambda t: t], ids=["one process", "reducing"])
def test_batch_norm_with_a_scale_alone(reduce: Reduce | None) -> None:
    norm, x = BatchNorm(3, lambda: reduce, affine=False, scale=True), torch.randn(16, 3) + 2
    assert set(norm.state_dict()) == {"weight"}
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    plain = nn.BatchNorm1d(3, affine=False, track_running_stats=False)(x)
    torch.testing.assert_close(norm(x), plain * norm.weight)


def test_mlp_layers() -> None:
    layers = mlp([8, 32, 32, 4], lambda dim, affine: BatchNorm(dim, lambda: None, affine))
    kinds = [type(m).__name__ for m in layers]
    assert kinds == ["Linear", "BatchNorm", "ReLU"] * 2 + ["Linear", "BatchNorm"]
    assert all(m.bias is None for m in layers if isinstance(m, nn.Linear))
    assert layers[-1].weight is None and layers[1].weight is not None
    y = layers(torch.randn(64, 8))
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-5, rtol=0)


def test_dinos_head_starts_as_published() -> None:
    for layer in DINOHead(64, 512, 64, 16).mlp:
        if isinstance(layer, nn.Linear):
            assert 0.019 < layer.weight.std() < 0.021 and not layer.bias.any()
