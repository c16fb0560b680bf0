"""What `fit` gives to each update, and which weights, images and checkpoints a run uses and keeps."""

import json
import math
from pathlib import Path

import pytest
import torch

import gcssl.pretrain as program
from gcssl.config import PretrainConfig, load_config
from gcssl.pretrain import pretrain
from gcssl.ssl.objectives import OBJECTIVES

YAML = Path(__file__).resolve().parent.parent / "configs/pretrain"
TINY = [
    "data.shapes_n=16", "data.workers=0", "train.batch_size=8", "train.warmup_epochs=1", "log.every=1",
    "log.trackers=[]", "eval.online_every=0",
]  # fmt: skip


def config(objective: str, out: Path, *more: str) -> PretrainConfig:
    schemas = {name: schema for name, (_, schema) in OBJECTIVES.items()}
    argv = [str(YAML / f"{objective}_gcvit_nano.yaml"), *TINY, f"out={out}", *more]
    return load_config(PretrainConfig, argv, schemas)


def test_each_update_gets_its_lr_weight_decay_and_clipped_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of linear warm-up, three of cosine."""
    norms, set_lr = [], program.set_lr

    def spying(optimizer: torch.optim.Optimizer, *rest: float) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm().item())
        set_lr(optimizer, *rest)

    monkeypatch.setattr(program, "set_lr", spying)
    keys = ["train.steps=5", "train.blr=1e-3", "train.lr_rule=none", "train.min_lr=1e-4", "train.clip_grad=1e-3"]
    keys += ["train.weight_decay=0.1", "train.weight_decay_end=0.3"]
    out = pretrain(config("simmim", tmp_path, *keys))
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * t / 3)) / 2 for t in range(3)]
    assert [line["lr"] for line in told] == pytest.approx([1e-3 / 3, 2e-3 / 3, *cosine], rel=1e-5)
    decay = [0.3 - 0.2 * (1 + math.cos(math.pi * t / 5)) / 2 for t in range(5)]
    assert [line["wd"] for line in told] == pytest.approx(decay, rel=1e-5)
    assert all(line["grad_norm"] > 1e-2 for line in told)  # as measured, before the clip
    assert norms == pytest.approx([1e-3] * 5, rel=1e-2)
