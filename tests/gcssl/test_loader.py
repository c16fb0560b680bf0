"""Batches are functions of the seed and the step; bad images are replaced; dead workers are named."""

import dataclasses
import errno
import gc
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gcssl.augment import BYOL_1, BYOL_2, IMAGENET_MEAN, IMAGENET_STD, View, ViewSpec, draw_view
from gcssl.config import AugmentConfig
from gcssl.data import Images
from gcssl.errors import Failure, Preempted, UserError
from gcssl.eval.features import Crop
from gcssl.loader import (
    BatchPlan,
    Sizes,
    TrainSet,
    ViewMaker,
    batch_to_device,
    collate,
    epoch_order,
    eval_loader,
    train_loader,
)

SIZE = (32, 32)


class Encoded:
    """Small PNG files in memory; those in `broken` are cut short, reading `deadly` ones does `fate`."""

    def __init__(self, n: int, broken: tuple[int, ...] = (), deadly: int = -1, fate: str = "") -> None:
        self.n, self.broken, self.deadly, self.fate = n, broken, deadly, fate

    def __len__(self) -> int:
        return self.n

    def read(self, i: int) -> bytes:
        if i == self.deadly and self.fate == "hang":
            time.sleep(8)
        if i == self.deadly and self.fate == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()[:200] if i in self.broken else file.getvalue()

    def where(self, i: int) -> str:
        return f"folder/{i}.png"


def make_images(n: int, labels: bool = True, **kwargs: Any) -> Images:
    return Images(Encoded(n, **kwargs), np.arange(n) % 3 if labels else None, list("abc") if labels else None, "train")


def draw(rng: np.random.Generator, size: tuple[int, int]) -> tuple[list[tuple[ViewSpec, View]], list[Any]]:
    specs = [dataclasses.replace(spec, size=size) for spec in (BYOL_1, BYOL_2)]
    mask = rng.permutation(16).reshape(4, 4) < 9
    return [(spec, draw_view(rng, spec)) for spec in specs], [mask, None]


