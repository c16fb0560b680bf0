"""Augmentations in two halves: `draw_view` draws a view's parameters, the others apply them.

Crop, resize and flip run on the worker and give uint8 pixels. Colour jitter, grey, blur and solarise run in
one pure function, `colour`, with one parameter set per sample, on the worker or in batches on the device
(`augment.where`). `augment.colour=fast` makes jitter and grey one matrix.
Parameters: SimMIM (arXiv:2111.09886), SimCLR (arXiv:2002.05709), MoCo v3 (arXiv:2104.02057, which takes
BYOL's).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gcssl.config import AugmentConfig
from gcssl.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
BLUR_RADIUS = 6  # 13 taps: three sigmas of the largest published sigma, 2
MAX_SIGMA = BLUR_RADIUS / 3
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])  # NTSC, 1953
LEAST = torch.tensor([3.0, 5.0, 1.0]).view(3, 1, 1)  # the hue that has least of red, of green, of blue, in sixths
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class ViewSpec:
    """How one view is drawn; `size` is (H, W) in pixels, every `_p` a probability."""

    size: tuple[int, int] = (224, 224)
    scale: tuple[float, float] = (0.08, 1.0)  # crop area / image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # crop width / height
    flip_p: float = 0.5
    jitter_p: float = 0.0
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_p: float = 0.0
    interpolation: str = "bilinear"


SIMMIM = ViewSpec(scale=(0.67, 1.0))
MAE = ViewSpec(scale=(0.2, 1.0), interpolation="bicubic")
SIMCLR = ViewSpec(jitter_p=0.8, jitter=(0.8, 0.8, 0.8, 0.2), gray_p=0.2, blur_p=0.5, interpolation="bicubic")
BYOL_1 = ViewSpec(jitter_p=0.8, jitter=(0.4, 0.4, 0.2, 0.1), gray_p=0.2, blur_p=1.0)
BYOL_2 = replace(BYOL_1, blur_p=0.1, solarize_p=0.2)


@dataclass(frozen=True)
class View:
    """One drawn view: numpy fields of fixed shape, so that a batch of them stacks."""

    crop: np.ndarray  # 10 4 float64 in [0, 1): area, ratio, and where the box lies (down, right)
    flip: np.bool_
    jitter: np.bool_
    factors: np.ndarray  # 4 float32: brightness, contrast, saturation factors and hue shift in turns
    order: np.ndarray  # 4 int64: which of the four comes first, second, ...
    gray: np.bool_
    sigma: np.float32  # pixels, 0 = no blur
    solarize: np.bool_

    def params(self) -> dict[str, np.ndarray]:
        """What `colour` needs, as arrays of fixed shape."""
        names = ("jitter", "factors", "order", "gray", "sigma", "solarize")
        return {name: np.asarray(getattr(self, name)) for name in names}


def override(spec: ViewSpec, augment: AugmentConfig, view: int = 0, views: int = 1) -> ViewSpec:
    """`spec` of view `view` of `views` with what `augment` sets; blur_p and solarize_p may hold one value a view."""
    changes: dict[str, object] = {}
    for key, length in (("scale", 2), ("ratio", 2), ("blur_sigma", 2), ("jitter", 4)):
        value = getattr(augment, key)
        if value is not None:
            if len(value) != length:
                raise UserError(f"augment.{key}={list(value)}: expected {length} numbers")
            changes[key] = tuple(float(v) for v in value)
    for key in ("blur_p", "solarize_p"):
        value = getattr(augment, key)
        if value is not None:
            if len(value) not in (1, views):
                each = f", or {views}, one a view" if views > 1 else ""
                raise UserError(f"augment.{key}={list(value)}: expected a list of one number{each}")
            changes[key] = float(value[view if len(value) > 1 else 0])
    for key in ("flip_p", "jitter_p", "gray_p", "interpolation"):
        if getattr(augment, key) is not None:
            changes[key] = getattr(augment, key)
    return _checked(replace(spec, **changes))  # type: ignore[arg-type]


def _checked(spec: ViewSpec) -> ViewSpec:
    for key in ("flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p"):
        if not 0 <= getattr(spec, key) <= 1:
            raise UserError(f"augment.{key}={getattr(spec, key)}: expected a probability in [0, 1]")
    if not 0 < spec.scale[0] <= spec.scale[1] <= 1:
        raise UserError(f"augment.scale={list(spec.scale)}: expected 0 < smallest <= largest <= 1")
    if not 0 < spec.ratio[0] <= spec.ratio[1]:
        raise UserError(f"augment.ratio={list(spec.ratio)}: expected 0 < smallest <= largest")
    if not 0 < spec.blur_sigma[0] <= spec.blur_sigma[1] <= MAX_SIGMA:
        given = list(spec.blur_sigma)
        raise UserError(f"augment.blur_sigma={given}: expected 0 < smallest <= largest <= {MAX_SIGMA:g}")
    if min(spec.jitter) < 0 or spec.jitter[HUE] > 0.5:
        raise UserError(f"augment.jitter={list(spec.jitter)}: expected four strengths >= 0, hue at most 0.5")
    if spec.interpolation not in INTERPOLATIONS:
        choices = ", ".join(INTERPOLATIONS)
        raise UserError(f"augment.interpolation={spec.interpolation}: expected one of {choices}")
    return spec


def draw_view(rng: np.random.Generator, spec: ViewSpec) -> View:
    """Draw one view. The count of numbers drawn is fixed, so that a probability does not move the crops."""
    crop, rest = np.split(rng.random(4 * CROP_ATTEMPTS + 14), [4 * CROP_ATTEMPTS])
    flip, jitter, gray, blur, solarize, sigma, *shifts = rest[:10].tolist()
    factors = []
    for u, strength in zip(shifts, spec.jitter, strict=True):
        lowest = max(1 - strength, 0)  # a factor is uniform in [max(0, 1 - s), 1 + s]
        factors.append(lowest + u * (1 + strength - lowest))
    factors[HUE] = (2 * shifts[HUE] - 1) * spec.jitter[HUE]
    width = spec.blur_sigma[1] - spec.blur_sigma[0]
    return View(
        crop=crop.reshape(CROP_ATTEMPTS, 4),
        flip=np.bool_(flip < spec.flip_p),
        jitter=np.bool_(jitter < spec.jitter_p),
        factors=np.array(factors, np.float32),
        order=np.argsort(rest[10:]),
        gray=np.bool_(gray < spec.gray_p),
        sigma=np.float32((spec.blur_sigma[0] + sigma * width) * (blur < spec.blur_p)),
        solarize=np.bool_(solarize < spec.solarize_p),
    )


def crop_box(view: View, spec: ViewSpec, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, h, w) in pixels of an image of that size: the first attempt that fits, else the centre.

    The rule of torchvision's RandomResizedCrop, with the random numbers taken from `view`.
    """
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    for area, slope, down, right in view.crop.tolist():
        target = (spec.scale[0] + area * (spec.scale[1] - spec.scale[0])) * height * width
        ratio = math.exp(low + slope * (high - low))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    low, high = spec.ratio
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_resize(image: np.ndarray, view: View, spec: ViewSpec) -> np.ndarray:
    """The view's box of uint8 H W 3 at spec.size, flipped if drawn: uint8 3 H W.

    torch's antialiased resizing of bytes: in whole numbers, so the same on every machine, within two levels of Pillow's
    (torchvision's RandomResizedCrop) and two to three times as fast where there is AVX2.
    """
    top, left, h, w = crop_box(view, spec, *image.shape[:2])
    box = np.ascontiguousarray(image[top : top + h, left : left + w])  # torch is slower on a part of an image
    if spec.interpolation in ("bilinear", "bicubic"):
        pixels = torch.from_numpy(box).view(1, h, w, 3).permute(0, 3, 1, 2)
        out = F.interpolate(pixels, spec.size, mode=spec.interpolation, antialias=True)[0].numpy()  # 3 H W
    else:  # Pillow's alone
        crop = Image.fromarray(box).resize(spec.size[::-1], INTERPOLATIONS[spec.interpolation])
        out = np.asarray(crop).transpose(2, 0, 1)
    return np.ascontiguousarray(out[:, :, ::-1] if view.flip else out)


