"""What only a GPU can show: equal bits across a stop, in bf16, with train.deterministic=true."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gcssl.config import PretrainConfig, load_config
from gcssl.errors import Preempted
from gcssl.pretrain import pretrain
from gcssl.ssl.objectives import OBJECTIVES, SCHEMAS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def config(objective: str, out: Path, *more: str) -> PretrainConfig:
    yaml = str(ROOT / f"configs/pretrain/{objective}_gcvit_nano.yaml")
    argv = ["data.shapes_n=64", "data.workers=2", "train.batch_size=32", "train.steps=4", "train.warmup_epochs=1"]
    argv += ["train.deterministic=true", "model.drop_path=0.2", "eval.online_every=1", "log.every=1", *more]
    return load_config(PretrainConfig, [yaml, f"out={out}", *argv], SCHEMAS)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stopped_run_goes_on_bit_for_bit(objective: str, precision: str, tmp_path: Path) -> None:
    more = [f"train.precision={precision}"]
    pretrain(config(objective, tmp_path / "whole", *more))
    with pytest.raises(Preempted):
        pretrain(config(objective, tmp_path / "cut", *more, "train.max_hours=0"))
    pretrain(config(objective, tmp_path / "cut", *more))
    for name in ("model", "optimizer"):
        last = f"checkpoints/step_00000004/{name}.safetensors"
        whole, cut = (load_file(tmp_path / run / last) for run in ("whole", "cut"))
        different = [key for key in whole if not torch.equal(whole[key], cut[key])]
        assert not different, f"{len(different)} of {len(whole)} {name} tensors differ, e.g. {different[0]}"
