"""The linear probe: the grid equals single heads, the choice sees no test image, the backbone stays."""

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gcssl.augment import ViewSpec
from gcssl.config import DataConfig, ModelConfig
from gcssl.data import held_out
from gcssl.errors import Failure, UserError
from gcssl.eval import linear_probe
from gcssl.eval.features import extract
from gcssl.eval.finetune import FinetuneOptions
from gcssl.eval.inputs import Inputs, open_inputs
from gcssl.eval.knn import KnnConfig
from gcssl.eval.linear_probe import (
    LinearProbeConfig,
    Plan,
    Setting,
    Standardise,
    choose,
    make_grid,
    probe,
    run,
    train_heads,
)
from gcssl.eval.metrics import best
from gcssl.loader import epoch_order

CPU = torch.device("cpu")
N_CLASSES = 5


def blobs(n: int, seed: int, spread: float = 1.5) -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(N_CLASSES, 12, generator=torch.Generator().manual_seed(7))
    y = torch.arange(n) % N_CLASSES
    x = centre[y] + spread * torch.randn(n, 12, generator=g)
    return {"last": 3 + x * torch.linspace(0.1, 5, 12), "stages34": torch.cat([x, x.square()], 1)}, y


def single_head(
    x: Tensor, y: Tensor, rows: Tensor, lr: float, weight_decay: float, epochs: int, batch: int, seed: int
) -> nn.Linear:
    """One head with autograd and torch's own SGD."""
    mean, std = x[rows].mean(0), x[rows].std(0, correction=0)
    head = nn.Linear(x.shape[1], N_CLASSES)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    groups = [
        {"params": [head.weight], "weight_decay": weight_decay},
        {"params": [head.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    steps = len(rows) // batch
    for epoch in range(epochs):
        order = rows[torch.from_numpy(epoch_order(len(rows), seed, epoch))]
        for step in range(steps):
            t = (epoch * steps + step) / (epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * batch / 256 * (1 + np.cos(np.pi * t)) / 2
            take = order[step * batch : (step + 1) * batch]
            optimizer.zero_grad()
            nn.functional.cross_entropy(head((x[take] - mean) / std), y[take]).backward()
            optimizer.step()
    return head


def test_the_grid_equals_a_loop_over_single_heads() -> None:
    x, y = blobs(203, 1)
    rows = torch.arange(0, 203)[torch.arange(203) % 4 != 0]
    settings = [Setting(k, lr, wd) for k in x for lr in (0.1, 1.0) for wd in (0.0, 0.03)]
    grid, norm = train_heads(x, y, rows, settings, N_CLASSES, Plan(4, 32, 9), CPU)
    for setting in settings:
        value = x[setting.features]
        head = single_head(value, y, rows, setting.lr, setting.weight_decay, 4, 32, 9)
        weight, bias = grid.head(setting)
        torch.testing.assert_close(weight, head.weight.T.detach(), atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(bias, head.bias.detach(), atol=2e-5, rtol=1e-3)
    scores = grid.scores(x, y, norm)
    assert set(scores) == set(settings)


def test_scores_are_of_all_rows_however_many() -> None:
    x, y = blobs(2500, 4)
    settings = [Setting("last", 0.3, 0.0), Setting("last", 0.01, 0.0)]
    grid, norm = train_heads(x, y, torch.arange(200), settings, N_CLASSES, Plan(1, 64, 0), CPU)
    for setting, (top1, negative_loss) in grid.scores(x, y, norm).items():
        weight, bias = grid.head(setting)
        logits = norm({"last": x["last"]})["last"] @ weight + bias
        assert top1 == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())
        assert negative_loss == pytest.approx(-torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


def test_rows_outside_the_training_rows_change_nothing() -> None:
    x, y = blobs(100, 2)
    rows, settings, plan = torch.arange(60), [Setting("last", 0.3, 0.0)], Plan(2, 16, 0)
    a, _ = train_heads(x, y, rows, settings, N_CLASSES, plan, CPU)
    x["last"][60:], y[60:] = 1e6, 0
    b, _ = train_heads(x, y, rows, settings, N_CLASSES, plan, CPU)
    assert torch.equal(a.head(settings[0])[0], b.head(settings[0])[0])


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_the_scale_of_the_features_does_not_matter(factor: float) -> None:
    x, y = blobs(200, 3)
    rows, settings, plan = torch.arange(200), [Setting("last", 0.5, 1e-3)], Plan(5, 64, 0)
    scaled = {kind: value * factor for kind, value in x.items()}
    first, second = (
        grid.scores(value, y, norm)[settings[0]]
        for value in (x, scaled)
        for grid, norm in [train_heads(value, y, rows, settings, N_CLASSES, plan, CPU)]
    )
    assert first[0] == second[0] > 50
    assert first[1] == pytest.approx(second[1], rel=1e-4)


def test_standardised_features_have_no_scale_left_and_constants_stay_finite() -> None:
    x, _ = blobs(500, 4)
    x["last"][:, 0] = 2.5
    out = Standardise(x, torch.arange(500))(x)["last"]
    torch.testing.assert_close(out.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[:, 1:].std(0), torch.ones(11), atol=2e-3, rtol=0)
    assert torch.equal(out[:, 0], torch.zeros(500))
    moved = {"last": x["last"] + torch.eye(12)[0] * 1e-4}  # of the test images: next to nothing
    assert Standardise(x, torch.arange(500))(moved)["last"][:, 0].abs().max() < 0.1
    collapsed = {"last": torch.full((50, 4), 0.3)}
    assert Standardise(collapsed, torch.arange(50))(collapsed)["last"].isfinite().all()


def test_a_diverged_head_is_never_chosen_and_disturbs_no_other() -> None:
    x, y = blobs(200, 5)
    good, wild = Setting("last", 0.3, 0.0), Setting("last", 1e30, 10.0)
    rows, plan = torch.arange(200), Plan(6, 64, 0)
    both, norm = train_heads(x, y, rows, [wild, good], N_CLASSES, plan, CPU)
    alone, _ = train_heads(x, y, rows, [good], N_CLASSES, plan, CPU)
    torch.testing.assert_close(both.head(good)[0], alone.head(good)[0])
    scores = both.scores(x, y, norm)
    assert choose(scores, 200) == good
    with pytest.raises(UserError, match="diverged"):
        choose({wild: scores[wild]}, 200)


def test_within_one_standard_error_of_the_best_top1_the_lowest_loss_is_chosen() -> None:
    lucky, calm, worse = (Setting("last", lr, 0.0) for lr in (0.3, 0.1, 0.03))
    scores = {lucky: (52.0, -2.0), calm: (50.0, -1.0), worse: (45.0, -0.5)}  # top-1, -loss
    for given in (scores, dict(reversed(scores.items()))):
        assert choose(given, 500) == calm  # one standard error is 2.2
        assert choose(given, 5000) == lucky  # 0.7
    assert choose({lucky: (100.0, -1.0), calm: (100.0, -0.5), worse: (99.0, -0.1)}, 10) == calm


def test_permuted_labels_give_chance() -> None:
    (x, y), (tx, ty) = blobs(400, 6, 1.0), blobs(400, 8, 1.0)
    settings, plan = [Setting("last", 0.3, 0.0)], Plan(3, 128, 0)

    def top1(labels: Tensor) -> float:
        grid, norm = train_heads(x, labels, torch.arange(400), settings, N_CLASSES, plan, CPU)
        return grid.scores(tx, ty, norm)[settings[0]][0]

    assert top1(y) > 80
    draws = [y[torch.randperm(400, generator=torch.Generator().manual_seed(i))] for i in range(12)]
    assert 10 < sum(top1(labels) for labels in draws) / 12 < 30  # chance is 20


# ----------------------------------------------------------------------------------------- on images


class Counting:
    """A split's reader that counts what is read."""

    def __init__(self, reader: Any) -> None:
        self.reader, self.count = reader, Counter()

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, i: int) -> Any:
        self.count[i] += 1
        return self.reader.read(i)

    def where(self, i: int) -> str:
        return self.reader.where(i)


def test_features_are_of_the_crops_precision_and_seed_asked_for(
    folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    inputs = open_inputs(config(folder, tmp_path, seed=3, precision="bf16", batch_size=5), accelerator)
    spec, crop = ViewSpec(scale=(0.1, 0.3), interpolation="bicubic"), inputs.crop
    assert (inputs.options.batch_size, inputs.options.precision, inputs.options.workers) == (5, "bf16", 0)

    def wanted(**how: Any) -> Tensor:
        asked = dataclasses.replace(crop, **how)
        return extract(inputs.backbone, inputs.test, np.arange(27), accelerator, asked, inputs.options).x["last"]

    drawn = inputs.features(inputs.test, ("last",), random=spec, epoch=2).x["last"]
    assert torch.equal(drawn, wanted(random=spec, seed=3, epoch=2))
    assert torch.equal(inputs.features(inputs.test, ("last",)).x["last"], wanted())
    for other in ({"random": spec, "seed": 3, "epoch": 1}, {"random": spec, "seed": 0, "epoch": 2}, {}):
        assert not torch.equal(drawn, wanted(**other))


def test_what_is_not_asked_for_is_what_published_figures_use() -> None:
    """MAE's 90 epochs of crops (arXiv:2111.06377, table 10); DINO's k and temperature (arXiv:2104.14294); the
    augmentation of DeiT (arXiv:2012.12877, table 9), which is GC ViT's own too."""
    probe, knn, options = LinearProbeConfig(), KnnConfig(), FinetuneOptions()
    assert (linear_probe.EPOCHS["augmented"], probe.scale) == (90, [0.08, 1.0])
    assert (knn.ks, knn.temperature) == ([10, 20, 100, 200], 0.07)
    assert (options.augment, options.auto_augment, options.reprob) == ("full", "rand-m9-mstd0.5-inc1", 0.25)
    assert (options.mixup, options.cutmix, options.smoothing, options.scale) == (0.8, 1.0, 0.1, [0.08, 1.0])


def test_a_crop_scale_that_no_crop_has_is_told(
    folder: Path, tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    for protocol in ("cached", "augmented"):
        asked = config(folder, tmp_path / protocol, protocol=protocol, scale=[0.5, 1.0], epochs=1)
        run(asked, accelerator)
        assert ("not used with protocol=cached" in capsys.readouterr().out) == (protocol == "cached")


class SameCrops(Inputs):
    """The evaluation crop wherever a random one is asked for; remembers of which epochs."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(**vars(inputs))
        self.epochs: list[int] = []
        self.drawn: set[ViewSpec] = set()

    def features(self, images: Any, kinds: tuple[str, ...], random: Any = None, epoch: int = 0) -> Any:
        if random is not None:
            self.epochs.append(epoch)
            self.drawn.add(random)
        return super().features(images, kinds)


def config(folder: Path, place: Path, **kw: Any) -> LinearProbeConfig:
    data = DataConfig(path=str(folder), workers=0)
    common = {"backbone": "random", "data": data, "out": str(place), "epochs": 3, "lrs": [0.03, 0.1]}
    return LinearProbeConfig(**{**common, **kw})


@pytest.mark.parametrize(("protocol", "train_reads"), [("cached", 1), ("augmented", 3)])
def test_test_images_are_read_once_and_the_backbone_stays(
    folder: Path, tmp_path: Path, accelerator: Accelerator, protocol: str, train_reads: int
) -> None:
    cfg = config(folder, tmp_path, protocol=protocol)
    inputs = open_inputs(cfg, accelerator)
    train, test = Counting(inputs.train.reader), Counting(inputs.test.reader)
    inputs.train.reader, inputs.test.reader = train, test
    before = {name: value.clone() for name, value in inputs.backbone.state_dict().items()}
    result = probe(inputs, cfg)
    assert all(torch.equal(before[name], value) for name, value in inputs.backbone.state_dict().items())
    assert not inputs.backbone.training
    assert test.count == dict.fromkeys(range(27), 1)
    held = result["notes"]["n_held_out"]
    assert held == 3 and result["notes"]["n_train"] == len(train) == 66  # refit on all of train
    assert sum(train.count.values()) == train_reads * 66 + (held if protocol == "augmented" else 0)
    assert len(result["correct"]) == 27


def test_cached_and_augmented_agree_when_the_crop_is_the_whole_image(
    folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    """The two protocols share all but the crops: with equal features they must train the same heads."""
    cfg = config(folder, tmp_path)
    inputs = SameCrops(open_inputs(cfg, accelerator))
    a = probe(inputs, cfg)
    b = probe(inputs, config(folder, tmp_path, protocol="augmented", scale=[0.3, 0.9]))
    assert a["metrics"] == b["metrics"]
    assert a["notes"]["chosen"] == b["notes"]["chosen"]
    assert inputs.epochs == [0, 1, 2]  # new crops in each
    assert inputs.drawn == {ViewSpec(scale=(0.3, 0.9), flip_p=0.5, interpolation=inputs.crop.interpolation)}


@pytest.mark.parametrize("failing", [0, 1])
def test_an_image_that_fails_in_one_epoch_moves_no_held_out_image_into_training(
    folder: Path, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    class Failing(SameCrops):
        def features(self, images: Any, kinds: tuple[str, ...], random: Any = None, epoch: int = 0) -> Any:
            found = super().features(images, kinds, random, epoch)
            if random is not None:
                here = torch.arange(int(epoch == failing), len(found.y))
                x = {kind: value[here] for kind, value in found.x.items()}
                found = dataclasses.replace(found, x=x, y=found.y[here], index=found.index[here])
                indices.append(found.index)
            return found

    def epoch_of(grid: Any, x: Any, y: Tensor, rows: Tensor, *rest: Any) -> None:
        trained.append(set(indices[-1][rows].tolist()))
        assert x["last"].shape[0] == len(y) == len(indices[-1])
        train(grid, x, y, rows, *rest)

    indices: list[Tensor] = []
    trained: list[set[int]] = []
    places: list[Any] = []
    train, place = linear_probe.train_epoch, linear_probe._place
    monkeypatch.setattr(linear_probe, "train_epoch", epoch_of)
    monkeypatch.setattr(linear_probe, "_place", lambda *a: places.append(a) or place(*a))
    cfg = config(folder, tmp_path, protocol="augmented")
    inputs = Failing(open_inputs(cfg, accelerator))
    probe(inputs, cfg)
    rest, _ = held_out(inputs.train)
    for epoch in range(3):
        lost = {0} if epoch == failing else set()
        assert trained[2 * epoch] == set(rest.tolist()) - lost
        assert trained[2 * epoch + 1] == set(range(66)) - lost
    assert len(places) == 1  # a GPU's memory looks fuller after an epoch: heads and features must stay together


@pytest.mark.parametrize("protocol", ["cached", "augmented"])
def test_the_setting_is_chosen_without_the_held_out_slice_and_its_head_trained_on_all_of_train(
    folder: Path, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    """And standardised likewise."""
    judged: list[Tensor] = []
    scored: list[dict[Setting, tuple[float, float]]] = []
    monkeypatch.setattr(linear_probe, "best", lambda logits: judged.append(logits) or best(logits))
    monkeypatch.setattr(linear_probe, "choose", lambda scores, n: scored.append(scores) or choose(scores, n))
    cfg = config(folder, tmp_path, protocol=protocol, features=["last"], lrs=[0.3], weight_decays=[0.0])
    inputs = SameCrops(open_inputs(cfg, accelerator))
    probe(inputs, cfg)
    train, test = (inputs.features(images, ("last",)) for images in (inputs.train, inputs.test))
    setting, plan = Setting("last", 0.3, 0.0), Plan(3, cfg.head_batch, cfg.seed)
    grid, norm = train_heads(train.x, train.y, torch.arange(66), [setting], 3, plan, CPU)
    torch.testing.assert_close(judged, [grid.logits("last", norm(test.x)["last"])[:, 0]])
    rest, held = map(torch.from_numpy, held_out(inputs.train))
    grid, norm = train_heads(train.x, train.y, rest, [setting], 3, plan, CPU)
    (wanted,) = grid.scores({"last": train.x["last"][held]}, train.y[held], norm).values()
    assert scored[0][setting] == pytest.approx(wanted)


def test_a_run_writes_its_result_and_refuses_to_replace_another(
    folder: Path, tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(config(folder, tmp_path, compare="random"), accelerator)
    stored = json.loads((tmp_path / "linear_probe.json").read_text())
    assert {k: v for k, v in stored.items() if k not in ("settings", "made_by")} == json.loads(json.dumps(result))
    for key in ("protocol", "crop", "interpolation", "features", "seeds", "n_test", "classes"):
        assert key in stored
    assert 0 <= stored["linear/top1"] <= stored["linear/top5"] == 100.0  # three classes
    assert stored["compare"]["backbone"] == "random" and 0 <= stored["compare"]["mcnemar"]["p"] <= 1
    told = capsys.readouterr().out
    assert "linear/top1" in told
    assert told.count("linear probe of random: the chosen lr") == 2
    again = run(config(folder, tmp_path, compare="random", batch_size=11), accelerator)
    assert again["linear/top1"] == result["linear/top1"]
    with pytest.raises(UserError, match="epochs: 3 there, 2 asked"):
        run(config(folder, tmp_path, compare="random", epochs=2), accelerator)
    run(config(folder, tmp_path, epochs=2, name="short"), accelerator)
    assert (tmp_path / "short" / "linear_probe.json").is_file()


def test_without_a_test_split_the_held_out_slice_is_the_test(
    folder: Path, tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(folder / "train", tmp_path)
    inputs = open_inputs(cfg, accelerator)
    assert (len(inputs.train), len(inputs.test)) == (63, 3)
    told = capsys.readouterr().out
    assert "held out as the test, 63 remain; a backbone pretrained on this data has seen them" in told
    where = [{images.where(i) for i in range(len(images))} for images in (inputs.train, inputs.test)]
    assert not where[0] & where[1]


def test_images_without_labels_are_refused_in_one_line(folder: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    with pytest.raises(UserError, match="no labels") as error:
        run(config(folder / "train" / "red", tmp_path), accelerator)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backbone": ""}, "backbone: not given"),
        ({"out": ""}, "out: not given, and backbone=random is no run folder"),
        ({"name": "a/b"}, "one word"),
        ({"data": DataConfig(path="")}, "data.path"),
        ({"backbone": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, accelerator: Accelerator, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        run(config(folder, tmp_path, **wrong), accelerator)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_features_that_were_asked_for_are_not_left_out(folder: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    """The default list may: a ResNet has no last four blocks."""
    model = ModelConfig(name="resnet10t", img_size=64)
    with pytest.raises(UserError, match="^features: last, stage1 asked, this backbone has last, stages34$"):
        run(config(folder, tmp_path, model=model, features=["last", "stage1"]), accelerator)
    assert "linear/top1" in run(config(folder, tmp_path, model=model), accelerator)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("protocol=fast", "protocol: given fast, expected one of cached, augmented"),
        ("features=[first]", "expected one of last, last4, stages34"),
        ("precision=fp16", "expected one of fp32, bf16"),
    ],
)
def test_choices_are_checked_with_the_keys(key: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        linear_probe.main([key])


@pytest.mark.parametrize("wrong", [{"backbone": "/nowhere"}, {"compare": "/nowhere"}, {"compare": "radnom"}])
def test_a_path_to_nothing_is_refused_before_the_data_is_opened(
    wrong: dict[str, str], tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gcssl.eval.inputs.open_data", lambda *_, **__: pytest.fail("the data was opened"))
    with pytest.raises(UserError, match="no such run, checkpoint or file"):
        run(config(tmp_path, tmp_path, **wrong), accelerator)


def test_a_damaged_comparison_is_refused_before_the_first_evaluation(
    folder: Path, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    monkeypatch.setattr(Inputs, "features", lambda *_, **__: pytest.fail("an evaluation began"))
    with pytest.raises(UserError, match="bad.pt"):
        run(config(folder, tmp_path, compare=str(tmp_path / "bad.pt")), accelerator)


def test_data_timeout_reaches_the_loader(
    folder: Path, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(folder, tmp_path, data=DataConfig(path=str(folder), workers=1, timeout=1))
    inputs = open_inputs(cfg, accelerator)
    monkeypatch.setattr(inputs.train, "load", lambda _: time.sleep(3))
    with pytest.raises(Failure, match="timed out after 1 seconds"):
        inputs.features(inputs.train, ("last",))


def test_make_grid_starts_at_zero() -> None:
    x, _ = blobs(10, 9)
    grid = make_grid(x, [Setting("stages34", 0.1, 0.0)], N_CLASSES, CPU)
    assert list(grid.weight) == ["stages34"] and not grid.weight["stages34"].any()


def test_the_program_reads_a_yaml_and_keys(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yaml = Path(__file__).parents[2] / "configs" / "eval" / "linear_probe.yaml"
    keys = [
        "backbone=random",
        f"data.path={folder}",
        "data.workers=0",
        f"out={tmp_path}",
        "epochs=1",
        "precision=fp32",
    ]
    linear_probe.main([str(yaml), *keys])
    assert json.loads((tmp_path / "linear_probe.json").read_text())["protocol"] == "augmented"
    with pytest.raises(UserError, match="protocol"):
        linear_probe.main([*keys, "protocl=cached"])