def resize_center_crop(image: np.ndarray, size: tuple[int, int], crop_pct: float, interpolation: str) -> np.ndarray:
    """The evaluation crop of uint8 H W 3: shorter side to size / crop_pct, then the centre: uint8 3 H W.

    Equals torchvision's Resize + CenterCrop for square sizes; a non-square size is covered likewise.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation {interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}")
    most = 16 * max(size) // min(size)  # a strip's ends are never seen, and resizing all of it would take gigabytes
    h, w = min(image.shape[0], most * image.shape[1]), min(image.shape[1], most * image.shape[0])
    top, left = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
    image = image[top : top + h, left : left + w]
    height, width = (math.floor(side / crop_pct) for side in size)
    if width * image.shape[0] >= height * image.shape[1]:  # the width decides
        height = max(height, int(width * image.shape[0] / image.shape[1]))
    else:
        width = max(width, int(height * image.shape[1] / image.shape[0]))
    out = Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation])
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    out = out.crop((left, top, left + size[1], top + size[0]))
    return np.ascontiguousarray(np.asarray(out).transpose(2, 0, 1))


def colour(
    x: Tensor,
    params: dict[str, Tensor] | None,
    fast: bool = False,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Jitter, grey, blur, solarise, in this order, and normalise: uint8 B 3 H W -> float32 B 3 H W.

    `params` holds `View.params()` stacked: jitter B, factors B 4, order B 4, gray B, sigma B, solarize B; None: only
    normalise. They are read on the host: leave them there while x is on a device, so that nothing waits for the device.
    fast: jitter and grey are one matrix an image (`_mixed`), near torchvision's and not equal to them.
    """
    if params is not None:
        params = {name: value.cpu() for name, value in params.items()}
        params = _mixed(params) if fast else params
    shift, scale = _shift_and_scale(x, mean, std)
    if x.device.type != "cpu":
        x = x.float().mul_(1 / 255)
        if params is not None:
            _colour_together(x, params)
        return x.sub_(shift).mul_(scale)
    out = torch.empty(x.shape)
    numbers = {name: value.tolist() for name, value in (params or {}).items()}
    for i, image in enumerate(out.split(1)):  # one after the other: a CPU's cache holds one
        image.copy_(x[i]).mul_(1 / 255)
        if params is not None:
            _colour_alone(image, {name: value[i] for name, value in numbers.items()})
        image.sub_(shift).mul_(scale)
    return out


