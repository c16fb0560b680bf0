"""Randomness: every draw is a function of the seed and a key of integers, so that a run can go on from any step.

The first part of a key says what is drawn; those of orders and views are shared by pretraining, probe and fine-tuning.
"""

import hashlib
import random

import numpy as np
import torch

ORDER, AUGMENT, REPLACE = 101, 102, 103  # of images; of views and masks; of images that cannot be decoded
INIT, DROP_PATH, MODEL = 201, 202, 203  # first weights; drop path; whatever else a model draws
MIXUP = 301


def _digest(seed: int, key: tuple[int, ...]) -> int:
    """128 bits from any number of integers; unlike in numpy's SeedSequence, (1,) and (1, 0) differ."""
    text = b",".join(b"%d" % part for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def rng(seed: int, *key: int) -> np.random.Generator:
    """The one stateless generator: Philox keyed by all integers; equal keys, equal draws, in any process."""
    return np.random.Generator(np.random.Philox(key=_digest(seed, key)))


def seed_torch(seed: int, *key: int) -> None:
    """Seed Python's, numpy's and torch's global generators (CUDA included) from a key like that of `rng`."""
    torch.manual_seed(seed_host(seed, *key))


def seed_host(seed: int, *key: int) -> int:
    """seed_torch on the CPU alone, in a tenth of its time; returns torch's seed."""
    number = _digest(seed, key)
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.default_generator.manual_seed(number & 0x7FFFFFFFFFFFFFFF)
    return number & 0x7FFFFFFFFFFFFFFF
