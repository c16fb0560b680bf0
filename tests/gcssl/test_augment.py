"""Augmentations: equal to torchvision's, equal alone and in a batch, and the published parameters."""

import colorsys
import contextlib
import io
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from gcssl.augment import (
    BYOL_1,
    BYOL_2,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAE,
    SIMCLR,
    SIMMIM,
    ViewSpec,
    _colour_together,
    _mixed,
    colour,
    crop_box,
    crop_resize,
    draw_view,
    normalize,
    override,
    resize_center_crop,
)
from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.rng import rng

ROOT = Path(__file__).resolve().parent.parent.parent
TOLERANCE = 2 / 255


def images(n: int, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth and noisy images with flat, grey and saturated parts: uint8 n 3 side side."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, side, side, generator=generator)
    x[: n // 2] = torch.nn.functional.interpolate(x[: n // 2, :, :4, :4], size=(side, side), mode="bilinear")
    x[:, :, :3] = x[:, :1, :3]  # a grey band
    x[:, :, -2:] = x[:, :, -2:].round()  # saturated rows
    return (x * 255).round().to(torch.uint8)


def photo(height: int = 90, width: int = 120, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=(0, 0, width / 6, height / 6))


def params(n: int, **changes: object) -> dict[str, Tensor]:
    """Parameters that leave an image alone, but for `changes`."""
    base: dict[str, Tensor] = {
        "jitter": torch.zeros(n, dtype=torch.bool),
        "factors": torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(n, 1),
        "order": torch.arange(4).repeat(n, 1),
        "gray": torch.zeros(n, dtype=torch.bool),
        "sigma": torch.zeros(n),
        "solarize": torch.zeros(n, dtype=torch.bool),
    }
    return base | {key: torch.as_tensor(value) for key, value in changes.items()}


def drawn(n: int, spec: ViewSpec) -> dict[str, Tensor]:
    """Stacked parameters of n drawn views."""
    each = [draw_view(rng(5, i), spec).params() for i in range(n)]
    return {key: torch.from_numpy(np.stack([np.asarray(p[key]) for p in each])) for key in each[0]}


OPS = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)


def slow_colour(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The same by torchvision's functions, one image at a time: float 3 H W."""
    out = []
    for i, image in enumerate(x.float() / 255):
        if p["jitter"][i]:
            for op in p["order"][i].tolist():
                image = OPS[op](image, float(p["factors"][i, op]))
        if p["gray"][i]:
            image = tvf.rgb_to_grayscale(image, 3)
        if p["sigma"][i] > 0:
            image = tvf.gaussian_blur(image, [13, 13], [float(p["sigma"][i])] * 2)
        if p["solarize"][i]:
            image = tvf.solarize(image, 128 / 255)
        out.append(image)
    return torch.stack(out)


@pytest.mark.parametrize("op", range(4))
@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.5, 1.0])
def test_each_jitter_operation_equals_torchvision(op: int, strength: float) -> None:
    x, factors = images(6), torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(6, 1)
    factors[:, op] = strength * 0.5 if op == 3 else 1 + strength * 0.8
    p = params(6, jitter=torch.ones(6, dtype=torch.bool), factors=factors)
    assert (colour(x, p) - slow_colour(x, p)).abs().max() <= TOLERANCE
    assert (colour(x, p) - x / 255).abs().max() > 0.05  # the operation does something


def test_blur_equals_torchvision_and_thirteen_taps_are_enough() -> None:
    x, sigma = images(6), torch.tensor([0.1, 0.4, 0.8, 1.2, 1.6, 2.0])
    out = colour(x, params(6, sigma=sigma))
    assert (out - slow_colour(x, params(6, sigma=sigma))).abs().max() <= 1e-5
    wide = torch.stack([tvf.gaussian_blur(x[i] / 255, [23, 23], [float(s)] * 2) for i, s in enumerate(sigma)])
    assert (out - wide).abs().max() <= TOLERANCE


