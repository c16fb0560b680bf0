"""Frozen features: each image once, in order, from a backbone that stays as it was."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from gcssl.augment import ViewSpec, crop_resize, draw_view, normalize, resize_center_crop
from gcssl.config import DataConfig
from gcssl.data import open_data
from gcssl.errors import Failure, UserError
from gcssl.eval.features import KINDS, Crop, ForwardOptions, extract
from gcssl.models.build import build_backbone
from gcssl.rng import AUGMENT, rng

SIZE = (64, 64)


def nano(**kw: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_backbone("gcvit_nano", 64, **kw)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("batch_size", [7, 256])
def test_each_image_once_and_in_the_order_asked(folder: Path, accelerator: Accelerator, batch_size: int) -> None:
    images, model = open_data(DataConfig(path=str(folder)), SIZE).train, nano()
    model.mean, model.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)  # its own, not those of ImageNet
    indices = np.array([5, 60, 2, 33, 33, 41, 0, 17])
    got = extract(model, images, indices, accelerator, Crop(SIZE, 0.875), ForwardOptions(batch_size), KINDS)
    assert got.index.tolist() == indices.tolist()
    assert got.y.tolist() == images.labels[indices].tolist()
    for row, i in enumerate(indices):
        pixels = torch.from_numpy(resize_center_crop(images.load(i), SIZE, 0.875, "bicubic"))[None] / 255
        with torch.no_grad():
            want = model.eval().pooled(normalize(pixels, model.mean, model.std))
        for kind in KINDS:
            torch.testing.assert_close(got.x[kind][row], want[kind][0], atol=1e-5, rtol=1e-4)


def test_the_backbone_keeps_its_bits_and_its_modes(folder: Path, accelerator: Accelerator) -> None:
    images, model = open_data(DataConfig(path=str(folder)), SIZE).train, nano(drop_path=0.5)
    model.train()
    model.stages[0].eval()
    before, modes = state_of(model), [m.training for m in model.modules()]
    first = extract(model, images, np.arange(20), accelerator)
    second = extract(model, images, np.arange(20), accelerator)
    assert torch.equal(first.x["last"], second.x["last"])  # no drop path inside
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not first.x["last"].requires_grad
    first.x["last"].requires_grad_().sum().backward()  # an ordinary tensor: a head can be trained on it


def test_images_that_cannot_be_decoded_are_left_out_and_counted(
    broken_folder: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    images, model = open_data(DataConfig(path=str(broken_folder)), SIZE).train, nano()
    got = extract(model, images, np.arange(len(images)), accelerator)
    bad = [i for i in range(len(images)) if images.where(i).endswith(("blue/03.png", "red/21.png"))]
    assert got.n_bad == len(bad) == 2
    assert got.index.tolist() == [i for i in range(len(images)) if i not in bad]
    assert len(got.x["last"]) == len(got.y) == len(images) - 2
    told = capsys.readouterr().out
    assert "2 of 66 images cannot be decoded and are left out, the first" in told and "blue/03.png" in told
    extract(model, images, np.arange(len(images))[30:], accelerator)
    assert "red/21.png" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the 2 images"):
        extract(model, images, np.array(bad), accelerator)


def test_random_crops_are_a_function_of_seed_epoch_and_image(folder: Path, accelerator: Accelerator) -> None:
    images, model = open_data(DataConfig(path=str(folder)), SIZE).train, nano()

    def crops(indices: list[int], seed: int, epoch: int, batch: int = 8, workers: int = 0) -> torch.Tensor:
        crop = Crop(SIZE, random=ViewSpec(), seed=seed, epoch=epoch)
        return extract(model, images, np.array(indices), accelerator, crop, ForwardOptions(batch, workers)).x["last"]

    base = crops([0, 1, 2, 3, 4], 0, 3)
    torch.testing.assert_close(crops([4, 2], 0, 3, batch=1), base[[4, 2]], atol=1e-5, rtol=1e-4)
    assert torch.equal(crops([0, 1, 2, 3, 4], 0, 3, workers=2), base)
    for other in (crops([0, 1, 2, 3, 4], 1, 3), crops([0, 1, 2, 3, 4], 0, 4)):
        assert ((other - base).abs().amax(1) > 1e-4).all()


def test_random_crops_are_not_those_of_pretraining() -> None:
    """Heads would learn from crops that the encoder has seen, and be judged on others."""
    image, spec = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8), ViewSpec(size=SIZE)
    for index in range(4):
        seen = crop_resize(image, draw_view(rng(0, AUGMENT, 2, index), spec), spec)
        assert not np.array_equal(Crop(SIZE, random=spec, seed=0, epoch=2)(image, index), seen)


def test_bf16_is_close_to_fp32_and_other_precisions_are_refused(folder: Path, accelerator: Accelerator) -> None:
    images, model = open_data(DataConfig(path=str(folder)), SIZE).train, nano()
    full = extract(model, images, np.arange(6), accelerator).x["last"]
    half = extract(model, images, np.arange(6), accelerator, options=ForwardOptions(precision="bf16")).x["last"]
    assert half.dtype == torch.float32 and not torch.equal(half, full)
    assert ((half - full).norm() / full.norm()) < 0.05
    with pytest.raises(UserError, match="fp32 or bf16"):
        extract(model, images, np.arange(6), accelerator, options=ForwardOptions(precision="fp16"))


def test_outputs_that_are_not_finite_are_refused(folder: Path, accelerator: Accelerator) -> None:
    images, model = open_data(DataConfig(path=str(folder)), SIZE).train, nano()
    with torch.no_grad():
        model.stages[-1].norm.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"\(last\) are not finite for 6 of 6 images") as error:
        extract(model, images, np.arange(6), accelerator)
    assert "\n" not in str(error.value)


class Stuck:
    """A split whose images take three seconds each."""

    labels, classes, name = None, None, "stuck"

    def load(self, _: int) -> None:
        time.sleep(3)

    def where(self, i: int) -> str:
        return f"stuck {i}"


@pytest.mark.parametrize("crop", [Crop(SIZE), Crop(SIZE, random=ViewSpec())])
def test_a_worker_that_hangs_ends_an_evaluation_after_data_timeout(crop: Crop, accelerator: Accelerator) -> None:
    with pytest.raises(Failure, match="timed out after 1 seconds; workers were reading stuck 0 "):
        extract(nano(), Stuck(), np.arange(2), accelerator, crop, ForwardOptions(workers=1, timeout=1))


def test_a_squashed_crop_shows_the_whole_image(folder: Path, accelerator: Accelerator) -> None:
    images = open_data(DataConfig(path=str(folder)), SIZE).train
    whole = extract(nano(), images, np.arange(3), accelerator, Crop(SIZE, squash=True))
    centre = extract(nano(), images, np.arange(3), accelerator, Crop(SIZE))
    assert ((whole.x["last"] - centre.x["last"]).abs().amax(1) > 1e-4).all()


WORKER = """
import json, sys
from gcssl.runtime import quiet_libraries
quiet_libraries()
import numpy as np, torch
from gcssl.config import DataConfig, RuntimeConfig, TrainConfig
from gcssl.data import open_data
from gcssl.eval import knn, linear_probe
from gcssl.eval.features import Crop, KINDS, ForwardOptions, extract, gather_rows
from gcssl.models.build import build_backbone
from gcssl.runtime import make_accelerator

