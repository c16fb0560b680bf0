"""Every objective on the same real images, for the same number of images seen, judged the same way.

    python -m scripts.objectives_table data=cifar10_12k [objective ...]       (all of them: hours; one thread each)

Pretrains gcvit_nano by each nano recipe with the settings of scripts/learning.py for EPOCHS epochs, then kNN,
a linear probe and FINETUNE_EPOCHS of fine-tuning, all at 64 px. What each wrote is kept in its folder of RESULTS;
an objective that stands there is left alone, `none` is the untrained backbone. Ends with the table of all there are.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from gcssl.config import PretrainConfig, load_config
from gcssl.errors import UserError
from gcssl.eval import finetune, knn, linear_probe
from gcssl.eval.compare import compare
from gcssl.plan import PlanConfig, count, dry_run, si
from gcssl.pretrain import pretrain
from gcssl.runtime import entry, make_accelerator
from gcssl.ssl.objectives import SCHEMAS
from scripts.learning import ROOT, SETTINGS
from scripts.timing import markdown

RESULTS = ROOT / "docs/results/cifar10_objectives"
EPOCHS, FINETUNE_EPOCHS = 5, 3
PRETRAIN = ["data.workers=0", "eval.online_every=1", "train.precision=fp32", "train.warmup_epochs=0.5"]
PRETRAIN += [f"train.epochs={EPOCHS}", "train.steps=null"]
UNTRAINED = ["model.name=gcvit_nano", "model.window_ratio=[16,16,16,32]"]
FINETUNE = [str(ROOT / "configs/eval/finetune_demo.yaml"), f"train.epochs={FINETUNE_EPOCHS}", "train.batch_size=128"]
FINETUNE += ["train.lr_base=128", "data.workers=0"]
JUDGED = {"knn": "knn/top1@20", "linear_probe": "linear/top1", "finetune": "finetune/top1"}
FILES = ("config.yaml", "metrics.jsonl", "cost.json", *(f"{task}.json" for task in JUDGED))


def study(name: str, data: str, out: Path) -> None:
    """Pretrain by `name` in `out`, evaluate, keep the files."""
    shutil.rmtree(out, ignore_errors=True)
    where = [f"data.path={data}"]
    if name == "none":
        source = ["backbone=random", f"out={out}", *UNTRAINED, *where]
    else:
        source = [f"backbone={out}"]
        argv = [
            str(ROOT / f"configs/pretrain/{name}_gcvit_nano.yaml"),
            *SETTINGS[name],
            *PRETRAIN,
            *where,
            f"out={out}",
        ]
        cfg = load_config(PretrainConfig, argv, SCHEMAS)
        counted = count(dry_run(load_config(PlanConfig, argv, SCHEMAS)))
        pretrain(cfg)
        memory = (counted.fixed_mib + cfg.train.batch_size * counted.image_mib) / 1024
        (out / "cost.json").write_text(json.dumps({"flops_an_image": counted.flops, "gib": memory}) + "\n")
    accelerator = make_accelerator(PretrainConfig().train, PretrainConfig().runtime)
    at = [*source, "model.img_size=64"]
    knn.run(load_config(knn.KnnConfig, at), accelerator)
    linear_probe.run(load_config(linear_probe.LinearProbeConfig, at), accelerator)
    finetune.run(load_config(finetune.FinetuneConfig, [*FINETUNE, *at]), accelerator)
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    for file in FILES:
        for path in (out / file, out / "eval" / file):
            if path.exists():
                text = path.read_text().replace(data, Path(data).name).replace(f"{ROOT}/", "")
                (RESULTS / name / file).write_text(text)


def row(name: str) -> dict[str, str]:
    """Counted cost, top-1 of the three evaluations, and McNemar's p against the untrained backbone's."""
    folder = RESULTS / name
    shown = {"objective": name}
    if name != "none":
        cost = json.loads((folder / "cost.json").read_text())
        shown |= {"flops": si(cost["flops_an_image"]), "gib": f"{cost['gib']:.2f}"}
    for task, metric in JUDGED.items():
        path, untrained = (RESULTS / one / f"{task}.json" for one in (name, "none"))
        shown[task] = f"{json.loads(path.read_text())[metric]:.2f}"
        if name != "none":
            shown[task] += f" (p {compare(path, untrained)['p']:.0e})"
    return shown


def main(argv: list[str]) -> None:
    options = dict(word.split("=", 1) for word in argv if "=" in word)
    names = [word for word in argv if "=" not in word] or ["none", *SETTINGS]
    if unknown := [name for name in names if name not in ("none", *SETTINGS)]:
        raise UserError(f"{unknown[0]}: no such objective; one of none, {', '.join(SETTINGS)}")
    if options.keys() != {"data"}:
        raise UserError("expected data=<a folder that gcssl opens> and names of objectives")
    torch.set_num_threads(1)
    for name in names:
        if not (RESULTS / name).exists():
            study(name, options["data"], ROOT / f"runs/objectives/{name}")
    there = [name for name in ("none", *SETTINGS) if (RESULTS / name).exists()]
    if "none" in there:
        heads = ["objective", "FLOPs an image and step", "GiB", "kNN, k 20", "linear probe", "fine-tuned"]
        rows = [dict.fromkeys(("flops", "gib"), "") | row(name) for name in there]
        keys = ["objective", "flops", "gib", *JUDGED]
        sys.stdout.write(markdown(rows, {head: f"{{{key}}}" for head, key in zip(heads, keys, strict=True)}))


if __name__ == "__main__":
    entry(main)
