"""load_config: what it accepts, and the one line with which it refuses the rest."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gcssl.config import PretrainConfig, config_dict, load_config, to_yaml
from gcssl.errors import UserError
from gcssl.eval.knn import KnnConfig
from gcssl.keys import diff_configs, leaves, meanings
from gcssl.ssl.dino import DINOConfig
from gcssl.ssl.ibot import IBOTConfig
from gcssl.ssl.joint import JointConfig


@dataclass
class Pixels:
    name: str = "pixels"
    mask_ratio: float = 0.6
    mask_unit: int | None = None


@dataclass
class View:
    name: str = "pairs"
    temperature: float = 0.2


@dataclass
class Both:
    name: str = "both"
    view: View = field(default_factory=View)
    weights: list[float] = field(default_factory=lambda: [1.0, 1.0])
    mode: str = field(default="sum", metadata={"choices": ("sum", "mean")})


OBJECTIVES = {"pixels": Pixels, "pairs": View, "both": Both}


def load(*argv: str) -> PretrainConfig:
    return load_config(PretrainConfig, list(argv), OBJECTIVES)


def refusal(*argv: str) -> str:
    named = any(one.startswith(("objective.name", "objective=")) for one in argv)
    with pytest.raises(UserError) as refused:
        load(*argv, *(() if named else ("objective.name=pixels",)))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_help_lists_every_key_with_its_default_or_what_the_recipe_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        load("--help")
    lines = capsys.readouterr().out.splitlines()
    assert left.value.code == 0 and "  train.epochs=100  (a whole number)" in lines
    assert "  objective.mask_ratio=0.6  (a number)" in lines
    assert "  model.img_size=64  (a side or [height,width])  side, or [height, width], in pixels" in lines
    path = tmp_path / "x.yaml"
    path.write_text("train.epochs: 7\nmodel: {img_size: [64, 96]}\n")
    with pytest.raises(SystemExit):
        load(str(path), "--help")
    lines = capsys.readouterr().out.splitlines()
    assert "  train.epochs=7  (a whole number)" in lines
    assert any(line.startswith("  model.img_size=[64, 96]  (a side or [height,width])") for line in lines)


def test_help_says_what_a_key_means_where_a_dataclass_has_a_comment_beside_it() -> None:
    assert "student_temp" not in meanings(DINOConfig())
    assert meanings(DINOConfig())["out_dim"] == "prototypes"  # of PrototypeConfig
    assert meanings(IBOTConfig())["out_dim"] == "of the one head for views and regions"
    asked = meanings(KnnConfig())
    assert asked["data.workers"] == "of each process"  # not the type: ignore of AskedData
    assert not any("type:" in meaning for meaning in asked.values())
    joint = meanings(JointConfig())  # whose keys are those of its parts, in a class without source
    assert joint["secondary_ratio"] == "of the kept units" and joint["weights"] == "of masked, of view"
    assert joint["local_size"] == "their side in pixels"  # of a class above a part's
    assert leaves(JointConfig()).keys() > joint.keys()


def test_layers_later_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("objective: {name: pixels, mask_ratio: 0.5}\ntrain: {epochs: 5, blr: 1e-3}\n")
    second.write_text("train.epochs: 6\n")
    cfg = load(str(first), str(second), "train.seed=1", "train.seed=2")
    assert (cfg.train.epochs, cfg.train.blr, cfg.train.seed) == (6, 1e-3, 2)
    assert cfg.train.batch_size == PretrainConfig().train.batch_size
    assert cfg.objective == Pixels(mask_ratio=0.5)


def test_the_objective_is_typed_by_its_name() -> None:
    cfg = load("objective.name=both", "objective.view.temperature=1", "objective.weights=[1,2]")
    assert cfg.objective == Both(view=View(temperature=1.0), weights=[1.0, 2.0])
    assert isinstance(cfg.objective.weights[0], float)


def test_home_is_found_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = tmp_path / "a.yaml"
    recipe.write_text("data: {cache_dir: ~/cache}\nmodel.weights: ~/w\n")
    cfg = load(str(recipe), "objective.name=pixels", "out=~/run", "data.path=a~/b")
    assert (cfg.out, cfg.data.path) == (f"{tmp_path}/run", "a~/b")
    assert (cfg.data.cache_dir, cfg.model.weights) == (f"{tmp_path}/cache", f"{tmp_path}/w")


def test_image_sizes() -> None:
    assert load("objective.name=pixels", "model.img_size=96").model.img_size == 96
    assert load("objective.name=pixels", "model.img_size=[64,96]").model.img_size == [64, 96]
    for bad in ("64x96", "[64]", "[64,96,3]", "0", "-32", "64.5", "true", "null"):
        assert refusal(f"model.img_size={bad}").startswith("model.img_size: given ")


def test_text_is_taken_as_written() -> None:
    cfg = load("objective.name=pixels", "out=007", "data.path=/a b/c: d=e", "model.weights=null")
    assert (cfg.out, cfg.data.path, cfg.model.weights) == ("007", "/a b/c: d=e", None)
    assert load("objective.name=pixels", "out='null'").out == "null"
    assert load("objective.name=pixels", "out=no").out == "no"


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("train.epoch=3", "train.epoch: no such key; did you mean train.epochs?"),
        ("epochs=3", "epochs: no such key; did you mean train.epochs?"),
        ("zzz=1", "zzz: no such key; the config has allow_env, "),
        (
            "objective.mask_ration=.5",
            "objective.mask_ration: no such key; did you mean objective.mask_ratio?",
        ),
        ("train.epochs=abc", "train.epochs: given abc, expected a whole number"),
        ("train.epochs=1.5", "train.epochs: given 1.5, expected a whole number"),
        ("train.steps=x", "train.steps: given x, expected a whole number or null"),
        ("train.blr=nan", "train.blr: given NaN, expected a finite number"),
        ("train.blr=fast", "train.blr: given fast, expected a number"),
        ("train.compile=3", "train.compile: given 3, expected true or false"),
        ("train.betas=3", "train.betas: given 3, expected a list: train.betas=[0.9,0.999]"),
        ("train.betas=[0.9", "train.betas: given [0.9, which is no valid yaml"),
        ("train=3", "train: given 3, expected keys inside it"),
        ("train.epochs", "train.epochs: expected [file.yaml ...] key=value"),
        ("--train.epochs=3", "--train.epochs: options are written without dashes"),
        ("nothing.yaml", "nothing.yaml: no such config file"),
        ("train.precision=no", "train.precision: given no, expected one of fp32, bf16, fp16"),
        (
            "train.precision=bf61",
            "train.precision: given bf61, expected one of fp32, bf16, fp16; did you mean bf16?",
        ),
        ("train.lr_rule=cubic", "train.lr_rule: given cubic, expected one of linear, sqrt, none"),
        ("model.bias_resize=area", "model.bias_resize: given area, expected one of bicubic, crop"),
        ("augment.where=gpu", "augment.where: given gpu, expected one of device, worker"),
        (
            "eval.backend=fais",
            "eval.backend: given fais, expected one of auto, faiss, torch; did you mean faiss?",
        ),
        ("train.optimizer=lion", "train.optimizer: given lion, expected one of adamw, sgd, lars, lamb"),
        ("encoder=both", "encoder: given both, expected one of student, teacher"),
        ("log.trackers=[wandb]", 'log.trackers: given ["wandb"], expected one of tensorboard'),
        ("log.trackers=tensorboard", "log.trackers: given tensorboard, expected a list: log.trackers=[tensorboard]"),
        ("log.trackers=wandb", "log.trackers: given wandb, expected a list: log.trackers=[tensorboard]"),
        ("objective=pixels", "objective: given pixels, expected objective.name=pixels"),
        (
            "objective.name=pixel",
            "objective.name: given pixel, expected one of pixels, pairs, both; did you mean pix",
        ),
        ("objective.name=${nope}", "objective.name: given ${nope}, expected one of pixels"),
        ("train.epochs=${nope}", "train.epochs: Interpolation key 'nope' not found"),
    ],
)
def test_refusals(argument: str, line: str) -> None:
    assert refusal(argument).startswith(line)


def test_spaces_and_a_late_yaml_are_told() -> None:
    assert refusal("train.seed", "=", "4").endswith("; write key=value without spaces")
    assert refusal("train.seed=4", "more.yaml").endswith("; yaml files come before all keys")


def test_an_objective_must_be_chosen_and_keeps_to_its_keys() -> None:
    with pytest.raises(
        UserError, match="objective.name: not given, expected one of pixels, pairs, both; or give a yaml"
    ):
        load()
    assert refusal("objective.name=pairs", "objective.mask_ratio=.5").startswith("objective.mask_ratio: no such")
    assert refusal("objective.name=both", "objective.mode=max").startswith("objective.mode: given max, expected one")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a: [1\nb: 2", "no valid yaml: did not find expected ',' or ']' in line 2"),
        ("- 1\n", "expected keys and values, got a list"),
        ("train: {epochs: 1}\ntrain: {epochs: 2}\n", "no valid yaml: found duplicate key train"),
    ],
)
def test_damaged_yaml(tmp_path: Path, content: str, line: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(content)
    assert refusal(str(path)).startswith(f"{path}: {line}")


def test_yaml_truth_values_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("train: {precision: no}\n")
    line = refusal(str(path))
    assert line.startswith("train.precision: given false, expected one of fp32, bf16, fp16 (yaml reads")
    assert str(path) in line


def test_the_environment_is_read_only_when_the_command_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GCSSL_TEST", "secret")
    path = tmp_path / "x.yaml"
    path.write_text("out: ${oc.env:GCSSL_TEST}\nallow_env: true\n")
    assert refusal(str(path)).startswith("out: ${oc.env:GCSSL_TEST} may read the environment, expected")
    for hidden in ("${oc.decode:${oc.env:GCSSL_TEST}}", "${oc.${data.path}:GCSSL_TEST}", "${ oc.env : GCSSL_TEST}"):
        assert "may read the environment" in refusal(f"out={hidden}")
    assert load("objective.name=pixels", "out=x_${train.seed}_${train.betas[0]}").out == "x_0_0.9"
    assert load(str(path), "objective.name=pixels", "allow_env=true").out == "secret"
    path.write_text("allow_env: true\n")
    assert not load(str(path), "objective.name=pixels").allow_env


def test_dump_and_load_give_the_same_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    given = load(
        "objective.name=both",
        "out=1e-3",
        "train.blr=1e-7",
        "train.steps=3",
        "data.path=off",
        "log.trackers=[]",
    )
    path.write_text(to_yaml(config_dict(given)))
    assert load(str(path)) == given
    json.dumps(config_dict(given))


def test_diff_names_each_changed_key_once() -> None:
    old, new = (
        config_dict(load("objective.name=pixels")),
        config_dict(load("objective.name=pixels", "train.steps=5")),
    )
    assert diff_configs(old, new) == ["train.steps: null -> 5"]
    assert diff_configs(old, old) == []
    assert "objective.mask_ratio: 0.6 -> (absent)" in diff_configs(old, config_dict(load("objective.name=pairs")))


def test_the_shared_tables_name_real_keys() -> None:
    """A choice or a range listed under a key that was renamed would check nothing."""
    from gcssl.dryrun import DoctorConfig
    from gcssl.eval.finetune import FinetuneConfig
    from gcssl.eval.knn import KnnConfig
    from gcssl.eval.linear_probe import LinearProbeConfig
    from gcssl.export import ExportConfig
    from gcssl.keys import CHOICES, RANGES, leaves
    from gcssl.plan import PlanConfig

    schemas = (DoctorConfig, PlanConfig, FinetuneConfig, KnnConfig, LinearProbeConfig, ExportConfig)
    known = {key for schema in schemas for key in leaves(schema())}
    assert set(CHOICES) | set(RANGES) <= known


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("log.every=0", "at least 1"),
        ("checkpoint.keep_every=-1", "at least 0"),
        ("checkpoint.every=0.0", "above 0"),
        ("data.timeout=0", "at least 1"),
        ("checkpoint.keep=1", "at least 2"),
        ("model.in_chans=1", "expected 3"),
        ("data.workers=-1", "at least 0"),
        ("data.max_bad=2.0", "0 to 1"),
        ("train.clip_grad=-1.0", "at least 0"),
        ("train.batch_size=0", "at least 1"),
        ("train.accumulate=0", "at least 1"),
        ("train.global_batch=0", "at least 1"),
        ("train.betas=[0.9]", "a list of 2 numbers"),
        ("train.betas=[0.9,1.0]", "each 0 to"),
        ("train.lr_base=0", "at least 1"),
        ("model.window_ratio=[16]", "a list of 4 numbers"),
        ("train.blr=-1.0", "at least 0"),
        ("train.min_lr=-1.0", "at least 0"),
        ("train.weight_decay=-1.0", "at least 0"),
        ("train.weight_decay_end=-1.0", "at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_one_line(argument: str, expected: str) -> None:
    key, given = argument.split("=")
    with pytest.raises(UserError) as refused:
        load("objective.name=pixels", argument)
    line = str(refused.value)
    assert line.startswith(f"{key}: given {given[:4]}") and expected in line and "\n" not in line
    load("objective.name=pixels", "train.clip_grad=0.0", "checkpoint.keep_every=0")  # both: none


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("crop_pct=0.0", "above 0 and at most 1"),
        ("crop_pct=-0.5", "above 0 and at most 1"),
        ("crop_pct=1.5", "above 0 and at most 1"),
        ("interpolation=cubic", "one of nearest, bilinear, bicubic, lanczos; did you mean bicubic?"),
        ("finetune.color_jitter=-1.0", "at least 0"),
        ("finetune.reprob=1.5", "0 to 1"),
        ("finetune.mixup=-1.0", "at least 0"),
        ("finetune.cutmix=-1.0", "at least 0"),
        ("finetune.smoothing=1.0", "at least 0 and below 1"),
        ("finetune.ema_decay=1.0", "at least 0 and below 1"),
        ("finetune.layer_decay=0.0", "above 0 and at most 1"),
    ],
)
def test_a_value_that_no_evaluation_can_use_is_one_line(argument: str, expected: str) -> None:
    from gcssl.augment import INTERPOLATIONS
    from gcssl.eval.finetune import FinetuneConfig
    from gcssl.eval.knn import KnnConfig
    from gcssl.keys import CHOICES

    key, given = argument.split("=")
    for schema in (FinetuneConfig, KnnConfig)[: 1 if "." in key else 2]:
        with pytest.raises(UserError) as refused:
            load_config(schema, [argument])
        assert str(refused.value) == f"{key}: given {given}, expected {expected}"
        load_config(schema, ["crop_pct=1.0", "interpolation=lanczos"])
    assert CHOICES["interpolation"] == tuple(INTERPOLATIONS)


def test_a_crop_has_two_areas() -> None:
    from gcssl.eval.finetune import FinetuneConfig
    from gcssl.eval.linear_probe import LinearProbeConfig

    for schema, key in ((FinetuneConfig, "finetune.scale"), (LinearProbeConfig, "scale")):
        with pytest.raises(UserError, match=f"^{key}: given .0.5., expected a list of 2 numbers"):
            load_config(schema, [f"{key}=[0.5]"])


def test_a_misspelt_recipe_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "joint_nano.yaml").write_text("")
    with pytest.raises(UserError, match=r"no such config file; .*; did you mean joint_nano.yaml\?$"):
        load_config(PretrainConfig, [str(tmp_path / "joint_nan.yaml")])


def test_a_run_folder_in_place_of_a_config_is_told_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {epochs: 3}\n")
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/config.yaml"):
        load_config(PretrainConfig, [str(tmp_path), "out=x"])


def test_an_objective_given_to_an_evaluation_is_told_where_it_belongs() -> None:
    from gcssl.eval.finetune import FinetuneConfig

    with pytest.raises(UserError, match="objective.name: no such key; objectives and their recipes, .* of pretrain.py"):
        load_config(FinetuneConfig, ["objective.name=simmim"])