folder, out = sys.argv[1:]
accelerator = make_accelerator(TrainConfig(), RuntimeConfig(timeout=120))
images = open_data(DataConfig(path=folder), (64, 64)).train
torch.manual_seed(0)
model = build_backbone("gcvit_nano", 64)
got = extract(model, images, np.arange(len(images)), accelerator, Crop((64, 64)), ForwardOptions(5), KINDS)
few = extract(model, images, np.array([7]), accelerator, Crop((64, 64)), ForwardOptions(5))
rows = torch.arange(23)[accelerator.process_index :: accelerator.num_processes]
for chunk in (1, 4, 9, 100):  # fewer than processes, two and more slices, one
    assert gather_rows(rows, 23, accelerator, chunk).tolist() == list(range(23))
torch.save([got.x, got.y, got.index, got.n_bad, few.x], f"{out}/features{accelerator.process_index}.pt")
data = DataConfig(path=folder, workers=0)
common = dict(backbone="random", out=out, batch_size=5, data=data)
torch.manual_seed(1)
knn.run(knn.KnnConfig(ks=[1, 5, 20], compare="random", **common), accelerator)
for protocol in ("cached", "augmented"):
    cfg = linear_probe.LinearProbeConfig(
        protocol=protocol, name=protocol, epochs=2, head_batch=16, lrs=[0.01, 0.03], **common)
    linear_probe.run(cfg, accelerator)
accelerator.print("world", accelerator.num_processes)
accelerator.end_training()  # leaves the process group, as the programs do
"""


def run_worker(command: list[str], folder: Path, out: Path) -> str:
    out.mkdir()
    (out / "worker.py").write_text(WORKER)
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(out / "worker.py"), str(folder), str(out)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_give_what_one_gives(broken_folder: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert "world 1" in run_worker([sys.executable], broken_folder, tmp_path / "one")
    assert "world 2" in run_worker(torchrun, broken_folder, tmp_path / "two")
    one, *two = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("one/features0.pt", "two/features0.pt", "two/features1.pt")
    )
    for other in two:  # every process holds everything
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2]) and one[3] == other[3] == 2
        for kind in KINDS:
            torch.testing.assert_close(one[0][kind], other[0][kind], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one[4], other[4], atol=1e-5, rtol=1e-4)
    for name in ("knn.json", "cached/linear_probe.json", "augmented/linear_probe.json"):
        a, b = (json.loads((tmp_path / side / name).read_text()) for side in ("one", "two"))
        for key in ("seconds", "head_seconds", "settings", "chosen", "made_by"):
            a.pop(key, None), b.pop(key, None)
        assert a == b
        assert (a["n_test"], a["n_bad"]) == (26, 1)