def plan(
    n: int = 50, batch_size: int = 8, accumulate: int = 1, world: int = 1, rank: int = 0, total_steps: int = 14,
    start_step: int = 0,
) -> BatchPlan:  # fmt: skip
    """Of a global batch of 8."""
    return BatchPlan(n, Sizes(batch_size, accumulate, world, 8, n // 8, total_steps), rank, 3, start_step)


def batches(images: Images, workers: int, augment: AugmentConfig | None = None, **changes: Any) -> list[dict[str, Any]]:
    dataset = TrainSet(images, ViewMaker(draw, SIZE, augment or AugmentConfig()), seed=3)
    return list(train_loader(dataset, plan(n=len(images), **changes), workers, timeout=60))


def assert_equal_batches(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert len(a) == len(b) > 0
    for one, two in zip(a, b, strict=True):
        assert torch.equal(one["index"], two["index"]) and torch.equal(one["position"], two["position"])
        assert all(torch.equal(x, y) for x, y in zip(one["views"], two["views"], strict=True))
        assert torch.equal(one["masks"][0], two["masks"][0]) and one["bad"] == two["bad"]
        assert all(torch.equal(p[k], q[k]) for p, q in zip(one["params"], two["params"], strict=True) for k in p)


def test_epoch_order_is_a_permutation_that_seed_and_epoch_alone_decide() -> None:
    orders = {(seed, epoch): epoch_order(100, seed, epoch) for seed in range(2) for epoch in range(3)}
    for key, order in orders.items():
        assert sorted(order) == list(range(100)) and np.array_equal(order, epoch_order(100, *key))
    assert len({tuple(order) for order in orders.values()}) == 6


def test_an_epoch_shows_each_image_once_but_for_the_ragged_end() -> None:
    keys = [key for batch in plan() for key in batch]
    assert len(plan()) == 14
    for epoch in range(2):
        seen = [index for e, index, _ in keys if e == epoch]
        assert len(seen) == len(set(seen)) == 48
    assert {e for e, _, _ in keys} == {0, 1, 2} and len(keys) == 14 * 8


def test_global_batches_do_not_depend_on_processes_or_accumulation() -> None:
    reference = list(plan())
    for world, accumulate in ((2, 1), (1, 4), (2, 2), (4, 2)):
        size = 8 // world // accumulate
        ranks = [list(plan(world=world, accumulate=accumulate, batch_size=size, rank=r)) for r in range(world)]
        for step, expected in enumerate(reference):
            micro = [ranks[r][step * accumulate + a] for a in range(accumulate) for r in range(world)]
            assert [key for batch in micro for key in batch] == expected


def test_a_resumed_plan_continues() -> None:
    for start in (0, 1, 6, 7, 13, 14):
        resumed = plan(start_step=start, accumulate=2, batch_size=4)
        assert list(resumed) == list(plan(accumulate=2, batch_size=4))[start * 2 :]
        assert len(resumed) == (14 - start) * 2


@pytest.mark.parametrize("where", ["device", "worker"])
def test_batches_are_the_same_for_any_worker_count_and_after_a_resume(where: str) -> None:
    images = make_images(50, broken=(4, 11))
    none = batches(images, 0, AugmentConfig(where=where))
    assert_equal_batches(none, batches(images, 3, AugmentConfig(where=where)))
    assert_equal_batches(none[7:], batches(images, 2, AugmentConfig(where=where), start_step=7))


def test_a_batch_has_the_contracts_shapes() -> None:
    batch = batches(make_images(20), 0, total_steps=1)[0]
    assert batch["index"].dtype == batch["position"].dtype == batch["label"].dtype == torch.int64
    assert batch["position"].tolist() == list(range(8))
    assert [x.shape for x in batch["views"]] == [(8, 3, 32, 32)] * 2 and batch["views"][0].dtype == torch.uint8
    assert batch["masks"][0].shape == (8, 4, 4) and batch["masks"][0].dtype == torch.bool and batch["masks"][1] is None
    assert batch["params"][0]["factors"].shape == (8, 4) and batch["params"][1]["sigma"].shape == (8,)
    assert batch["label"].tolist() == [i % 3 for i in batch["index"].tolist()] and batch["bad"] == []
    assert batches(make_images(20, labels=False), 0, total_steps=1)[0]["label"].tolist() == [-1] * 8


def test_views_and_masks_differ_between_images_views_and_epochs() -> None:
    dataset = TrainSet(make_images(20), ViewMaker(draw, SIZE), seed=0)
    items = [dataset[(epoch, index, 0)] for epoch in range(2) for index in range(4)]
    crops = {x.tobytes() for item in items for x in item["views"]}
    assert len(crops) == 16 and len({item["masks"][0].tobytes() for item in items}) == 8
    again = TrainSet(make_images(20), ViewMaker(draw, SIZE), seed=0)[(1, 2, 5)]  # another place in the batch
    assert np.array_equal(again["views"][0], items[6]["views"][0])
    other = TrainSet(make_images(20), ViewMaker(draw, SIZE), seed=1)[(1, 2, 5)]
    assert not np.array_equal(other["views"][0], items[6]["views"][0])


@pytest.mark.parametrize("how", ["exact", "fast"])
def test_colour_on_the_worker_and_on_the_device_agree(how: str) -> None:
    images, device, worker = make_images(30), AugmentConfig(colour=how), AugmentConfig("worker", how)
    for one, two in zip(batches(images, 0, device), batches(images, 0, worker), strict=True):
        a = batch_to_device(one, "cpu", IMAGENET_MEAN, IMAGENET_STD, device)["views"]
        b = batch_to_device(two, "cpu", IMAGENET_MEAN, IMAGENET_STD, worker)["views"]
        other = AugmentConfig(colour="fast" if how == "exact" else "exact")
        c = batch_to_device(one, "cpu", IMAGENET_MEAN, IMAGENET_STD, other)["views"]
        for x, y, z in zip(a, b, c, strict=True):
            assert (x - y).abs().max() * max(IMAGENET_STD) <= 2 / 255 and x.std() > 0.3
            assert (x - z).abs().max() > 0.2


def test_batch_to_device_normalises_and_keeps_the_rest() -> None:
    batch = batches(make_images(20), 0, total_steps=1)[0]
    out = batch_to_device(batch, "cpu", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), AugmentConfig(where="worker"))
    torch.testing.assert_close(out["views"][0], batch["views"][0] / 255)
    assert out["bad"] == [] and torch.equal(out["index"], batch["index"]) and out["masks"][1] is None
    assert "params" in batch and "params" not in out  # DDP would move what is left on the host, tensor by tensor


def test_collate_stacks_other_tensors_and_joins_lists() -> None:
    items: list[dict[str, Any]] = [
        {"index": i, "x": torch.full((2,), i), "bad": [(i, "f", "r")] * i, "soft": np.float32(i)} for i in range(3)
    ]
    out = collate(items)
    assert out["x"].shape == (3, 2) and len(out["bad"]) == 3 and out["soft"].tolist() == [0, 1, 2]


@pytest.mark.fault(
    "an image that cannot be decoded",
    "replaced by the same one in every epoch and layout",
)
def test_bad_images_are_replaced_alike_in_every_epoch_and_reported() -> None:
    images = make_images(40, broken=(3, 5, 17))
    dataset = TrainSet(images, ViewMaker(draw, SIZE), seed=0)
    for bad in (3, 5, 17):
        items = [dataset[(epoch, bad, 0)] for epoch in range(3)]
        assert len({item["index"] for item in items}) == 1 and items[0]["index"] not in (3, 5, 17)
        assert items[0]["label"] == items[0]["index"] % 3
        index, where, reason = items[0]["bad"][0]
        assert (index, where) == (bad, f"folder/{bad}.png") and reason and "\n" not in reason
        assert TrainSet(images, ViewMaker(draw, SIZE), seed=9)[(0, bad, 1)]["index"] == items[0]["index"]
    assert dataset[(0, 4, 0)]["bad"] == []


def test_a_replacement_is_drawn_by_the_place_that_it_fills() -> None:
    """So that it is no copy of the view that the epoch shows of it anyway."""
    keys: list[Any] = []
    dataset = TrainSet(make_images(40, broken=(3,)), lambda *given: keys.append(given[2]) or {}, seed=7)
    item = dataset[(2, 3, 0)]
    dataset[(2, item["index"], 1)]
    assert [(seed, epoch, index) for seed, _, epoch, index in keys] == [(7, 2, 3), (7, 2, item["index"])]


def test_a_set_of_broken_images_ends_in_one_line() -> None:
    images = make_images(30, broken=tuple(range(30)))
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"in a row cannot be decoded, the last one folder/\d+.png") as caught:
            batches(images, workers)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fate", ["kill", pytest.param("hang", marks=pytest.mark.slow)])
@pytest.mark.fault(
    "a loader worker killed or hung",
    "one line with the file it read, within data.timeout",
)
def test_a_worker_that_dies_or_hangs_is_named_with_its_file(fate: str) -> None:
    images = make_images(40, deadly=7, fate=fate)
    loader = train_loader(TrainSet(images, ViewMaker(draw, SIZE), seed=3), plan(n=40), workers=1, timeout=3)
    with pytest.raises(Failure, match=r"folder/7.png.*data.workers=1") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("a loader worker killed while the model computes", "one line")
def test_a_worker_that_dies_while_the_model_computes_is_one_line_too() -> None:
    """torch's signal handler raises in whatever the main process is doing."""
    others = set(multiprocessing.active_children())
    with pytest.raises(Failure, match=r"is killed by signal: Killed.*\(data.workers=1, data.timeout=60 s\)$") as caught:
        with eval_loader(make_images(400), np.arange(400), SIZE, Crop(SIZE), 4, 1, 60) as loader:
            for _ in loader:
                (worker,) = set(multiprocessing.active_children()) - others
                os.kill(worker.pid or 0, signal.SIGKILL)
                time.sleep(10)
                pytest.fail("it went on")
    assert "\n" not in str(caught.value)


@pytest.mark.fault("a /dev/shm too small for the workers' batches (docker's)", "one line at once, with the remedy")
def test_workers_without_shared_memory_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, full)
    with pytest.raises(Failure, match=r"^/dev/shm, .* is full \(data.workers=1\); make it larger .* data.workers=0$"):
        list(eval_loader(make_images(8), np.arange(8), SIZE, Crop(SIZE), 2, 1, timeout=60))


