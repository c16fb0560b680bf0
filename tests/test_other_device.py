"""Without a GPU: nothing of a training step stays on the CPU, and nothing waits for the device."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("names", ["joint ibot mae finetune linear_probe", pytest.param("", marks=pytest.mark.slow)])
def test_training_steps_stay_on_their_device_and_read_nothing_from_it(names: str) -> None:
    """Of all that there is; `make test` takes some that hold most of the code."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot register a device from Python")
    argv = [sys.executable, "-m", "tests.other_device", *names.split()]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "all on the device", done.stdout + done.stderr
