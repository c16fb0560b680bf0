"""What train.shard refuses; that a sharded run is the same run is shown in tests/test_processes.py."""

import pytest
import torch
from torch import nn

from gcssl.config import TrainConfig
from gcssl.errors import UserError
from gcssl.shard import check_shard


def test_fp16_is_refused() -> None:
    with pytest.raises(UserError, match="train.shard"):
        check_shard(TrainConfig(shard=True, precision="fp16"), nn.Linear(1, 1))


def test_parameters_without_a_dimension_cannot_be_cut() -> None:
    gain = nn.ParameterDict({"gain": nn.Parameter(torch.tensor(1.0))})  # NFNets have such
    with pytest.raises(UserError, match="train.shard: given for a backbone with parameters of no dimension"):
        check_shard(TrainConfig(shard=True), gain)
    check_shard(TrainConfig(), gain)
    check_shard(TrainConfig(shard=True), nn.Linear(1, 1))
