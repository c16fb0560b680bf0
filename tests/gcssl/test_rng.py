"""Draws are a function of their whole key, on every machine and in every version."""

import random

import numpy as np
import torch

from gcssl.rng import rng, seed_torch


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
