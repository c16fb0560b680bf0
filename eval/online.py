"""What pretraining measures on its way, on the features evaluation uses: kNN of the held-out slice against the rest of
train, and the rest's RankMe."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from gcssl.config import PretrainConfig
from gcssl.data import Images, held_out
from gcssl.errors import NotFinite, NumericStop, UserError
from gcssl.eval.features import extract, options_within
from gcssl.eval.inputs import FEW
from gcssl.eval.knn import sharded_correct
from gcssl.eval.metrics import rankme
from gcssl.loader import Sizes
from gcssl.log import say
from gcssl.models.build import Backbone
from gcssl.rng import ORDER, rng

KNN_K, TEMPERATURE = 20, 0.07
BANK = 1_300_000  # images it knows at most: all of ImageNet-1k; each process holds the features of all
RANKED = 25_600  # images whose RankMe is taken where there are twice as many or more, as in its paper
Parts = tuple[np.ndarray, np.ndarray]  # indices of images


class OnlineProbe:
    """kNN of the held-out slice against the rest of train, and the features' RankMe."""

    def __init__(self, cfg: PretrainConfig, images: Images, parts: Parts, accelerator: Accelerator, every: int) -> None:
        self.cfg, self.images, self.parts, self.accelerator = cfg, images, parts, accelerator
        self.every = every  # optimizer steps

    def due(self, step: int) -> bool:
        return step > 0 and step % self.every == 0

    def __call__(self, step: int, objective: Any) -> dict[str, float]:
        cfg, encoder = self.cfg, evaluated_encoder(self.cfg, objective)
        options = options_within(cfg.train, cfg.data)
        try:
            bank, queries = (
                extract(encoder, self.images, part, self.accelerator, options=options, quiet=True)
                for part in self.parts
            )
        except NotFinite as error:
            raise NumericStop(f"step {step}: {error}") from None
        # on the CPU: the GPU is full of what the training keeps there
        how = ((KNN_K,), TEMPERATURE, cfg.eval.backend, self.accelerator, torch.device("cpu"))
        value = 100.0 * sharded_correct(bank, queries, "last", *how).double().mean().item()
        rank = rankme(bank.x["last"][:: max(1, len(bank.y) // RANKED)])
        told = f"{value:.1f} on {len(self.parts[1])} held-out training images, RankMe {rank:.1f} of the others"
        say(f"step {step}: online knn/top1@{KNN_K} {told}")
        return {f"online_knn/top1@{KNN_K}": value, "online_rankme": rank}


def online_probe(cfg: PretrainConfig, images: Images, accelerator: Accelerator, sizes: Sizes) -> OnlineProbe | None:
    """The probe of a run, every eval.online_every epochs; None where it has no labels, wants none or ends sooner."""
    parts = probe_parts(cfg, images)
    every = cfg.eval.online_every * sizes.steps_per_epoch
    if parts and every > sizes.total_steps:
        say(f"eval.online_every={cfg.eval.online_every} epochs is longer than the run: no online kNN probe")
        return None
    if parts and (few := len(parts[1])) < FEW:
        say(f"the online kNN probe has only {few} held-out images: each is {100 / few:.1f} points")
    return parts and OnlineProbe(cfg, images, parts, accelerator, every)


def probe_parts(cfg: PretrainConfig, images: Images) -> Parts | None:
    """(the bank, the held-out slice) of the probe; None for no probe, UserError where nothing can be held out."""
    if not cfg.eval.online_every:
        return None
    if images.labels is None:
        say("no labels in this data set: the online kNN probe is skipped")
        return None
    bank, held = held_out(images)
    if not len(held):
        raise UserError("eval.online_every: with one image a class none can be held out; set eval.online_every=0")
    if len(bank) > BANK:  # the same ones for every seed, as those held out
        say(f"the online kNN probe knows {BANK} of the {len(bank)} other training images")
        bank = np.sort(rng(0, ORDER).permutation(bank)[:BANK])
    return bank, held


def evaluated_encoder(cfg: PretrainConfig, objective: Any) -> Backbone:
    """The encoder that the objective's paper evaluates, unless `encoder` says otherwise."""
    which = cfg.encoder or objective.default_encoder
    return objective.teacher if which == "teacher" else objective.encoder
