import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.models.hidden import upsample_mask
from gcssl.rng import rng
from gcssl.ssl.masking import check_ratio, check_unit, default_unit, draw_blocks, draw_mask, hide_pixels
from scripts.timm_matrix import random_batch


@pytest.mark.parametrize("side, unit", [(64, 8), (96, 16), (128, 16), (160, 16), (192, 32), (224, 32), (512, 32)])
def test_default_unit_fits(side: int, unit: int) -> None:
    assert default_unit((side, side)) == unit
    check_unit((side, side), default_unit((side, side)))
    check_unit((side, 2 * side), default_unit((side, 2 * side)))


@pytest.mark.parametrize("size, unit", [((64, 64), 6), ((64, 64), 48), ((64, 64), 64), ((96, 64), 24), ((64, 64), 0)])
def test_units_that_do_not_fit_are_refused_with_the_legal_ones(size: tuple[int, int], unit: int) -> None:
    with pytest.raises(UserError, match=rf"mask_unit={unit} does not fit .* one of \[4, 8, 16, 32\]"):
        check_unit(size, unit)


@pytest.mark.parametrize("side", [64, 96, 192, 224, 256])
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75])
def test_hidden_count_is_the_ceiling_in_every_sample(side: int, ratio: float) -> None:
    n = side // default_unit((side, side))
    for seed in range(5):
        mask = draw_mask(np.random.default_rng(seed), (n, n), ratio)
        assert mask.shape == (n, n) and mask.dtype == bool
        assert mask.sum() == math.ceil(ratio * n * n)


def test_ceiling_ignores_the_rounding_of_binary_fractions() -> None:
    assert 0.55 * 100 > 55
    assert draw_mask(np.random.default_rng(0), (10, 10), 0.55).sum() == 55


@pytest.mark.parametrize("n, ratio", [(36, 0.0), (36, 1.0), (36, -0.1), (36, math.nan), (4, 0.8)])
def test_ratios_that_hide_nothing_or_all_are_refused(n: int, ratio: float) -> None:
    with pytest.raises(UserError, match="mask_ratio"):
        check_ratio(n, ratio)


def test_a_share_that_units_cannot_give_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    check_ratio(64, 0.6)
    assert capsys.readouterr().out == ""
    check_ratio(6, 0.75)
    assert capsys.readouterr().out == "mask: 5 of 6 units are hidden, 0.83 for objective.mask_ratio=0.75\n"


def test_masks_differ_between_samples_epochs_and_views_and_repeat_with_the_seed() -> None:
    keys = list(itertools.product(range(2), range(8), range(2)))  # epoch, sample, view
    first = [draw_mask(rng(0, *key), (8, 8), 0.6).tobytes() for key in keys]
    again = [draw_mask(rng(0, *key), (8, 8), 0.6).tobytes() for key in keys]
    assert len(set(first)) == len(keys)
    assert first == again


def test_every_unit_is_hidden_equally_often() -> None:
    generator = np.random.default_rng(0)
    share = np.mean([draw_mask(generator, (4, 4), 0.5) for _ in range(4000)], axis=0)
    assert abs(share - 0.5).max() < 0.04  # 5 standard deviations


def test_upsampled_mask_is_constant_in_each_unit() -> None:
    mask = torch.rand(3, 2, 4) < 0.5
    pixels = upsample_mask(mask, 64, 64)
    blocks = pixels.view(3, 2, 32, 4, 16)
    assert torch.equal(blocks.all(4).all(2), mask) and torch.equal(blocks.any(4).any(2), mask)
    with pytest.raises(ValueError, match="does not tile"):
        upsample_mask(mask, 64, 66)


def test_hidden_pixels_become_zero_whatever_they_held() -> None:
    x = torch.randn(2, 3, 64, 64)
    x[0, 0, :8, :8] = math.nan
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 0, 0] = True
    y = hide_pixels(x, mask)
    assert (y[0, :, :8, :8] == 0).all() and not torch.signbit(y[0, :, :8, :8]).any()
    rest = ~upsample_mask(mask, 64, 64)[:, None].expand_as(x)
    assert torch.equal(y[rest], x[rest])


def test_a_colour_is_filled_in_whatever_the_pixels_held() -> None:
    x, mask, color = torch.full((1, 3, 4, 4), math.nan), torch.ones(1, 2, 2, dtype=torch.bool), torch.arange(3.0)
    assert torch.equal(hide_pixels(x, mask, color), color.view(1, 3, 1, 1).expand_as(x))
    assert (hide_pixels(x, mask, 0.5) == 0.5).all()


@pytest.mark.parametrize("objective", ["simmim", "localmim", "ummae", "ibot"])
@pytest.mark.parametrize("name", ["convnext_atto", "mambaout_femto"])
def test_hidden_pixels_do_not_blow_gradients_up(name: str, objective: str, make_objective: Any) -> None:
    """A stem without biases makes zeros of zeros, and a norm of zeros multiplies gradients by 1 / sqrt(eps)."""
    model = make_objective(objective, build_backbone(name, 64)).train()
    model(random_batch(model.draw, 64), 0)["loss"].backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(grads) < 1e5


def test_blocks_hide_the_exact_count_in_connected_pieces() -> None:
    rng = np.random.default_rng(0)
    neighbours = []
    for count in (0, 1, 7, 30, 49):
        mask = draw_blocks(rng, (7, 7), count)
        assert mask.sum() == count and mask.dtype == bool
    for _ in range(100):
        block, scattered = draw_blocks(rng, (14, 14), 60), draw_mask(rng, (14, 14), 60 / 196)
        neighbours.append([(m[1:] & m[:-1]).sum() + (m[:, 1:] & m[:, :-1]).sum() for m in (block, scattered)])
    blocky, random = np.mean(neighbours, 0)
    assert blocky > 1.5 * random


@pytest.mark.parametrize(("side", "count", "published"), [(7, 5, 0.78), (7, 15, 1.27), (14, 20, 1.46)])
def test_blocks_are_as_large_as_published(side: int, count: int, published: float) -> None:
    """Hidden neighbours a hidden unit, in 3,000 masks of iBOT's code; blocks of any size have 0.09 to 0.25 fewer."""
    masks = [draw_blocks(np.random.default_rng(seed), (side, side), count) for seed in range(1000)]
    pairs = [(m[1:] & m[:-1]).sum() + (m[:, 1:] & m[:, :-1]).sum() for m in masks]
    assert np.mean(pairs) / count == pytest.approx(published, abs=0.045)


def test_blocks_are_tall_and_wide() -> None:
    """BEiT's algorithm 1: aspect ratios of 0.3 to 1/0.3."""
    shapes = []
    for seed in range(300):
        mask = draw_blocks(np.random.default_rng(seed), (16, 16), 12)
        shapes.append((np.ptp(np.flatnonzero(mask.any(1))) + 1, np.ptp(np.flatnonzero(mask.any(0))) + 1))
    pieces = [h / w for h, w in shapes if h * w <= 16]  # of one block, nearly
    assert min(pieces) < 0.5 and max(pieces) > 2
