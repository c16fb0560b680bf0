"""Draws are a function of their whole key, on every machine and in every version."""

import random

import numpy as np
import pytest
import torch

from gcssl.rng import drop_noise, rng, seed_torch


def test_rng_is_a_function_of_all_its_integers() -> None:
    keys = [(0,), (0, 0), (0, 1), (1,), (1, 0), (0, 1, 0), (1, 10), (11, 0)]
    draws = {key: float(rng(*key).random()) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert rng(0, 1).random() == draws[(0, 1)] and rng(np.int64(0), np.int64(1)).random() == draws[(0, 1)]
    assert rng(2**70, 3).random() != rng(2**70 + 1, 3).random()


def test_rng_is_the_same_in_every_version() -> None:
    assert rng(0, 1, 2).integers(0, 2**32, 3).tolist() == [1852763183, 2322314637, 867566586]


def test_seed_torch_seeds_all_three() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    seed_torch(0, 5)
    first = draw()
    seed_torch(0, 5)
    assert draw() == first
    seed_torch(0, 6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_drop_path_belongs_to_a_place_in_the_global_batch_and_is_drawn_for_ones_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks: list[int] = []
    monkeypatch.setattr("gcssl.rng.rng", lambda *key: blocks.append(key[-1]) or rng(*key))
    device = torch.device("cpu")
    whole = drop_noise(3, 5, (2, 4), torch.arange(200), device)
    assert len(whole) == 2 and whole[0].shape == (4, 200) and blocks == [0, 1, 2, 3]
    for views in whole:
        assert len(views.unique()) > 790 and 0 <= views.min() < 0.02 and 0.98 < views.max() < 1
    for start, own in ((0, [0]), (60, [0, 1]), (128, [2])):
        blocks.clear()
        part = drop_noise(3, 5, (2, 4), torch.arange(start, start + 40), device)
        assert blocks == own
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[:, start : start + 40])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[0], drop_noise(3, 6, (2, 4), torch.arange(200), device)[0])
    assert not torch.equal(whole[0], drop_noise(4, 5, (2, 4), torch.arange(200), device)[0])
