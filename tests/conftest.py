"""One torch thread for the tests and the processes they start: two cores run several of them at once."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)
