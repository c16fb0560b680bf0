"""Randomness: every draw is a function of the seed and a key of integers, so that a run can go on from any step.

The first part of a key says what is drawn; those of orders are shared by pretraining, probe and fine-tuning, those of
views by the first and the last.
"""

import hashlib
import random

import numpy as np
import torch

ORDER, AUGMENT, REPLACE = 101, 102, 103  # of images; of views and masks; of images that cannot be decoded
PROBE = 104  # crops of frozen features: others than those that the encoder was trained on
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


def drop_noise(
    seed: int, step: int, shape: tuple[int, int], position: torch.Tensor, device: torch.device
) -> list[torch.Tensor]:
    """Uniform numbers for drop path, by a sample's place in the global batch, so that no process layout changes them.

    shape: (views, rows); position: the places of this batch's B samples, on the CPU. One (rows, B) tensor a view. They
    are drawn for 64 places at a time, so that a process draws its own and not those of all.
    """
    blocks, which = np.unique(position.numpy() // 64, return_inverse=True)
    drawn = [rng(seed, DROP_PATH, step, int(block)).random((*shape, 64), dtype=np.float32) for block in blocks]
    uniform = torch.from_numpy(np.concatenate(drawn, -1)[..., which * 64 + position.numpy() % 64])
    return list((uniform.pin_memory() if device.type == "cuda" else uniform).to(device, non_blocking=True))
