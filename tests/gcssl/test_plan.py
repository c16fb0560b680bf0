"""What a plan says: FLOPs and memory as counted otherwise, hours by hand, refusals in one line."""

from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from gcssl.config import load_config
from gcssl.dryrun import DryRun
from gcssl.errors import UserError
from gcssl.loader import Sizes, run_sizes
from gcssl.plan import Counted, PlanConfig, count, dry_run, main, rows, saved_mib, si, speed
from gcssl.ssl.objectives import OBJECTIVES, SCHEMAS

YAML = Path(__file__).parents[2] / "configs/pretrain"
SMALL = ["data.shapes_n=256", "data.workers=0", "train.batch_size=16", "plan.images_per_s=100"]


def config(objective: str, *more: str) -> PlanConfig:
    return load_config(PlanConfig, [str(YAML / f"{objective}_gcvit_nano.yaml"), *SMALL, *more], SCHEMAS)


def dry(objective: str, *more: str) -> DryRun:
    return dry_run(config(objective, *more))


@cache
def counted(objective: str, *more: str) -> Counted:
    """Four passes over shapes: seconds."""
    return count(dry(objective, *more))


def test_flops_are_three_times_those_of_encoder_and_head() -> None:
    one = dry("simmim")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        one.backbone(torch.randn(1, 3, 64, 64))
    head = 2 * 4 * 256 * 32 * 32 * 3  # four tokens of 256 numbers to the pixels of their cells
    assert counted("simmim").flops == pytest.approx(3 * (counter.get_total_flops() + head), rel=0.03)


ALL = [pytest.param(name, marks=() if name == "simmim" else pytest.mark.slow) for name in OBJECTIVES]


@pytest.mark.parametrize("objective", ALL)
def test_the_memory_of_a_batch_is_foreseen(objective: str) -> None:
    """Counted on the shapes of two and four images, and seen with six that are computed."""
    one = dry(objective)
    found, objective_ = counted(objective), one.objective.train()
    batch = one.batch(6)
    kept = saved_mib(lambda: objective_(batch, 0)["loss"].backward(), objective_.parameters())
    static = sum(p.numel() * (4 if p.requires_grad else 1) for p in objective_.parameters()) * 4 / 2**20
    assert found.image_mib * 6 + found.fixed_mib == pytest.approx(kept + static, rel=0.05)


def test_parameters_do_not_count_as_kept() -> None:
    layer, x = torch.nn.Linear(64, 64, bias=False), torch.randn(1, 64, requires_grad=True)
    assert (
        saved_mib(lambda: layer(x), layer.parameters()) == 64 * 4 / 2**20
    )  # the weight, which it needs too, has 16 KiB


