"""kNN: equal to brute force in float64, the same in both backends, ties and collapse included."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

from gcssl.checkpoint import write_backbone
from gcssl.config import DataConfig, ModelConfig, PretrainConfig, config_dict, load_config, to_yaml
from gcssl.data import open_data
from gcssl.errors import UserError
from gcssl.eval import knn
from gcssl.eval.compare import compare
from gcssl.eval.features import extract
from gcssl.eval.inputs import data_of, describe_test, model_of
from gcssl.eval.knn import KnnConfig, _threads, knn_accuracy, knn_correct, run, search, self_check
from gcssl.models.build import backbone_info, build_backbone
from gcssl.models.load import AskedModel, load_backbone

BACKENDS = ("faiss", "torch")


def clusters(n: int, seed: int, dim: int = 24, n_classes: int = 7, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(n_classes, dim, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n) % n_classes
    return centre[y] + spread * torch.randn(n, dim, generator=g), y


def brute_force(bank: Tensor, y: Tensor, queries: Tensor, truth: Tensor, k: int, t: float) -> float:
    """One query at a time in float64, with Python's own sort."""
    bank, queries = bank.double(), queries.double()
    bank, queries = bank / bank.norm(dim=1, keepdim=True), queries / queries.norm(dim=1, keepdim=True)
    right = 0
    for query, label in zip(queries, truth.tolist(), strict=True):
        sims = (bank @ query).tolist()
        near = sorted(range(len(sims)), key=lambda i: (-sims[i], i))[:k]
        votes: dict[int, float] = {}
        for i in near:
            votes[int(y[i])] = votes.get(int(y[i]), 0.0) + torch.tensor(sims[i] / t).double().exp().item()
        right += max(votes, key=lambda c: (votes[c], -c)) == label
    return 100.0 * right / len(queries)


@pytest.mark.parametrize("n_classes", [7, 40])  # the votes of few and of many classes are added up in two ways
@pytest.mark.parametrize("backend", BACKENDS)
def test_knn_equals_brute_force_in_float64(backend: str, n_classes: int) -> None:
    (x, y), (qx, qy) = clusters(500, 1, n_classes=n_classes), clusters(90, 2, n_classes=n_classes)
    got = knn_accuracy(x, y, qx, qy, ks=(1, 10, 20, 100), temperature=0.07, backend=backend)
    want = {k: brute_force(x, y, qx, qy, k, 0.07) for k in (1, 10, 20, 100)}
    assert got == pytest.approx(want)
    assert 200 / n_classes < want[20] < 95  # neither chance nor trivial, so that a wrong vote shows
    assert len(set(want.values())) > 1


def test_temperature_weights_the_votes() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    y, query, truth = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(bank, y, query, truth, ks=(3,), temperature=0.07)[3] == 100.0
    assert knn_accuracy(bank, y, query, truth, ks=(3,), temperature=10.0)[3] == 0.0


def test_both_backends_find_the_same_neighbours_with_many_ties() -> None:
    g = torch.Generator().manual_seed(3)
    few = normalize(torch.randn(6, 16, generator=g), dim=1)
    bank = few[torch.randint(6, (900,), generator=g)]  # about 150 copies of each vector, far more than k + margin
    queries = torch.cat([few, normalize(torch.randn(10, 16, generator=g), dim=1)])
    results = [search(bank, queries, 20, backend) for backend in BACKENDS]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], results[1][0])
    sims = (queries.double() @ bank.double().T).mul(1e9).round()
    for row, index in zip(sims, results[0][1], strict=True):
        want = sorted(range(900), key=lambda i: (-row[i].item(), i))[:20]
        assert index.tolist() == want