def _mixed(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters whose jitter and grey are a matrix B 3 3 in YIQ and a `lift` B of the mean of Y: hue turns the chroma
    IQ, saturation scales it, grey removes it, contrast scales all about the mean of Y, brightness scales all. Values
    are clamped once, at the end: until then the four commute, so the drawn order does not matter.
    """
    still = torch.tensor([1.0, 1.0, 1.0, 0.0])
    brightness, contrast, saturation, shift = torch.where(params["jitter"][:, None], params["factors"], still).T
    turn, kept = -2 * math.pi * shift, saturation * ~params["gray"]
    sin, cos = kept * turn.sin(), kept * turn.cos()
    chroma = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    matrix = YIQ.inverse()[:, :1] @ YIQ[:1] + YIQ.inverse()[:, 1:] @ chroma @ YIQ[1:]  # B 3 3
    mixed = {"mix": params["jitter"] | params["gray"], "lift": brightness * (1 - contrast)}
    mixed["matrix"] = (brightness * contrast).view(-1, 1, 1) * matrix
    return {**params, **mixed, **{name: torch.zeros_like(params[name]) for name in ("jitter", "gray")}}


def _mix(x: Tensor, matrix: Tensor, lift: float | Tensor) -> None:
    """B 3 H W in place by matrix B 3 3 and lift, a number or B 1 1."""
    offset = _gray(x).mean((2, 3)).view(-1, 1, 1) * lift
    x.copy_(torch.baddbmm(offset, matrix, x.flatten(2)).clamp_(0, 1).view_as(x))


def _colour_alone(x: Tensor, params: dict[str, Any]) -> None:
    """One image 1 3 H W in place; its parameters are numbers."""
    if params.get("mix"):
        _mix(x, torch.tensor(params["matrix"])[None], params["lift"])
    if params["jitter"]:
        for op in params["order"]:
            _JITTER[op](x, params["factors"][op])
    if params["gray"]:
        x.copy_(_gray(x))
    if params["sigma"] > 0:
        _blur_alone(x, params["sigma"])
    if params["solarize"]:
        torch.minimum(x, 1 - x, out=x)


def _colour_together(x: Tensor, params: dict[str, Tensor]) -> None:
    """The same for B 3 H W: samples that share an operation run together, so that a GPU has few kernels to start."""
    if "mix" in params:
        _mix(x, _on(params["matrix"], x), _on(params["lift"].view(-1, 1, 1), x))
    for place in range(4):
        for op in range(4):
            rows = (params["jitter"] & (params["order"][:, place] == op)).nonzero().squeeze(1)
            if len(rows):
                on = _on(rows, x)
                part = x[on]
                _JITTER[op](part, _on(params["factors"][rows, op], x).view(-1, 1, 1, 1))
                x[on] = part
    if len(rows := params["gray"].nonzero().squeeze(1)):
        x[_on(rows, x)] = _gray(x[_on(rows, x)]).expand(-1, 3, -1, -1)
    if len(rows := params["sigma"].nonzero().squeeze(1)):
        x[_on(rows, x)] = _blur(x[_on(rows, x)], params["sigma"][rows])
    if len(rows := params["solarize"].nonzero().squeeze(1)):
        part = x[_on(rows, x)]
        x[_on(rows, x)] = torch.minimum(part, 1 - part)  # on bytes Pillow's rule: 255 - p from 128 on


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std per channel; x float B 3 H W in 0..1."""
    shift, scale = _shift_and_scale(x, mean, std)
    return (x - shift).mul_(scale)


def _shift_and_scale(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """What to subtract and what to multiply by then, 3 1 1 each: dividing is slower."""
    shift, scale = torch.tensor(mean), torch.tensor([1 / s for s in std])
    return _on(shift.view(-1, 1, 1), x), _on(scale.view(-1, 1, 1), x)


def _on(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.device, non_blocking=True)


def _gray(x: Tensor) -> Tensor:
    """B 3 H W -> B 1 H W, ITU-R 601 weights."""
    r, g, b = x.unbind(1)
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114).unsqueeze(1)


# The four work in place on B 3 H W in 0..1; the factor is a number or one a sample, B 1 1 1.


def _brightness(x: Tensor, factor: float | Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: float | Tensor) -> None:
    x.lerp_(_gray(x).mean((1, 2, 3), keepdim=True), 1 - factor).clamp_(0, 1)


def _saturation(x: Tensor, factor: float | Tensor) -> None:
    x.lerp_(_gray(x), 1 - factor).clamp_(0, 1)


def _hue(x: Tensor, shift: float | Tensor) -> None:
    """Turn the hue by `shift` turns; value and saturation stay (HSV of Smith, 1978).

    With hues in sixths of a turn from red, a channel is value - chroma * clamp(2 - d, 0, 1), d its distance on the
    circle from the hue that has least of it: cyan (3) for red, magenta (5) for green, yellow (1) for blue. That is
    value + chroma - | |turn| - 3 chroma | between the least channel and the value, turn the way from there, of up to
    six sixths, times chroma. All is kept times chroma: nothing is divided.
    """
    r, g, b = x.split(1, 1)  # B 1 H W
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    # -3..3 from red: to yellow (1) green - blue grows, to green (2) red falls, to cyan (3) green - blue falls
    side, fall = g - b, value - r
    away = side.abs()
    hue = torch.minimum(fall, chroma - away).mul_(2).add_(fall).add_(away).copysign_(side)
    way = (6 * shift - _on(LEAST, x) + 3) % 6 - 3  # B 3 1 1 in -3..3
    torch.mul(chroma, way, out=x)
    x.add_(hue).abs_().sub_(chroma, alpha=3).abs_()
    torch.sub(value + chroma, x, out=x)
    torch.clamp(x, low, value, out=x)


def _gaussian(sigma: float) -> list[float]:
    """13 weights of sigma in pixels, at most 2."""
    weights = [math.exp(-0.5 * (tap / sigma) ** 2) for tap in range(-BLUR_RADIUS, BLUR_RADIUS + 1)]
    return [weight / sum(weights) for weight in weights]


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur by 13 taps per axis with reflected borders; sigma B on the host."""
    b, c, h, w = x.shape
    kernel = _on(torch.tensor([_gaussian(s) for s in sigma.tolist()]), x).repeat_interleave(c, 0)  # BC 13
    x = F.pad(x, [BLUR_RADIUS] * 4, mode="reflect").view(1, b * c, h + 2 * BLUR_RADIUS, w + 2 * BLUR_RADIUS)
    x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)
    x = F.conv2d(x, kernel[:, None, :, None], groups=b * c)
    return x.view(b, c, h, w)


def _blur_alone(x: Tensor, sigma: float) -> None:
    """The same for one image, in place, as a sum of shifted images: convolutions with one filter a channel are slow."""
    weights = _gaussian(sigma)[BLUR_RADIUS:]
    for dim, border in ((2, [0, 0, BLUR_RADIUS, BLUR_RADIUS]), (3, [BLUR_RADIUS, BLUR_RADIUS, 0, 0])):
        padded, n = F.pad(x, border, mode="reflect"), x.shape[dim]
        x.mul_(weights[0])
        for away, weight in enumerate(weights[1:], 1):
            if weight > 1e-7:
                for start in (BLUR_RADIUS - away, BLUR_RADIUS + away):
                    x.add_(padded.narrow(dim, start, n), alpha=weight)


_JITTER = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
