"""What a process says of an error while others run beside it; with real ones: tests/test_processes.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gcssl.errors import LostProcess
from gcssl.heartbeat import Heartbeat


@pytest.fixture
def heartbeat(monkeypatch: pytest.MonkeyPatch) -> Heartbeat:
    """That of process 0 at step 4, where process 1 has told of step 2."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    mine, other = (Heartbeat(SimpleNamespace(process_index=rank, num_processes=2)) for rank in range(2))  # type: ignore[arg-type]
    mine.beat(4)
    other.beat(2)
    return mine


def test_a_closed_connection_names_the_process_that_is_behind(heartbeat: Heartbeat) -> None:
    with pytest.raises(LostProcess, match="process 1 hung or died before step 5"), heartbeat:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer")


def test_steps_of_an_earlier_fit_name_nobody(heartbeat: Heartbeat) -> None:
    mine, _ = (Heartbeat(SimpleNamespace(process_index=rank, num_processes=2)) for rank in range(2))  # type: ignore[arg-type]
    mine.beat(0)
    assert mine.behind() == "process 1 hung or died before step 1, never heard of"
    assert heartbeat.behind().startswith("process 1 hung or died before step 5")


@pytest.mark.parametrize(
    "own",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("shapes differ"),
        OSError(),
        ValueError("Connection closed by peer"),
    ],
)
def test_an_error_of_this_process_stays_itself(own: Any, heartbeat: Heartbeat) -> None:
    with pytest.raises(type(own)) as error, heartbeat:
        raise own
    assert error.value is own
