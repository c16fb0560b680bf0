"""The online probe: which images it asks, and what it reports."""

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import gcssl.eval.online as online
from gcssl.config import PretrainConfig
from gcssl.data import held_out, open_data
from gcssl.errors import NumericStop
from gcssl.loader import Sizes
from gcssl.models.build import build_backbone

SIZES = Sizes(batch_size=8, accumulate=1, world=1, global_batch=8, steps_per_epoch=1, total_steps=100)


@pytest.mark.parametrize(("every", "said"), [(1, True), (0, False)])
def test_images_without_labels_are_not_probed_and_that_is_said_where_a_probe_was_asked_for(
    every: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = PretrainConfig()
    cfg.eval.online_every = every
    images: Any = Namespace(labels=None)
    accelerator: Any = None
    assert online.online_probe(cfg, images, accelerator, SIZES) is None
    assert ("the online kNN probe is skipped" in capsys.readouterr().out) == said


def test_a_probe_of_few_images_says_how_coarse_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator: Any = None
    for n, said in ((400, True), (4000, False)):
        cfg = PretrainConfig()
        cfg.data.path, cfg.data.shapes_n = "shapes", n
        assert online.online_probe(cfg, open_data(cfg.data).train, accelerator, SIZES) is not None
        assert ("only 20 held-out images: each is 5.0 points" in capsys.readouterr().out) == said


@pytest.mark.parametrize(("steps", "probed"), [(9, False), (10, True)])
def test_a_run_that_ends_before_its_first_probe_says_so(
    steps: int, probed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, accelerator = PretrainConfig(), Accelerator(cpu=True)
    cfg.eval.online_every, cfg.data.shapes_n = 5, 64
    sizes = dataclasses.replace(SIZES, steps_per_epoch=2, total_steps=steps)
    probe = online.online_probe(cfg, open_data(cfg.data).train, accelerator, sizes)
    assert (probe is not None and probe.due(steps)) == probed
    assert ("online_every=5 epochs is longer than the run" in capsys.readouterr().out) != probed


def test_of_a_large_set_the_probe_knows_so_many_and_always_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = PretrainConfig()
    cfg.data.shapes_n = 4000
    images = open_data(cfg.data).train
    whole, held = held_out(images)
    found = []
    for cap, seed in ((len(whole), 0), (1000, 0), (1000, 1)):
        monkeypatch.setattr(online, "BANK", cap)
        cfg.train.seed = seed
        parts = online.probe_parts(cfg, images)
        assert parts is not None and parts[1].tolist() == held.tolist()
        found.append(parts[0].tolist())
    assert found[0] == whole.tolist()
    assert found[1] == found[2] == sorted(set(found[1])) and len(found[1]) == 1000
    assert set(found[1]) < set(found[0])
    assert images.labels is not None
    assert np.bincount(images.labels[found[1]], minlength=10).min() > 70
    assert capsys.readouterr().out.count(f"knows 1000 of the {len(whole)} other") == 2


def test_features_that_are_not_numbers_end_the_run_as_its_losses_would(tmp_path: Path) -> None:
    cfg = PretrainConfig(out=str(tmp_path))
    cfg.eval.online_every, cfg.data.shapes_n, cfg.data.workers = 1, 64, 0
    encoder = build_backbone("gcvit_nano", 64)
    encoder.stem.conv1.bias.data.fill_(float("nan"))
    probe = online.online_probe(cfg, open_data(cfg.data).train, Accelerator(cpu=True), SIZES)
    assert probe is not None
    with pytest.raises(NumericStop, match="step 7: .*not finite"):
        probe(7, Namespace(encoder=encoder, default_encoder="student"))


def test_the_probe_shows_the_encoder_no_more_images_at_once_than_training_shows_to_fit(tmp_path: Path) -> None:
    cfg = PretrainConfig(out=str(tmp_path))
    cfg.eval.online_every, cfg.data.shapes_n, cfg.data.workers, cfg.train.batch_size = 1, 64, 0, 8
    encoder, shown = build_backbone("gcvit_nano", 64), []
    encoder.stem.register_forward_pre_hook(lambda _, given: shown.append(len(given[0])))
    probe = online.online_probe(cfg, open_data(cfg.data).train, Accelerator(cpu=True), SIZES)
    assert probe is not None
    probe(1, Namespace(encoder=encoder, default_encoder="student"))
    assert max(shown) == 16 and sum(shown) == 64


def test_the_probe_asks_for_the_held_out_images_and_knows_only_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def knn(bank: Any, queries: Any, kind: str, ks: Any, temperature: float, *_: Any) -> Tensor:
        assert (kind, tuple(ks), temperature) == ("last", (20,), 0.07)
        asked.append((bank.y, queries.y))
        return torch.tensor([[True], [False]])

    asked: list[tuple[np.ndarray, np.ndarray]] = []
    monkeypatch.setattr(online, "extract", lambda _, __, part, *___, **____: Namespace(x={"last": part}, y=part))
    monkeypatch.setattr(online, "sharded_correct", knn)
    monkeypatch.setattr(online, "rankme", lambda bank: float(len(bank)))
    cfg = PretrainConfig(out=str(tmp_path))
    cfg.eval.online_every, cfg.data.shapes_n = 1, 64
    images = open_data(cfg.data, (64, 64)).train
    probe = online.online_probe(cfg, images, Namespace(), SIZES)
    assert probe is not None
    found = probe(1, Namespace(encoder=None, default_encoder="student"))
    assert f"RankMe {len(held_out(images)[0]):.1f} of the others" in capsys.readouterr().out
    [(bank, queries)] = asked
    assert sorted([*bank, *queries]) == list(range(64))
    assert queries.tolist() == held_out(images)[1].tolist()
    assert found == {"online_knn/top1@20": 50.0, "online_rankme": float(len(bank))}
    monkeypatch.setattr(online, "RANKED", 10)  # of many images every so many
    found = probe(2, Namespace(encoder=None, default_encoder="student"))
    assert found["online_rankme"] == len(bank[:: len(bank) // 10]) < 20
