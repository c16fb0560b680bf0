"""Runs of the real program in a temporary folder, for the doctor: the first minutes, a kill and resume, an incident."""

import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gcssl.checkpoint import list_checkpoints
from gcssl.config import PretrainConfig, config_dict, load_config, read_yaml, to_yaml
from gcssl.errors import NumericStop, Preempted, UserError
from gcssl.eval.finetune import FinetuneConfig, finetune
from gcssl.loader import Sizes
from gcssl.log import say
from gcssl.pretrain import pretrain
from gcssl.runtime import batch_layout, make_accelerator
from gcssl.ssl.objectives import SCHEMAS

QUIET = {"log.every": 1, "log.trackers": [], "eval.online_every": 0}
CLOCKED = ("images_per_s", "data_wait", "max_mem")  # metrics that tell of the machine, not of the run
STEPS = 6  # of verify-resume


def changed(cfg: PretrainConfig, values: dict[str, Any]) -> PretrainConfig:
    """A plain PretrainConfig with these keys set."""
    own = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(PretrainConfig)}
    for key, value in values.items():
        section, _, name = key.partition(".")
        own[section] = dataclasses.replace(own[section], **{name: value}) if name else value
    return PretrainConfig(**own)


@contextmanager
def elsewhere() -> Iterator[Path]:
    """A temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="gcssl-doctor-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ended_by_time() -> Iterator[None]:
    """Takes it for an end that train.max_hours is over; a signal still stops the program."""
    try:
        yield
    except Preempted as error:
        if "max_hours" not in str(error):
            raise


def metrics(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def first_steps(cfg: PretrainConfig, minutes: float, sizes: Sizes) -> list[dict[str, Any]]:
    """The metrics of training for real, by one process, for so long."""
    with elsewhere() as folder:
        keys = {**QUIET, "out": str(folder), "train.max_hours": minutes / 60, "checkpoint.every": 1e9}
        keys |= part_of_one(sizes.batch_size, sizes.accumulate)
        with ended_by_time(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            pretrain(changed(cfg, keys))
        return metrics(folder)


def part_of_one(batch_size: int, accumulate: int) -> dict[str, Any]:
    """Of a run of many processes with these micro-batches: the keys by which one process does its part."""
    return {"train.global_batch": None, "train.batch_size": batch_size, "train.accumulate": accumulate}


def rate(told: list[dict[str, Any]]) -> float:
    """images/s; the first step, which warms up, is left out."""
    warm = told[1:] or told
    return len(warm) / sum(1 / line["images_per_s"] for line in warm)


def duration(hours: float) -> str:
    """0.05 -> 3 minutes."""
    if hours < 1:
        return f"{60 * hours:.2g} minutes"
    return f"{hours:.3g} hours" if hours < 100 else f"{hours:.0f} hours ({hours / 24:.1f} days)"


def first_minutes(cfg: PretrainConfig, minutes: float, sizes: Sizes) -> tuple[str, str]:
    """(verdict, what was found) of training for real."""
    try:
        told = first_steps(cfg, minutes, sizes)
    except NumericStop as stop:
        return "FAIL", str(stop)
    speed, warm = rate(told), told[1:] or told
    waiting = sum(line["data_wait"] for line in warm) / len(warm)
    gpu = max(line.get("max_mem", 0.0) for line in told)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    memory = f"{gpu:.1f} GiB of GPU memory" if gpu else f"{rss:.1f} GiB of memory"
    hours = sizes.total_steps * sizes.global_batch / speed / sizes.world / 3600
    those = "one process" if sizes.world == 1 else f"{sizes.world} processes"
    text = f"{len(told)} steps, loss {told[0]['loss']:.4g} to {told[-1]['loss']:.4g}, {speed:.0f} images/s, {memory};"
    text += f" the whole run would take {duration(hours)} on {those} like this"
    if waiting > 0.2:
        return "warn", f"{text}; {100 * waiting:.0f} % of the time waits for data: raise data.workers"
    return "ok", text


def verify_resume(cfg: PretrainConfig, processes: int = 1) -> None:
    """Train six steps twice, once with a kill -9 after the third, and compare every bit; NumericStop if one differs.

    By one process, whose part of the run of so many it is.
    """
    steps = {**QUIET, "train.steps": STEPS, "checkpoint.every": 1e-9, "checkpoint.keep": STEPS}
    steps |= part_of_one(*batch_layout(cfg.train, processes)[:2])
    if torch.cuda.is_available() and not cfg.train.deterministic:
        steps["train.deterministic"] = True
        say(
            "verify-resume: with train.deterministic=true; without it a GPU's kernels need not give the same bits twice"
        )
    with elsewhere() as folder:
        whole, cut = folder / "whole", folder / "cut"
        say(f"verify-resume: {STEPS} steps without a break")
        finish(start(changed(cfg, {**steps, "out": str(whole)}), whole))
        say(f"verify-resume: {STEPS // 2} steps, kill -9, and the rest")
        process = start(changed(cfg, {**steps, "out": str(cut)}), cut)
        while process.poll() is None and not (cut / f"checkpoints/step_{STEPS // 2:08d}").exists():
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        else:
            finish(process)  # which tells why it ended by itself
        done = len(list_checkpoints(cut))
        finish(start(changed(cfg, {**steps, "out": str(cut)}), cut))
        if different := differences(whole, cut):
            raise NumericStop(f"verify-resume: killed after step {done}: {len(different)} differ: {different[0]}")
        say(f"verify-resume: killed after step {done}; weights, optimizer, objective and metrics are equal bit for bit")


def start(cfg: PretrainConfig, out: Path) -> subprocess.Popen[str]:
    """The real program in a process group of its own, which a kill reaches whole."""
    yaml = out.with_suffix(".yaml")
    yaml.write_text(to_yaml(config_dict(cfg)))
    argv = [sys.executable, "-m", "gcssl.pretrain", str(yaml)]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=pipe, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, stderr = process.communicate()
    if process.returncode:
        raise UserError(f"verify-resume: the run itself failed: {(stderr.strip().splitlines() or ['no message'])[-1]}")


def differences(one: Path, other: Path) -> list[str]:
    """Names of what is not equal in the last checkpoints and the metrics of two runs."""
    found = []
    for name in ("model", "optimizer"):
        a, b = (load_file(list_checkpoints(out)[0] / f"{name}.safetensors") for out in (one, other))
        found += [
            f"{name} {key}"
            for key in sorted(a.keys() | b.keys())
            if key not in a or key not in b or not equal(a[key], b[key])
        ]
    for a_line, b_line in zip(metrics(one), metrics(other), strict=False):
        found += [
            f"step {a_line['step']}, {key}" for key in a_line if key not in CLOCKED and a_line[key] != b_line.get(key)
        ]
    return found + (["the number of metrics"] if len(metrics(one)) != len(metrics(other)) else [])


def equal(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype and a.shape == b.shape and a.view(-1).view(torch.uint8).equal(b.view(-1).view(torch.uint8))
    )


def replay(argv: list[str]) -> None:
    """Run the step again that an incident stopped on, in a copy of its folder, and say whether the same comes of it.

    argv: the incident's folder, then keys that a resume may change (train.batch_size, data.workers, ...).
    """
    if not argv or not (Path(argv[0]) / "incident.json").exists():
        given = argv[0] if argv else "nothing"
        raise UserError(f"replay: given {given}, expected a folder RUN/incidents/after_step_N")
    incident = json.loads((Path(argv[0]) / "incident.json").read_text())
    with elsewhere() as folder:
        copy = shutil.copytree(argv[0], folder / "run")
        one_step = ["train.max_hours=0", "log.every=1", "log.trackers=[]", "checkpoint.every=1e9"]
        one_step += ["train.max_bad_steps=2"]  # a bad one is told below, and does not end this
        run_again(copy, [*argv[1:], *one_step, f"out={copy}"])
        told = [line for line in metrics(copy) if line["step"] == incident["step"] + 1 and "loss" in line]
        again = (
            [json.loads(line) for line in (copy / "bad_steps.jsonl").read_text().splitlines()]
            if (copy / "bad_steps.jsonl").exists()
            else []
        )
    first = next(iter(incident["steps"]), None)
    say(f"replay: the run stopped: {incident['reason']}")
    if not told:
        raise UserError(f"replay: step {incident['step']} was the run's last: none follows that could be run again")
    say(
        f"replay: step {incident['step'] + 1} again: "
        + ", ".join(f"{k} {'not finite' if v is None else f'{v:.6g}'}" for k, v in told[-1].items() if k != "step")
    )
    if first is None:
        say("replay: no bad step was listed: the values above are those that the collapse went on with")
    elif again and (again[0]["reason"], again[0]["indices"]) == (first["reason"], first["indices"]):
        say(f"replay: reproduced: {first['reason']}; images {first['indices'][:16]}")
    else:
        raise NumericStop(
            f"replay: not reproduced: then {first['reason']}, now {again[0]['reason'] if again else 'a good step'}"
        )


def run_again(copy: Path, argv: list[str]) -> None:
    """Go on with the run in `copy`, a pretraining or a fine-tuning, until it stops."""
    yaml = copy / "config.yaml"
    with ended_by_time():
        if "objective" in read_yaml(yaml):
            pretrain(load_config(PretrainConfig, [str(yaml), *argv], SCHEMAS))
        else:
            cfg = load_config(FinetuneConfig, [str(yaml), *argv])
            spec = json.loads((copy / "env.json").read_text())["facts"].get("backbone", cfg.backbone)
            finetune(cfg, make_accelerator(cfg.train, cfg.runtime), copy, spec)
