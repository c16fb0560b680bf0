"""`make demo`: the main job end to end on the generated images, then one table.

Pretrains through `accelerate launch pretrain.py`, evaluates kNN, linear probe and fine-tuning beside an untrained
backbone in this one process (imports cost seconds each), exports the backbone and reloads it in timm.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gcssl.errors import UserError
from gcssl.runfolder import check_writable
from gcssl.runtime import bf16_is_fast, entry

ROOT = Path(__file__).resolve().parent.parent
MARK = ".demo"  # in a folder that a demo made
LAUNCH = ["accelerate", "launch", "-q", "--config_file", "configs/accelerate/one.yaml"]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="the main job end to end on generated images")
    parser.add_argument("--out", default="runs/demo", help="run folder; what an earlier demo left there is removed")
    parser.add_argument(
        "--quick", action="store_true", help="few steps: shows that every part works, not what it learns"
    )
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    out, started = Path(args.out), time.perf_counter()
    clear(out)
    precision = f"train.precision={'bf16' if bf16_is_fast() else 'fp32'}"
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))  # accelerate launch would take one
    few = ["data.shapes_n=600", "train.epochs=2", "train.warmup_epochs=0", "eval.online_every=1"] if args.quick else []
    command = ["pretrain.py", "configs/pretrain/demo.yaml", f"out={out}", precision, *few]
    heading(1, "pretrain", " ".join([*LAUNCH, *command]))
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *LAUNCH[1:]]
    if code := subprocess.run([*launcher, *command]).returncode:
        sys.exit(code)
    results = evaluate(out, precision, args.quick)
    heading(
        5,
        "export to timm, and reload it there",
        f"python -m gcssl.export backbone={out} format=timm out={out}/timm",
    )
    export(out)
    print_table(results)
    if args.quick:
        print("few steps, by --quick: every part works; what they learn in so little time says nothing")
    print(f"everything is in {out} ({(time.perf_counter() - started) / 60:.1f} minutes)")


def clear(out: Path) -> None:
    """Remove an earlier demo, and nothing else; leaves the mark by which the next demo knows this one."""
    check_writable(str(out))
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise UserError(f"--out {out}: holds something else than a demo; give another folder, or remove it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def heading(number: int, what: str, command: str) -> None:
    print(f"\n[{number}/5] {what}\n      {command}", flush=True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def evaluate(out: Path, precision: str, quick: bool) -> dict[str, Any]:
    """The three evaluations, each beside an untrained backbone: {metric: value, ..., "compare": {...}}."""
    from gcssl.config import TrainConfig, load_config
    from gcssl.eval import finetune, knn, linear_probe
    from gcssl.runtime import make_accelerator, quiet_libraries

    quiet_libraries()
    tune = ["configs/eval/finetune_demo.yaml"]
    few = [precision, *(["train.epochs=2", "train.warmup_epochs=0"] if quick else [])]
    jobs: list[tuple[Any, type, list[str], list[str]]] = [
        (knn, knn.KnnConfig, [], []),
        (linear_probe, linear_probe.LinearProbeConfig, [], []),
        (finetune, finetune.FinetuneConfig, tune, few),
    ]
    merged: dict[str, Any] = {"compare": {}}
    for number, (module, schema, files, settings) in enumerate(jobs, 2):
        name = module.__name__.rpartition(".")[2]
        argv = [*files, f"backbone={out}", "compare=random", *settings]
        heading(number, name, " ".join([*LAUNCH, "-m", f"gcssl.eval.{name}", *argv]))
        cfg: Any = load_config(schema, argv)
        train = cfg.train if module is finetune else TrainConfig(precision=cfg.precision)
        result = module.run(cfg, make_accelerator(train, cfg.runtime))
        merged |= {key: value for key, value in result.items() if "/" in key}
        merged["compare"] |= result["compare"]
    return merged


def export(out: Path) -> None:
    """Export, then let timm load the folder and compare its features with ours."""
    import timm
    import torch

    from gcssl.export import ExportConfig
    from gcssl.export import export as write_export
    from gcssl.models.load import load_backbone

    folder = write_export(ExportConfig(backbone=str(out), format="timm", out=str(out / "timm")))
    ours, _ = load_backbone(str(out))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    images = torch.randn(2, 3, *ours.img_size)
    with torch.no_grad():
        gap = (ours.eval()(images) - theirs.eval()(images)).abs().max().item()
    print(f"timm.create_model('local-dir:{folder}', pretrained=True): its features differ from ours by {gap:.0e}")


def print_table(results: dict[str, Any]) -> None:
    rows = {
        "kNN, k=20": "knn/top1@20",
        "linear probe": "linear/top1",
        "fine-tuned, same budget": "finetune/top1",
    }
    print(f"\ntop-1 on the test images (%)  {'pretrained':>10}  {'untrained':>10}  {'gain':>6}")
    for name, key in rows.items():
        ours, theirs = results[key], results["compare"][key]
        print(f"{name:<28}  {ours:10.1f}  {theirs:10.1f}  {ours - theirs:+6.1f}")
    print()


if __name__ == "__main__":
    entry(main)