def test_fewer_images_than_are_counted_with(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    few = counted("simmim", f"data.path={tmp_path}", "train.batch_size=2", "eval.online_every=0")
    many = counted("simmim")
    assert few.flops == many.flops and few.image_mib == pytest.approx(many.image_mib, rel=1e-3)


def test_the_memory_of_the_whole_batch_and_the_hours_are_told() -> None:
    one = {name: value for name, value, _ in rows(config("simmim", "train.batch_size=128", "train.epochs=3600"))}
    mib = counted("simmim").fixed_mib + 128 * counted("simmim").image_mib
    assert float(one["memory"].split()[0]) == pytest.approx(mib / 1024, abs=0.01)
    assert "efficiency" not in one and one["time"] == f"{256 * 3600 / 100 / 3600:.3g} hours"


def test_half_precision_keeps_less() -> None:
    full, half = counted("simmim").image_mib, counted("simmim", "train.precision=bf16").image_mib
    assert 0.4 * full < half < 0.8 * full


def test_hours_and_price_of_many() -> None:
    keys = ["train.batch_size=16", "train.global_batch=64", "train.epochs=3600", "plan.price=2"]
    found = {name: value for name, value, _ in rows(config("simmim", *keys, "plan.processes=4", "plan.efficiency=0.8"))}
    hours = 256 * 3600 / (100 * 4 * 0.8) / 3600
    assert found["time"] == f"{60 * hours:.2g} minutes" and found["price"] == f"{hours * 4 * 2:.2f}"


@pytest.mark.parametrize(("steps", "told"), [(4, "4 steps, too few to tell: raise plan.minutes"), (5, "5 steps")])
def test_few_steps_say_little_of_the_speed(monkeypatch: pytest.MonkeyPatch, steps: int, told: str) -> None:
    monkeypatch.setattr("gcssl.plan.first_steps", lambda *_: [{"images_per_s": 10.0}] * steps)
    cfg = config("simmim", "plan.images_per_s=null")
    assert speed(cfg, run_sizes(cfg.train, 256, 1), 1e8) == (pytest.approx(10.0), f"measured here: {told}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU times whole batches, in bf16")
def test_a_cpu_times_few_images_and_no_slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch for a GPU of 80 GB would take hours here, or all memory."""
    asked: list[tuple[int, int, str]] = []

    def steps(cfg: PlanConfig, _: float, sizes: Sizes) -> list[dict[str, float]]:
        asked.append((sizes.batch_size, sizes.accumulate, cfg.train.precision))
        return [{"images_per_s": 10.0}] * 5

    monkeypatch.setattr("gcssl.plan.first_steps", steps)
    monkeypatch.setattr("gcssl.plan.bf16_is_fast", lambda: False)
    cfg = config("simmim", "plan.images_per_s=null", "train.precision=bf16", "train.accumulate=2")
    sizes = run_sizes(cfg.train, 256, 1)
    slow = "in fp32, as bf16 is slower on this processor"
    assert speed(cfg, sizes, 1e11)[1] == f"measured here: 5 steps of 3 images {slow}"
    assert speed(cfg, sizes, 1e12)[1] == f"measured here: 5 steps of 2 images {slow}"
    monkeypatch.setattr("gcssl.plan.bf16_is_fast", lambda: True)
    assert speed(cfg, sizes, 1e8)[1] == "measured here: 5 steps"
    assert asked == [(3, 1, "fp32"), (2, 1, "fp32"), (16, 1, "bf16")]


def test_the_speed_is_measured_where_none_is_given(capfd: pytest.CaptureFixture[str]) -> None:
    main([str(YAML / "simmim_gcvit_nano.yaml"), *SMALL, "plan.images_per_s=null", "plan.minutes=0.01"])
    first, *table = capfd.readouterr().out.splitlines()
    assert first == "counting a step of 2 and of 4 images, then training for up to 0.01 minutes"
    lines = dict(line.split(maxsplit=1) for line in table)
    assert lines.keys() == {"images", "steps", "batch", "parameters", "FLOPs", "memory", "speed", "time"}
    assert "measured here: " in lines["speed"] and float(lines["speed"].split()[0]) > 1


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["plan.processes=0"], "plan.processes: given 0, expected at least 1"),
        (["plan.images_per_s=0"], "plan.images_per_s: given 0.0, expected above 0"),
        (["plan.price=-1"], "plan.price: given -1.0, expected at least 0"),
        (
            ["plan.processes=3", "train.global_batch=64"],
            "train.global_batch: given 64, expected a multiple of 3 processes",
        ),
        (["train.global_batch=64"], "simclr compares the images of a micro-batch"),
    ],
)
def test_what_cannot_be_is_refused(keys: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        rows(config("simclr", *keys))


@pytest.mark.parametrize(
    ("number", "text"),
    [(3.2e13, "32 T"), (0.5, "0.5 "), (1e21, "1e+03 E"), (12_345, "12.3 k"), (999_600, "1 M"), (999.4, "999 ")],
)
def test_large_numbers(number: float, text: str) -> None:
    assert si(number) == text.rstrip() + ("" if text[-1] != " " else "  ")
