"""Runs that are killed with SIGKILL at random moments until they finish, against one that is left alone.

    python tests/killed_runs.py FOLDER KILLS WORKERS NAME ...        (objectives, or finetune)

Everything is imported once; each start is a fork. Prints a line a run: its name and how often it was killed in which
epoch, and what differs in the end. Exit 1 where something does.
"""

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from gcssl.config import PretrainConfig, load_config  # noqa: E402
from gcssl.eval import finetune  # noqa: E402
from gcssl.eval.inputs import data_of  # noqa: E402
from gcssl.pretrain import pretrain  # noqa: E402
from gcssl.runtime import make_accelerator, quiet_libraries  # noqa: E402
from gcssl.ssl.objectives import SCHEMAS  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STEPS, EPOCH = 9, 3
KEYS = [
    f"data.shapes_n={16 * EPOCH}", "train.batch_size=16", f"train.steps={STEPS}", "train.warmup_epochs=1",
    "log.every=1", "log.trackers=[]", "checkpoint.every=0.3", "model.drop_path=0.2",
]  # fmt: skip
TIMING = ("images_per_s", "data_wait")


def train(name: str, out: Path, workers: int) -> None:
    argv = [*KEYS, f"data.workers={workers}", "data.timeout=300"]
    if name == "finetune":
        yaml, model = str(ROOT / "configs/eval/finetune_demo.yaml"), ["model.name=gcvit_nano", "data.path=shapes"]
        cfg = load_config(finetune.FinetuneConfig, [yaml, *argv, *model, "backbone=none", f"out={out.parent}"])
        cfg = dataclasses.replace(cfg, data=data_of(cfg, None))
        finetune.finetune(cfg, make_accelerator(cfg.train, cfg.runtime), out, "none")
    else:
        yaml = str(ROOT / f"configs/pretrain/{name}_gcvit_nano.yaml")
        pretrain(load_config(PretrainConfig, [yaml, *argv, f"out={out}", "eval.online_every=1"], SCHEMAS))


def start(name: str, out: Path, workers: int) -> int:
    """A fork that trains; its output goes to <out>.log."""
    child = os.fork()
    os.setpgid(child, 0)  # its loader workers die with it; in both processes, so that no kill comes before it
    if child:
        return child
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        train(name, out, workers)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def steps_told(out: Path) -> int:
    path = out / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def kill_until_finished(name: str, out: Path, workers: int, kills: int, seed: int) -> list[int]:
    """The number of steps told at each kill."""
    rng = np.random.default_rng(seed)
    told = []
    for target in np.sort(rng.uniform(0, STEPS, kills)):
        child, limit = start(name, out, workers), time.monotonic() + 100
        while steps_told(out) < int(target) and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1.5 if steps_told(out) > target else 0.4))  # anywhere: start, step, save, probe
        told.append(steps_told(out))
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    finish(name, out, workers)
    return told


def finish(name: str, out: Path, workers: int) -> None:
    _, status = os.waitpid(start(name, out, workers), 0)
    if status:
        sys.exit(f"{name}: failed\n{out.with_suffix('.log').read_text()[-3000:]}")


def kept(out: Path) -> dict[str, Any]:
    """The bytes of the last checkpoint and the backbone, and every metric that no clock measured."""
    last = out / f"checkpoints/step_{STEPS:08d}"
    content: dict[str, Any] = {path.name: path.read_bytes() for path in [*last.iterdir(), out / "backbone.safetensors"]}
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    content["metrics.jsonl"] = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
    return content


def main() -> None:
    folder, kills, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    quiet_libraries()
    torch.set_num_threads(1)  # a fork after a parallel computation would wait for threads that it does not have
    failed = False
    for seed, name in enumerate(sys.argv[4:]):
        whole, cut = folder / f"{name}_whole", folder / f"{name}_cut"
        finish(name, whole, 0)
        told = kill_until_finished(name, cut, workers, kills, seed)
        one, other = kept(whole), kept(cut)
        different = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
        failed |= bool(different)
        epochs = dict(sorted(Counter(step // EPOCH for step in told).items()))
        print(f"{name}: {workers} workers, kills by epoch {epochs}; different: {different or 'nothing'}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
