"""Every yaml in configs/ and every command in the documents loads; recipes build and fit the processes they name."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from gcssl.config import PretrainConfig, config_dict, load_config
from gcssl.dryrun import DoctorConfig
from gcssl.errors import UserError
from gcssl.eval.finetune import FinetuneConfig
from gcssl.eval.inputs import InputConfig
from gcssl.eval.knn import KnnConfig
from gcssl.eval.linear_probe import LinearProbeConfig
from gcssl.export import ExportConfig
from gcssl.keys import flatten
from gcssl.loader import ViewMaker, batch_to_device, collate, run_sizes
from gcssl.models.build import BACKBONES, from_config
from gcssl.optim import make_optimizer, param_groups, set_lr
from gcssl.plan import PlanConfig
from gcssl.ssl.base import Setup
from gcssl.ssl.objectives import OBJECTIVES, SCHEMAS

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs/pretrain").glob("*.yaml"))
EVALUATIONS = {
    "knn": KnnConfig, "linear_probe": LinearProbeConfig,
    "finetune_demo": FinetuneConfig, "finetune_in1k": FinetuneConfig,
}  # fmt: skip
PROGRAMS = {
    "pretrain.py": PretrainConfig, "gcssl.pretrain": PretrainConfig, "gcssl.doctor": DoctorConfig,
    "gcssl.plan": PlanConfig, "gcssl.export": ExportConfig, "gcssl.eval.knn": KnnConfig,
    "gcssl.eval.linear_probe": LinearProbeConfig, "gcssl.eval.finetune": FinetuneConfig,
    "gcssl.eval.validate": InputConfig,
}  # fmt: skip
NO_CONFIG = ("gcssl.eval.compare", "gcssl.doctor replay")
IMAGES = {"shapes": 10_000, "/data/imagenet": 1_281_167, "/data/cifar10": 50_000}


def load(path: Path, *argv: str) -> PretrainConfig:
    return load_config(PretrainConfig, [str(path), *argv], SCHEMAS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_builds_and_fits_its_processes(path: Path) -> None:
    head = path.read_text().splitlines()[0]
    launch = re.search(r"--config_file (\S+) pretrain.py (\S+)(?: data.path=(\S+))?", head)
    assert launch and launch[2] == f"configs/pretrain/{path.name}", head
    world = yaml.safe_load((ROOT / launch[1]).read_text())["num_processes"]
    cfg = load(path)
    assert cfg.model.name in BACKBONES
    objective_class = OBJECTIVES[cfg.objective.name][0]
    n_images = cfg.data.shapes_n if cfg.data.path == "shapes" and not launch[3] else IMAGES[launch[3]]
    sizes = run_sizes(cfg.train, n_images, world)

    tiny = ["model.name=gcvit_nano", "model.img_size=64"]
    small = {"hidden_dim": 16, "out_dim": 16, "local_size": 32, "local_crops": 2, "decoder_dim": 32}
    tiny += [f"objective.{key}={value}" for key, value in small.items() if getattr(cfg.objective, key, None)]
    cfg = load(path, *tiny)
    encoder = from_config(cfg.model)
    objective = objective_class(cfg.objective, encoder, Setup(cfg.augment, (64, 64), 4, 2))
    assert not (objective.couples_batch and sizes.accumulate > 1), sizes
    make = ViewMaker(objective.draw, (64, 64), cfg.augment)
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    optimizer = make_optimizer(param_groups(objective.named_parameters(), cfg.train.weight_decay), cfg.train)
    start = [p.detach().clone() for p in encoder.parameters()]
    for step in range(2):
        batch = collate([make(noise, None, (step, i)) for i in range(2)])
        batch = batch_to_device(batch, "cpu", encoder.mean, encoder.std, cfg.augment)
        loss = objective(batch, step)["loss"]
        loss.backward()
        set_lr(optimizer, 1e-4)
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step)
        assert torch.isfinite(loss)
    assert not all(torch.equal(a, b) for a, b in zip(start, encoder.parameters(), strict=True))


def test_every_evaluation_yaml_loads() -> None:
    found = {path.stem: path for path in (ROOT / "configs/eval").glob("*.yaml")}
    assert found.keys() == EVALUATIONS.keys()
    for name, path in found.items():
        cfg = load_config(EVALUATIONS[name], [str(path)])
        found_there, told = flatten(config_dict(cfg)), flatten(yaml.safe_load(path.read_text()))
        assert {key: found_there[key] for key in told} == told, path


def shown(document: Path) -> Iterator[tuple[int, str]]:
    """The lines in the code blocks of a document, continued ones joined, with the number of their first."""
    inside, begun, whole = False, 0, ""
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if line.startswith("```"):
            inside, whole = not inside, ""
        elif inside:
            begun = begun if whole else number
            whole += line.removesuffix("\\")
            if not line.endswith("\\"):
                yield begun, whole
                whole = ""


def test_every_command_in_the_documents_has_keys_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those with a placeholder (<key>, ...) or a variable of the shell."""
    monkeypatch.chdir(ROOT)
    loaded, wrong = 0, []
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for number, line in shown(document):
            call = re.search(r"(pretrain\.py(?= configs/)|(?<=-m )gcssl[\w.]*) +(.*)", line)
            if call is None or re.search(r"[<>…$]|\.\.\.", line := call[2].partition(" #")[0]):
                continue
            if f"{call[1]} {line}".startswith(NO_CONFIG):
                continue
            try:
                words = shlex.split(line.removeprefix("verify-resume "))
                load_config(PROGRAMS[call[1]], words, SCHEMAS)
                loaded += 1
            except (UserError, KeyError) as error:
                wrong.append(f"{document.relative_to(ROOT)}:{number}: {error}")
    assert not wrong, "\n".join(wrong)
    assert loaded >= 10


def test_every_launcher_yaml_leaves_precision_and_compilation_to_the_run() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    for path in (ROOT / "configs/accelerate").glob("*.yaml"):
        cfg = load_config_from_file(str(path))
        assert cfg.mixed_precision == "no" and cfg.to_dict().get("dynamo_config", {}) == {}, path
        assert path.name in path.read_text().splitlines()[0] + path.read_text().splitlines()[1]
