"""scripts/slurm/pretrain.sbatch under a scheduler of two small scripts: what it starts, and when it queues again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
YAML = str(ROOT / "configs/pretrain/simmim_gcvit_nano.yaml")
KEYS = [
    "data.shapes_n=48", "data.workers=1", "train.batch_size=8", "train.global_batch=16", "train.warmup_epochs=1",
    "log.every=1", "log.trackers=[]", "eval.online_every=0", "checkpoint.every=1000",
]  # fmt: skip
# srun: one process a task, and the highest exit code of them; scontrol: the names of the nodes, and a list of requeues.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
highest=0
for pid in "${pids[@]}"; do
    wait "$pid"
    code=$?
    ((code > highest)) && highest=$code
done
exit $highest
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo localhost ;;
    requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


class Cluster:
    def __init__(self, folder: Path, tasks: int) -> None:
        self.out, self.requeued = folder / "run", folder / "requeued"
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        self.env = {
            **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT),
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": str(tasks),
            "SLURM_NTASKS_PER_NODE": str(tasks), "REQUEUED": str(self.requeued), "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip

    def submit(self, *keys: str) -> subprocess.Popen[str]:
        argv = ["bash", str(ROOT / "scripts/slurm/pretrain.sbatch"), YAML, *KEYS, f"out={self.out}", *keys]
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, cwd=ROOT, env=self.env, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def status(self) -> dict[str, object]:
        return json.loads((self.out / "status.json").read_text())

    def processes(self) -> list[int]:
        """What runs of this job on the nodes: the tasks and their workers, not the shells."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"out={self.out}".encode() in words and b"gcssl.pretrain" in words:
                found.append(int(folder.name))
        return found


@pytest.mark.fault(
    "USR1 from the scheduler to every process of a job, workers too",
    "a checkpoint, exit 75, queued again once; the next start ends it",
)
@pytest.mark.parametrize("tasks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_told_to_stop_queues_again_and_goes_on(tasks: int, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, tasks)
    job = cluster.submit("train.steps=2000")
    limit = time.monotonic() + 120
    while not (cluster.out / "metrics.jsonl").exists():
        assert job.poll() is None and time.monotonic() < limit, job.communicate()[0]
        time.sleep(0.05)
    for pid in cluster.processes():
        os.kill(pid, signal.SIGUSR1)
    job.send_signal(signal.SIGTERM)  # some schedulers signal the script too
    told = job.communicate(timeout=100)[0]
    assert job.returncode == 75 and "queues again" in told, told
    assert cluster.status()["state"] == "preempted"
    assert cluster.requeued.read_text().split() == [cluster.env["SLURM_JOB_ID"]]
    assert not cluster.processes()

    step = cluster.status()["step"]
    job = cluster.submit("train.steps=2000", "train.max_hours=0")  # one step more, and again
    assert job.communicate(timeout=100) and job.returncode == 75
    assert cluster.status()["step"] == step + 1 and len(cluster.requeued.read_text().split()) == 2


@pytest.mark.parametrize(
    ("key", "code", "told"),
    [
        pytest.param("train.steps=1", 0, "backbone.safetensors", marks=pytest.mark.slow),
        ("train.stepz=1", 2, "train.stepz"),
    ],
)
def test_a_job_that_finished_or_was_refused_does_not_queue_again(
    key: str, code: int, told: str, tmp_path: Path
) -> None:
    cluster = Cluster(tmp_path, 1)
    job = cluster.submit(key)
    said = job.communicate(timeout=100)[0]
    assert job.returncode == code and told in said, said
    assert not cluster.requeued.exists()