def test_gray_and_solarize_equal_torchvision_on_every_value() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    for key in ("gray", "solarize"):
        p = params(2, **{key: torch.tensor([True, False])})
        torch.testing.assert_close(colour(ramp, p), slow_colour(ramp, p), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spec", [SIMCLR, BYOL_1, BYOL_2], ids=["simclr", "byol_1", "byol_2"])
def test_drawn_views_equal_torchvision_in_each_samples_own_order(spec: ViewSpec) -> None:
    x, p = images(48), drawn(48, spec)
    assert len({tuple(order) for order in p["order"].tolist()}) > 10
    assert (colour(x, p) - slow_colour(x, p)).abs().max() <= TOLERANCE


def test_colour_is_the_same_alone_and_in_a_batch_and_leaves_its_input() -> None:
    x, p = images(16), drawn(16, BYOL_2)
    before = x.clone()
    batch = colour(x, p)
    alone = torch.cat([colour(x[i : i + 1], {k: v[i : i + 1] for k, v in p.items()}) for i in range(16)])
    assert torch.equal(batch, alone)
    together = x.float() / 255
    _colour_together(together, p)  # as on a GPU
    assert (together - alone).abs().max() <= 1e-5
    assert torch.equal(x, before)
    assert batch.dtype == torch.float32 and -1e-6 <= batch.min() and batch.max() <= 1 + 1e-6


def test_nothing_drawn_changes_nothing() -> None:
    x = images(4)
    torch.testing.assert_close(colour(x, params(4)), x.float() / 255)
    assert (colour(x, params(4), fast=True) - x / 255).abs().max() <= 1e-5


def mild() -> Tensor:
    """Colours that no operation below drives out of 0..1: there the fast jitter clamps nothing."""
    return (images(6).float() / 255 * 0.2 * 255 + 0.4 * 255).to(torch.uint8)


@pytest.mark.parametrize("op", range(3))
def test_fast_brightness_contrast_and_saturation_equal_torchvision_where_nothing_is_clamped(op: int) -> None:
    for factor in (0.6, 1.3):
        factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(6, 1)
        factors[:, op] = factor
        p = params(6, jitter=torch.ones(6, dtype=torch.bool), factors=factors)
        assert (colour(mild(), p, fast=True) - slow_colour(mild(), p)).abs().max() <= 2e-3
        assert (colour(mild(), p, fast=True) - mild() / 255).abs().max() > 0.02


def test_fast_jitter_is_a_slow_sequence_in_yiq_in_any_order() -> None:
    """Beside the four operations one after the other, in float64, without clamping, on colours by colorsys."""
    x, p = mild(), drawn(6, replace(BYOL_1, jitter_p=1.0, gray_p=0.3, blur_p=0.0))
    p["factors"][:, :3] = p["factors"][:, :3].clamp(0.8, 1.2)
    out = colour(x, p, fast=True)
    for i in range(6):
        b, c, s, hue = p["factors"][i].tolist()
        pixels = [colorsys.rgb_to_yiq(*rgb) for rgb in (x[i].double() / 255).flatten(1).T.tolist()]
        yiq = torch.tensor(pixels, dtype=torch.float64)
        for op in p["order"][i].tolist():
            if op == 0:
                yiq = yiq * b
            elif op == 1:
                mean = yiq[:, 0].mean()
                yiq = yiq * c
                yiq[:, 0] += (1 - c) * mean
            elif op == 2:
                yiq[:, 1:] *= s
            else:
                turned = torch.polar(torch.tensor(1.0).double(), torch.tensor(-2 * math.pi * hue).double())
                chroma = torch.complex(yiq[:, 1], yiq[:, 2]) * turned
                yiq[:, 1], yiq[:, 2] = chroma.real, chroma.imag
        if p["gray"][i]:
            yiq[:, 1:] = 0
        want = torch.tensor([colorsys.yiq_to_rgb(*row) for row in yiq.tolist()]).T.view(3, *x.shape[2:])
        assert (out[i] - want).abs().max() <= 0.01  # colorsys rounds the weights of Y to 0.30, 0.59, 0.11


def test_fast_grey_needs_no_jitter() -> None:
    x, p = images(4), params(4, gray=[True, False, True, False])
    assert (colour(x, p, fast=True) - colour(x, p)).abs().max() <= TOLERANCE


def test_fast_hue_turns_the_same_way_and_as_far_as_torchvisions() -> None:
    x = images(24)
    p = drawn(24, ViewSpec(jitter_p=1.0, jitter=(0.0, 0.0, 0.0, 0.2)))
    exact, other = colour(x, p), {**p, "factors": p["factors"] * torch.tensor([1, 1, 1, -1])}
    near, far = ((colour(x, q, fast=True) - exact).abs().mean() for q in (p, other))
    assert near < 0.5 * far


@pytest.mark.parametrize("spec", [SIMCLR, BYOL_1, BYOL_2], ids=["simclr", "byol_1", "byol_2"])
def test_fast_views_stay_near_torchvisions(spec: ViewSpec) -> None:
    x, p = images(48), drawn(48, spec)
    fast = colour(x, p, fast=True)
    assert -1e-6 <= fast.min() and fast.max() <= 1 + 1e-6
    difference = (fast - slow_colour(x, p)).abs().mean()
    assert difference <= 0.06, difference  # of 1; two draws of one image differ by several times that
    alone = torch.cat([colour(x[i : i + 1], {k: v[i : i + 1] for k, v in p.items()}, True) for i in range(48)])
    assert torch.equal(fast, alone)
    together = x.float() / 255
    _colour_together(together, _mixed(p))  # as on a GPU
    assert (together - fast).abs().max() <= 1e-5


def test_normalize_inverts() -> None:
    x = images(2).float() / 255
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close(normalize(x, IMAGENET_MEAN, IMAGENET_STD) * std + mean, x)


def test_colours_are_normalised_with_and_without_parameters() -> None:
    x, how = images(3), {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    torch.testing.assert_close(colour(x, None, **how), normalize(x.float() / 255, **how))
    torch.testing.assert_close(
        colour(x, params(3, gray=[True] * 3), **how), normalize(colour(x, params(3, gray=[True] * 3)), **how)
    )


def test_published_parameters() -> None:
    assert SIMMIM.scale == (0.67, 1.0) and SIMMIM.jitter_p == SIMMIM.blur_p == SIMMIM.gray_p == 0
    assert MAE.scale == (0.2, 1.0) and MAE.interpolation == "bicubic" and MAE.jitter_p == MAE.blur_p == MAE.gray_p == 0
    assert SIMCLR.jitter == (0.8, 0.8, 0.8, 0.2) and SIMCLR.blur_p == 0.5 and SIMCLR.solarize_p == 0
    assert BYOL_1.jitter == BYOL_2.jitter == (0.4, 0.4, 0.2, 0.1)
    assert (BYOL_1.blur_p, BYOL_1.solarize_p, BYOL_2.blur_p, BYOL_2.solarize_p) == (1.0, 0.0, 0.1, 0.2)
    for spec in (SIMCLR, BYOL_1, BYOL_2):
        assert (spec.scale, spec.jitter_p, spec.gray_p, spec.flip_p) == ((0.08, 1.0), 0.8, 0.2, 0.5)
        assert spec.blur_sigma == (0.1, 2.0)


def test_draws_follow_their_probabilities_and_ranges() -> None:
    views = [draw_view(rng(0, i), BYOL_2) for i in range(2000)]
    for name, p in (("flip", 0.5), ("jitter", 0.8), ("gray", 0.2), ("solarize", 0.2)):
        assert abs(np.mean([getattr(v, name) for v in views]) - p) < 0.04, name
    sigma = np.array([v.sigma for v in views])
    assert abs((sigma > 0).mean() - 0.1) < 0.03
    assert sigma[sigma > 0].min() >= 0.1 and sigma.max() <= 2.0
    factors = np.stack([v.factors for v in views])
    assert np.all(factors[:, :3].min(0) >= [0.6, 0.6, 0.8]) and np.all(factors[:, :3].max(0) <= [1.4, 1.4, 1.2])
    assert -0.1 <= factors[:, 3].min() < -0.08 and 0.08 < factors[:, 3].max() <= 0.1
    assert all(sorted(v.order) == [0, 1, 2, 3] for v in views)


def test_a_strength_above_one_never_gives_a_negative_factor() -> None:
    spec = replace(SIMCLR, jitter=(1.5, 1.5, 1.5, 0.5))
    factors = np.stack([draw_view(rng(0, i), spec).factors for i in range(500)])
    assert factors[:, :3].min() >= 0 and factors[:, :3].max() > 2


def test_equal_keys_draw_equal_views_and_a_probability_does_not_move_the_crop() -> None:
    one, two, other = (draw_view(rng(1, i), SIMCLR) for i in (7, 7, 8))
    for key, value in vars(one).items():
        assert np.array_equal(value, getattr(two, key))
    assert not np.array_equal(one.crop, other.crop)
    plain = replace(SIMCLR, jitter_p=0.0, flip_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)
    first, second = rng(1, 7), rng(1, 7)
    for _ in range(2):  # the views of an image draw from one stream
        assert np.array_equal(draw_view(first, SIMCLR).crop, draw_view(second, plain).crop)


def test_crops_are_distributed_as_torchvisions() -> None:
    spec = replace(SIMCLR, size=(32, 32))
    ours = np.array([crop_box(draw_view(rng(3, i), spec), spec, 60, 100) for i in range(4000)])
    torch.manual_seed(0)
    x = torch.zeros(3, 60, 100)
    theirs = np.array([RandomResizedCrop.get_params(x, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 1.2, (ours.mean(0), theirs.mean(0))
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 1.2
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 60).all() and (left + w <= 100).all()


def test_a_crop_reaches_both_ends_and_the_first_attempt_that_fits_counts() -> None:
    view = draw_view(rng(0), SIMMIM)
    spec = replace(SIMMIM, scale=(0.81, 1.0))
    wide = [1.0, 1.0, 0.5, 0.5]  # 12 x 9 of 10 x 10: does not fit
    for place, expected in ((0.0, 0), (0.49, 0), (0.51, 1), (0.999, 1)):
        crop = np.array([wide, [0.0, 0.5, place, 1 - place - 1e-6]] + [wide] * 8)
        top, left, h, w = crop_box(replace(view, crop=crop), spec, 10, 10)
        assert (top, left, h, w) == (expected, 1 - expected, 9, 9)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (2, 4000), (4000, 2), (3, 3)])
@pytest.mark.parametrize("ratio", [SIMCLR.ratio, (2.5, 4.0)])
def test_crops_of_odd_images_stay_inside(size: tuple[int, int], ratio: tuple[float, float]) -> None:
    width, height = size
    spec = replace(SIMCLR, size=(32, 64), ratio=ratio)
    for i in range(20):
        view = draw_view(rng(0, i), spec)
        top, left, h, w = crop_box(view, spec, height, width)
        assert 0 <= top and 0 <= left and h > 0 and w > 0 and top + h <= height and left + w <= width
        image = np.full((height, width, 3), (9, 80, 200), np.uint8)
        assert crop_resize(image, view, spec).shape == (3, 32, 64)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos", "nearest"])
def test_crop_resize_equals_torchvision(interpolation: str) -> None:
    image, spec = photo(), replace(SIMCLR, size=(32, 48), flip_p=0.0, interpolation=interpolation)
    for i in range(10):
        view = draw_view(rng(0, i), spec)
        box = crop_box(view, spec, image.height, image.width)
        expected = tvf.resized_crop(image, *box, [32, 48], InterpolationMode(interpolation))
        ours = crop_resize(np.array(image), view, spec).astype(int)
        assert np.abs(ours - np.asarray(expected).transpose(2, 0, 1)).max() <= 2


LEVELS = ("default", "avx2", "avx512")
OWN = torch.backends.cpu.get_cpu_capability().lower()


@pytest.mark.skipif(OWN not in LEVELS[1:], reason=f"this processor has {OWN} instructions alone")
def test_crops_are_the_same_with_and_without_vector_instructions() -> None:
    """torch resizes bytes by another body where there is no AVX2: the same pixels, or machines would train apart."""
    program = (
        "import hashlib, numpy as np, torch; from dataclasses import replace\n"
        "from gcssl.augment import *\n"
        "from gcssl.rng import rng; digest = hashlib.sha256()\n"
        "image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)\n"
        "for spec in (SIMMIM, SIMCLR):\n"
        "    for i in range(20):\n"
        "        spec = replace(spec, size=(32 + 32 * (i % 4), 96))\n"
        "        digest.update(crop_resize(image, draw_view(rng(0, i), spec), spec).tobytes())\n"
        "print(torch.backends.cpu.get_cpu_capability().lower(), digest.hexdigest())\n"
    )
    with contextlib.redirect_stdout(io.StringIO()) as own:
        exec(program, {})
    others = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
            env={**os.environ, "ATEN_CPU_CAPABILITY": level},
        ).stdout
        for level in LEVELS[: LEVELS.index(OWN)]
    ]  # fmt: skip
    done = [told.split() for told in (*others, own.getvalue())]
    used, digests = zip(*done, strict=True)
    assert used == LEVELS[: len(used)]
    assert len(set(digests)) == 1, digests