@pytest.mark.parametrize("order", ["random", "nearest last", "nearest first", "equal"])
@pytest.mark.parametrize("n", [512, 600])  # 4 slices; and one more that is no whole number of groups
def test_torch_searches_a_bank_in_slices(n: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "SLICE", 128)
    bank, queries = (normalize(clusters(m, seed)[0], dim=1) for m, seed in ((n, 7), (8, 8)))
    if order == "equal":
        bank = bank[:1].expand(n, -1)
    elif order != "random":
        bank = bank[(bank @ queries[0]).argsort(descending=order == "nearest first")]
    value, index = knn._candidates_torch(bank, queries, 40)
    want = (queries @ bank.T).topk(40).values
    assert torch.allclose(value, want, atol=1e-6)
    assert torch.allclose((queries @ bank.T).gather(1, index), want, atol=1e-6)  # the neighbours it names
    assert all(len(set(row)) == 40 for row in index.tolist())
    assert torch.equal(search(bank, queries, 20, "torch")[1], knn._search_exact(bank, queries, 20)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_collapsed_features_give_the_first_images_of_the_bank(backend: str) -> None:
    bank = normalize(torch.ones(300, 8), dim=1)
    _, index = search(bank, bank[:5], 12, backend)
    assert index.tolist() == [list(range(12))] * 5


def test_nearly_collapsed_features_are_ordered_in_float64() -> None:
    """An untrained network: all cosines lie within 1e-5 of 1, where fp32 cannot order them."""
    g = torch.Generator().manual_seed(4)
    bank = normalize(1 + 2e-3 * torch.randn(3000, 32, generator=g), dim=1)
    queries = normalize(1 + 2e-3 * torch.randn(20, 32, generator=g), dim=1)
    sims = (queries.double() @ bank.double().T).mul(1e9).round()
    want = torch.stack([torch.tensor(sorted(range(3000), key=lambda i: (-r[i].item(), i))[:50]) for r in sims])
    for backend in BACKENDS:
        assert torch.equal(search(bank, queries, 50, backend)[1], want)


def test_votes_are_equal_in_both_backends() -> None:
    (x, y), (qx, qy) = clusters(800, 5, n_classes=40), clusters(300, 6, n_classes=40)
    x, qx = (x * 2).round(), (qx * 2).round()
    both = [knn_correct(x, y, qx, qy, (10, 20, 200), backend=backend) for backend in BACKENDS]
    assert torch.equal(*both)


def test_permuted_labels_give_chance() -> None:
    (x, y), (qx, qy) = clusters(1400, 7), clusters(700, 8)
    assert knn_accuracy(x, y, qx, qy, ks=(20,))[20] > 60
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert abs(knn_accuracy(x, y, qx, qy, ks=(20,))[20] - 100 / 7) < 5


def test_the_length_of_features_does_not_matter() -> None:
    (x, y), (qx, qy) = clusters(200, 9), clusters(80, 10)
    scale = torch.rand(200, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    assert knn_accuracy(x * scale, y, qx * 7, qy, ks=(10,)) == knn_accuracy(x, y, qx, qy, ks=(10,))


def test_k_is_capped_at_the_bank_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    (x, y), (qx, qy) = clusters(30, 11), clusters(50, 12)
    got = knn_accuracy(x, y, qx, qy, ks=(10, 200))
    assert got[200] == knn_accuracy(x, y, qx, qy, ks=(30,))[30]
    assert "30" in capsys.readouterr().out


def test_a_search_takes_the_cores_that_torchrun_leaves_idle_and_gives_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import faiss

    (x, y), (qx, qy) = clusters(100, 13), clusters(20, 14)
    before = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    torch.set_num_threads(1)  # torchrun sets OMP_NUM_THREADS=1
    try:
        with _threads():
            assert torch.get_num_threads() == faiss.omp_get_max_threads() == len(os.sched_getaffinity(0))
        for backend in BACKENDS:
            knn_accuracy(x, y, qx, qy, ks=(5,), backend=backend)
            assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (1, 1)
    finally:
        torch.set_num_threads(before)
        faiss.omp_set_num_threads(before)


@pytest.mark.parametrize(("launcher", "threads"), [("srun", 6), ("torchrun", 3)])
def test_cores_are_shared_where_a_launcher_has_not_done_so(
    launcher: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    torch.set_num_threads(1)
    try:
        with _threads():
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_wrong_arguments_name_the_choices() -> None:
    (x, y), (qx, qy) = clusters(20, 15), clusters(5, 16)
    with pytest.raises(ValueError, match="auto, faiss, torch"):
        knn_accuracy(x, y, qx, qy, ks=(5,), backend="annoy")
    with pytest.raises(ValueError, match="temperature"):
        knn_accuracy(x, y, qx, qy, ks=(5,), temperature=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_bank_on_the_gpu_gives_the_same_neighbours(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    (x, _), (qx, _) = clusters(20_000, 21, dim=256), clusters(500, 22, dim=256)
    bank, queries = normalize(x, dim=1), normalize(qx, dim=1)
    want = search(bank, queries, 200, "torch")
    got = search(bank.cuda(), queries.cuda(), 200, backend)
    assert torch.equal(got[1].cpu(), want[1])


class Lying:
    """An index that moves neighbours or similarities, as a broken GPU kernel would."""

    def __init__(self, index: Any, lie: str) -> None:
        self.index, self.lie = index, lie

    def search(self, queries: Any, k: int) -> Any:
        values, where = self.index.search(queries, k)
        if self.lie == "neighbours":
            where = where[:, ::-1].copy()
        elif self.lie == "missed":  # the best one is left out
            values, where = (part[:, 1:] for part in self.index.search(queries, k + 1))
        elif self.lie == "similarities":
            values = values + 1e-2
        elif self.lie == "nothing found":
            where = where - 10**6
        elif self.lie == "error":
            raise RuntimeError("CUDA error 209\nno kernel image")
        return values, where


@pytest.mark.parametrize("lie", ["", "neighbours", "missed", "similarities", "nothing found"])
def test_an_index_is_checked_against_brute_force(lie: str) -> None:
    import faiss

    bank, queries = (normalize(clusters(n, seed)[0], dim=1) for n, seed in ((200, 31), (10, 32)))
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(bank.numpy())
    assert self_check(Lying(index, lie), bank, queries, 20) == (lie == "")


@pytest.mark.parametrize("slow", ["faiss", "torch"])
def test_a_large_bank_is_searched_by_the_faster_backend(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(way: Any) -> Any:
        def wait(*args: Any) -> Any:
            searched.append(len(args[-3]))
            time.sleep(0.2)
            return way(*args)

        return wait

    monkeypatch.setattr(knn, "TRIAL", 1024)
    bank, queries = (normalize(clusters(n, seed)[0], dim=1) for n, seed in ((2000, 41), (30, 42)))
    want, searched = search(bank, queries, 20, "torch")[1], list[int]()
    owner, name = (knn._Faiss, "__call__") if slow == "faiss" else (knn, "_candidates_torch")
    monkeypatch.setattr(owner, name, late(getattr(owner, name)))
    assert torch.equal(search(bank, queries, 20, "auto")[1], want)
    assert searched == [1024]  # the slice alone
    assert torch.equal(search(bank[:1000], queries, 20, "auto")[1], search(bank[:1000], queries, 20, "torch")[1])


class OnGpu(torch.Tensor):
    """A bank that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(("lie", "reason"), [("missed", "differ from brute force"), ("error", "CUDA error 209")])
def test_a_gpu_index_that_fails_its_check_is_not_used_and_that_is_said(
    lie: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import faiss

    broken = SimpleNamespace(
        IndexFlatIP=faiss.IndexFlatIP, get_num_gpus=lambda: 1, StandardGpuResources=object,
        index_cpu_to_gpu=lambda _resources, _device, index: Lying(index, lie),
    )  # fmt: skip
    monkeypatch.setattr("gcssl.eval.knn._import_faiss", lambda: broken)
    bank, queries = (normalize(clusters(n, seed)[0], dim=1) for n, seed in ((200, 31), (30, 32)))
    got = search(bank.as_subclass(OnGpu), queries, 20, "auto")[1]
    assert torch.equal(got.as_subclass(torch.Tensor), search(bank, queries, 20, "torch")[1])
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and reason in told[0] and "exact torch search instead" in told[0]


# ----------------------------------------------------------------------------------------- of a run


def make_run(path: Path, folder: Path) -> Path:
    """A finished pretraining run as the evaluations see it: config.yaml and the exported encoder."""
    torch.manual_seed(5)
    cfg = PretrainConfig(out=str(path), model=ModelConfig(window_ratio=[16, 16, 16, 32]))
    cfg.data = DataConfig(path=str(folder), workers=0)
    model = build_backbone("gcvit_nano", 64, window_ratio=[16, 16, 16, 32])
    path.mkdir()
    (path / "config.yaml").write_text(to_yaml(config_dict(cfg)))
    write_backbone(path, model.state_dict(), backbone_info(model, step=7, objective="simmim", encoder="student"))
    return path


def test_a_run_is_judged_on_its_own_data_and_keeps_the_result(
    folder: Path, tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "run", folder)
    both = run(KnnConfig(backbone=str(path), ks=[5, 20], name="both"), accelerator)
    assert both["correct"]["metric"] == "knn/top1@20"  # what published figures use is what is compared
    result = run(KnnConfig(backbone=str(path), ks=[5], compare="random"), accelerator)
    assert json.loads((path / "eval" / "knn.json").read_text())["knn/top1@5"] == result["knn/top1@5"]
    assert (result["step"], result["encoder"], result["n_test"]) == (7, "student", 27)
    told = capsys.readouterr().out
    assert "the run's own" in told and "judged on val: 27 images of 3 classes, so each is 3.7 points" in told
    data, model = DataConfig(path=str(folder), workers=0), ModelConfig(window_ratio=[16, 16, 16, 32])
    other = run(KnnConfig("random", out=str(tmp_path), ks=[5], data=data, model=model), accelerator)
    assert other["knn/top1@5"] == result["compare"]["knn/top1@5"]  # random takes the shape of the run
    paired = compare(path / "eval/knn.json", tmp_path / "knn.json")
    assert (paired["a"], paired["b"]) == pytest.approx((result["knn/top1@5"], other["knn/top1@5"]))
    assert paired["p"] == result["compare"]["mcnemar"]["p"]


def test_features_and_temperature_asked_for_are_those_judged(
    folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    path, ks = make_run(tmp_path / "run", folder), [1, 10, 20, 66]
    backbone, splits = load_backbone(str(path))[0], open_data(DataConfig(path=str(folder)), (64, 64))
    assert splits.test is not None
    kinds = ("last", "stage1")
    bank, test = (
        extract(backbone, images, np.arange(len(images)), accelerator, kinds=kinds)
        for images in (splits.train, splits.test)
    )
    told = []
    for name, (kind, t) in {"a": ("last", 0.07), "b": ("stage1", 0.07), "c": ("stage1", 10.0)}.items():
        result = run(KnnConfig(str(path), name=name, ks=ks, features=kind, temperature=t), accelerator)
        told.append({k: result[f"knn/top1@{k}"] for k in ks})
        assert told[-1] == knn_accuracy(bank.x[kind], bank.y, test.x[kind], test.y, ks, t)
    assert told[0] != told[1] != told[2]  # else another key's numbers would pass


def test_a_fresh_backbone_is_compared_on_what_the_first_one_sees(
    folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    """Its crop, mean and std; another saved one has its own, and its own size."""
    first, second = build_backbone("gcvit_nano", 64), build_backbone("gcvit_nano", 96)
    seen = {"crop_pct": 0.6, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.2] * 3}
    write_backbone(tmp_path / "first", first.state_dict(), backbone_info(first, **seen))
    write_backbone(tmp_path / "other", second.state_dict(), backbone_info(second, crop_pct=0.8))
    data, told = DataConfig(path=str(folder), workers=0), []
    for other in ("random", str(tmp_path / "other")):
        out = str(tmp_path / f"with_{Path(other).name}")
        cfg = KnnConfig(str(tmp_path / "first"), other, out=out, ks=[5], data=data)
        one = run(cfg, accelerator)
        told.append([one["compare"][key] for key in ("crop", "interpolation", "mean", "std")])
    assert told[0] == [one[key] for key in ("crop", "interpolation", "mean", "std")]
    assert told[1][:2] == [{"size": [96, 96], "crop_pct": 0.8}, "bicubic"]
    cfg.model, cfg.name = AskedModel(img_size=[32, 32]), "small"
    assert run(cfg, accelerator)["compare"]["crop"]["size"] == [32, 32]  # asked for, of both


def test_features_of_ones_own_are_taken_as_arrays_or_refused() -> None:
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(40, 8)), draw.integers(0, 3, 40)
    wanted = knn_accuracy(torch.tensor(x), torch.tensor(y), torch.tensor(x), torch.tensor(y), ks=[3])
    assert wanted == knn_accuracy(x, y.astype(np.int32), x, y.tolist(), ks=[3])
    nan, minus = x.copy(), y.copy()
    nan[3, 2], minus[4] = np.nan, -1
    for wrong, told in [
        ((x[:30], y, x, y), r"train: .* got \[30, 8\] and \[40\]"),
        ((x, y, x, y[:1]), r"test: .* got \[40, 8\] and \[1\]"),
        ((x, y, x[:, :4], y), "equal size expected, got 8 in train and 4 in test"),
        ((nan, y, x, y), "train: finite features expected, 1 of 40 are not"),
        ((x, y, x, minus), "test: class ids from 0 on"),
        ((x, y.astype(float), x, y), "train: class ids from 0 on"),
    ]:
        with pytest.raises(ValueError, match=told):
            knn_accuracy(*wrong, ks=[3])


def test_a_result_says_which_images_judge_and_what_one_class_would_score() -> None:
    def told(*counts: int) -> str:
        return describe_test(np.repeat(np.arange(len(counts)), counts), "val")

    assert told(300, 50, 50) == "judged on val: 400 images of 3 classes; 75.0 % of them are of one class"
    assert told(50, 50) == "judged on val: 100 images of 2 classes"
    assert told(8, 12) == "judged on val: 20 images of 2 classes, so each is 5.0 points"
    assert told(2) == "judged on val: 2 images, all of one class: what follows says nothing of the others"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": "gcvit_tiny"}, "gcvit_nano"),
        ({"window_ratio": [32, 32, 16, 32]}, "window_ratio"),
        ({"img_size": 80}, "80"),
        ({"bias_resize": "crop"}, "model.bias_resize=crop: the run .* has bicubic; leave it out"),
        ({"drop_path": 0.1}, "model.drop_path=0.1: the run .* has 0.0; leave it out"),
    ],
)
def test_a_run_refuses_another_model(
    folder: Path, tmp_path: Path, accelerator: Accelerator, asked: dict[str, Any], message: str
) -> None:
    path = make_run(tmp_path / "run", folder)
    model = ModelConfig(**{"name": "", "img_size": None, **asked})
    with pytest.raises(UserError, match=message) as error:
        run(KnnConfig(backbone=str(path), model=model), accelerator)
    assert "\n" not in str(error.value) and not (path / "eval").exists()


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ([], (200, 0, 0.5)),
        (["data.shapes_n=10000"], (10_000, 0, 0.5)),
        (["data.workers=4"], (200, 4, 0.5)),
        (["data.max_bad=0.01"], (200, 0, 0.01)),
        (["data.path=own/../own"], (200, 0, 0.5)),
        (["data.path=shapes"], (10_000, 4, 0.01)),  # other data: nothing of the run's
    ],
)
def test_a_data_key_given_at_its_default_wins_over_the_run(asked: list[str], want: tuple) -> None:
    ran = DataConfig(path="own", workers=0, shapes_n=200, max_bad=0.5)
    data = data_of(load_config(KnnConfig, asked), {"data": config_dict(ran)})
    assert (data.shapes_n, data.workers, data.max_bad) == want
    given = asked[0].removeprefix("data.path=") if asked and "path" in asked[0] else "own"
    assert (type(data), data.path, data.timeout) == (DataConfig, given, DataConfig().timeout)


def test_a_run_is_not_asked_for_the_weights_that_it_began_from() -> None:
    ran = {"model": config_dict(ModelConfig(weights="gone.safetensors", drop_path=0.2))}
    assert model_of(load_config(KnnConfig, ["backbone=run"]), ran) == ModelConfig(drop_path=0.0)


def test_null_takes_back_what_a_run_asked_for() -> None:
    ran = {"data": config_dict(DataConfig(path="own", train_split="extra", val_split="train"))}
    assert data_of(load_config(KnnConfig, []), ran).train_split == "extra"
    data = data_of(load_config(KnnConfig, ["data.train_split=null", "data.val_split=null"]), ran)
    assert data == DataConfig(path="own")


def test_a_backbone_of_other_classes_is_told(
    folder: Path, tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "was trained on other classes than those of"
    path = make_run(tmp_path / "run", folder)
    info = json.loads((path / "backbone.json").read_text())
    for classes in (["blue", "green", "red"], ["bus", "car", "van"]):
        (path / "backbone.json").write_text(json.dumps({**info, "class_names": classes}))
        run(KnnConfig(backbone=str(path), ks=[5]), accelerator)
        assert (told in capsys.readouterr().out) == (classes[0] == "bus")


def test_the_settings_of_a_result_name_the_data_of_the_run(
    folder: Path, tmp_path: Path, accelerator: Accelerator
) -> None:
    path = make_run(tmp_path / "run", folder)
    run(KnnConfig(backbone=str(path), ks=[5]), accelerator)
    settings = json.loads((path / "eval/knn.json").read_text())["settings"]
    assert (settings["data.path"], settings["data.shapes_n"]) == (str(folder), 10_000)


def test_a_run_can_be_judged_at_another_legal_size(folder: Path, tmp_path: Path, accelerator: Accelerator) -> None:
    path = make_run(tmp_path / "run", folder)
    result = run(KnnConfig(backbone=str(path), ks=[5], model=ModelConfig(name="", img_size=[64, 96])), accelerator)
    assert result["crop"]["size"] == [64, 96]