def test_an_error_in_make_keeps_its_type_and_traceback() -> None:
    def make(*_: Any) -> dict[str, Any]:
        raise ValueError("a bug")

    others = set(multiprocessing.active_children())
    with pytest.raises(ValueError, match="a bug") as caught:
        list(train_loader(TrainSet(make_images(20), make, 0), plan(n=20), workers=1, timeout=20))
    assert "Traceback" in str(caught.value) and set(multiprocessing.active_children()) <= others  # its workers ended


@pytest.mark.fault(
    "SIGTERM, SIGUSR1 and Ctrl-C to the loader workers",
    "the batch of the running step still comes",
)
def test_workers_ignore_the_signals() -> None:
    def make(*_: Any) -> dict[str, Any]:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(os.getpid(), number)
        return {"alive": 1}

    loader = train_loader(TrainSet(make_images(20), make, 0), plan(n=20, total_steps=2), workers=1, timeout=20)
    assert [batch["alive"].tolist() for batch in loader] == [[1] * 8] * 2


def test_eval_loader_keeps_the_order_and_marks_what_cannot_be_decoded() -> None:
    images = make_images(12, broken=(5,))
    indices = np.array([9, 5, 2, 11, 0])
    for workers in (0, 2):
        out = list(eval_loader(images, indices, (32, 64), Crop((32, 64), 0.875), 2, workers))
        assert torch.cat([b["index"] for b in out]).tolist() == indices.tolist()
        assert torch.cat([b["ok"] for b in out]).tolist() == [True, False, True, True, True]
        assert torch.cat([b["label"] for b in out]).tolist() == [0, 2, 2, 2, 0]
        pixels = torch.cat([b["image"] for b in out])
        assert pixels.shape == (5, 3, 32, 64) and pixels.dtype == torch.uint8 and pixels[1].sum() == 0