def test_flip_mirrors_the_crop() -> None:
    image, spec = np.array(photo()), replace(SIMMIM, size=(32, 32), flip_p=0.0)
    plain = crop_resize(image, draw_view(rng(4), spec), spec)
    flipped = crop_resize(image, draw_view(rng(4), replace(spec, flip_p=1.0)), spec)
    assert np.array_equal(flipped, plain[:, :, ::-1]) and not np.array_equal(flipped, plain)


@pytest.mark.parametrize("source", [(90, 120), (120, 90), (33, 70), (64, 64)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.9])
def test_center_crop_equals_torchvision(source: tuple[int, int], crop_pct: float) -> None:
    image = photo(*source)
    expected = CenterCrop(32)(Resize(int(32 / crop_pct), InterpolationMode.BICUBIC)(image))
    ours = resize_center_crop(np.array(image), (32, 32), crop_pct, "bicubic")
    assert np.array_equal(ours, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("source", [(90, 120), (120, 90), (1, 1), (300, 4)])
def test_center_crop_covers_non_square_sizes(source: tuple[int, int]) -> None:
    ours = resize_center_crop(np.full((*source[::-1], 3), (10, 200, 90), np.uint8), (32, 96), 0.875, "bilinear")
    assert ours.shape == (3, 32, 96) and (ours == np.array([10, 200, 90]).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("size", [(32, 32), (32, 96)])
@pytest.mark.parametrize("long", [400, 20_000])
def test_the_ends_of_a_strip_are_not_resized(size: tuple[int, int], long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a 1 x 20,000 image would take 5 GB at 224 px."""
    resized: list[int] = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *how: resized.append(max(self.size)) or resize(self, *how))
    strip = np.zeros((8, long, 3), np.uint8)
    strip[:, long // 2 :] = 250
    for image in (strip, strip.transpose(1, 0, 2)):
        out = resize_center_crop(image, size, 1.0, "bilinear")
        assert out.shape == (3, *size) and resized[-1] <= 16 * 3 * 8
        axis = 2 if image is strip else 1
        first, second = np.split(out.astype(int), [size[axis - 1] // 2], axis)
        assert first.mean() < 30 and second.mean() > 220  # the middle is where it was


def test_override_replaces_what_is_set_and_picks_the_views_value() -> None:
    augment = AugmentConfig(scale=[0.2, 1.0], blur_p=[0.5, 0.0], solarize_p=[0.3], gray_p=0.1)
    one, two = override(BYOL_1, augment, 0, 2), override(BYOL_2, augment, 1, 2)
    assert one.scale == two.scale == (0.2, 1.0) and one.gray_p == 0.1
    assert (one.blur_p, two.blur_p, one.solarize_p, two.solarize_p) == (0.5, 0.0, 0.3, 0.3)
    assert override(BYOL_1, AugmentConfig()) == BYOL_1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale", [0.0, 1.0]),
        ("scale", [0.5]),
        ("ratio", [2.0, 1.0]),
        ("flip_p", 1.5),
        ("jitter", [0.4, 0.4, 0.4]),
        ("jitter", [0.4, 0.4, 0.4, 0.6]),
        ("blur_sigma", [0.1, 3.0]),
        ("blur_p", [-0.1]),
        ("blur_p", [0.1, 0.2, 0.3]),
        ("solarize_p", [0.1, 0.2, 0.3]),
        ("interpolation", "cubic"),
    ],
)
def test_bad_overrides_are_one_line_that_names_the_key(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^augment.{key}") as caught:
        override(BYOL_1, AugmentConfig(**{key: value}), 0, 2)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_as_many_numbers_as_the_objective_draws_views_are_asked_for() -> None:
    with pytest.raises(UserError, match="or 2, one a view"):
        override(BYOL_1, AugmentConfig(blur_p=[0.1, 0.2, 0.3]), 0, 2)
    with pytest.raises(UserError, match="expected a list of one number$"):
        override(BYOL_1, AugmentConfig(blur_p=[0.1, 0.2]))
