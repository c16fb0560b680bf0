"""N processes equal one process on the joined batch, in loss and in gradient, for every objective and its
heads.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gcssl.ssl import gather
from gcssl.ssl.joint import VIEW
from gcssl.ssl.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("many_processes.py")
WORLDS = [2, pytest.param(3, marks=pytest.mark.slow)]
MORE = ["dino-koleo", "joint-balance", "joint-share"]
PAIRS = [f"joint-{one}" for one in ("localmim", "mae", "ummae", "simclr", "dino")]  # parts that are cases alone, too
CASES = [*OBJECTIVES, *MORE, "collectives", *(pytest.param(name, marks=pytest.mark.slow) for name in PAIRS)]


@pytest.fixture(scope="module", params=WORLDS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One launch of gloo processes for all cases that are asked for."""
    tests = [item for item in request.session.items if "results" in getattr(item, "fixturenames", ())]
    cases = sorted({test.callspec.params["case"] for test in tests})
    out = tmp_path_factory.mktemp("gather") / "results.pt"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(request.param)]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(out), *cases], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = torch.load(out, weights_only=True)
    assert found["world"] == request.param and found["many"].keys() == set(cases)
    return found


def assert_equal(many: dict[str, Any], one: dict[str, Any]) -> None:
    for kind in ("logged", "norms", "grads", "buffers"):
        assert many[kind].keys() == one[kind].keys()
        for name, value in one[kind].items():
            tight = {"atol": 1e-9, "rtol": 1e-7} if value.dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
            torch.testing.assert_close(many[kind][name], value, **tight, msg=lambda m, n=name: f"{n}: {m}")
    assert one["grads"] and all(g.abs().sum() > 0 for g in one["grads"].values())


@pytest.mark.parametrize("case", CASES)
def test_processes_equal_one_on_the_joined_batch(results: dict[str, Any], case: str) -> None:
    assert_equal(results["many"][case], results["one"][case])


@pytest.mark.parametrize("case", [*VIEW, "ibot"])
def test_processes_in_another_order_equal_one_too(results: dict[str, Any], case: str) -> None:
    """Each process holds the samples of the next: nothing but the order of MoBY's queue tells."""
    one = results["one"][case]
    if "queue" in one["buffers"]:
        one = one | {"buffers": one["buffers"] | {"queue": one["buffers"]["queue"][:, results["order"]]}}
    assert_equal(results["turned"][case], one)


def test_one_process_needs_no_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    before = x.detach().clone()
    gather.average_([x.detach()])
    assert torch.equal(x, before)
    assert gather.world_size() == 1 and gather.rank() == 0 and gather.reducer() is None
    assert gather.all_gather_with_grad(x) is x and gather.all_reduce_sum_with_grad(x) is x
    assert not gather.all_gather_no_grad(x).requires_grad
    assert torch.equal(gather.all_reduce_mean(x), x)