def test_a_maker_and_a_set_can_be_pickled() -> None:
    dataset = TrainSet(make_images(8), ViewMaker(draw, SIZE), seed=0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy[(0, 3, 0)]["views"][0], dataset[(0, 3, 0)]["views"][0])


def test_an_abandoned_loader_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    """Workers ignore SIGTERM, which is all that Python sends them at exit before it waits for them; other children of
    the program are none of the loader's business."""
    code = (
        "import multiprocessing, sys, time, pathlib\n"
        "from gcssl.config import DataConfig; from gcssl.data import open_data; from gcssl.loader import eval_loader\n"
        "from gcssl.eval.features import Crop\n"
        "images = open_data(DataConfig(path='shapes', shapes_n=200), (64, 64)).train\n"
        "batches = iter(eval_loader(images, range(200), (64, 64), Crop((64, 64)), 4, 2))\n"
        "next(batches)\n"
        "keep = [batches]; keep.append(keep)\n"
        "sys.modules['kept'] = keep\n"
        "def mine(): time.sleep(1); pathlib.Path(sys.argv[1]).touch()\n"
        "multiprocessing.get_context('fork').Process(target=mine).start()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "mine")], timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "mine").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a signal")
@pytest.mark.fault("kill -9 of a process whose workers hang", "they die with it")
def test_workers_die_with_the_process_that_started_them() -> None:
    """By the kernel: one that hangs, or waits for room in a full queue, does not see that nobody asks any more."""
    code = (
        "import time; from gcssl.config import DataConfig; from gcssl.data import open_data\n"
        "from gcssl.loader import eval_loader; from gcssl.eval.features import Crop\n"
        "images = open_data(DataConfig(path='shapes', shapes_n=200), (64, 64)).train\n"
        "batches = iter(eval_loader(images, range(200), (64, 64), Crop((64, 64)), 4, 2))\n"
        "next(batches)\n"
        "print(*[worker.pid for worker in __import__('multiprocessing').active_children()], flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)  # they see nothing
        parent.kill()
    end = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not left


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_torchs_random_state_alone(workers: int) -> None:
    before = torch.get_rng_state()
    batches(make_images(20), workers, total_steps=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(sys.platform != "linux", reason="counts file descriptors in /proc")
@pytest.mark.fault("a run with hundreds of online probes", "no worker of a loader that ended keeps a file open")
def test_a_loader_that_ended_leaves_no_file_open() -> None:
    def opened() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def read() -> None:
        for _ in eval_loader(make_images(4), np.arange(4), SIZE, Crop(SIZE), 2, 2):
            pass

    read()
    first = opened()
    for _ in range(3):
        read()
    deadline = time.monotonic() + 10
    while opened() > first and time.monotonic() < deadline:  # a queue's thread closes its pipe in its own time
        time.sleep(0.05)
    assert opened() <= first


@pytest.mark.fault("a worker that the system does not start", "one line; those that were started end too")
def test_a_worker_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    popen = multiprocessing.context.ForkProcess._Popen

    def start(process: Any) -> Any:
        if set(multiprocessing.active_children()) - others:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return popen(process)

    others = set(multiprocessing.active_children())
    monkeypatch.setattr(multiprocessing.context.ForkProcess, "_Popen", staticmethod(start))
    told = r"^data.workers=3: a worker cannot be started \(BlockingIOError: .*; lower it"
    with pytest.raises(UserError, match=told) as held:  # held, as a traceback holds the loader and with it the worker
        list(eval_loader(make_images(8), np.arange(8), SIZE, Crop(SIZE), 2, 3))
    deadline = time.monotonic() + 10
    while (left := set(multiprocessing.active_children()) - others) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in left:  # it ignores SIGTERM
        worker.kill()
    assert not left, held


def test_a_signal_is_not_a_bad_image() -> None:
    class Stopping(Encoded):
        def read(self, i: int) -> bytes:
            raise Preempted(f"stopped by SIGTERM at image {i}")

    with pytest.raises(Preempted):
        Images(Stopping(3), None, None, "train", "fingerprint").load(1)
