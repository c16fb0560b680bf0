"""Augmentations in two halves: `draw_view` draws a view's parameters, the others apply them.

Crop, resize and flip run on the worker and give uint8 pixels. Colour jitter, grey, blur and solarise run in
one pure function, `colour`, with one parameter set per sample, on the worker or in batches on the device
(`augment.where`). `augment.colour=fast` makes jitter and grey one matrix.
Parameters: SimMIM (arXiv:2111.09886), SimCLR (arXiv:2002.05709), MoCo v3 (arXiv:2104.02057, which takes
BYOL's).
"""

import math
from dataclasses import dataclass, replace

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

    crop: np.ndarray  # 10 4 float64: area share, log ratio, and where the box lies (down, right) in [0, 1)
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
                raise UserError(f"augment.{key}={list(value)}: expected one number{each}")
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
    u = rng.random((CROP_ATTEMPTS, 4))
    low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
    area = spec.scale[0] + u[:, 0] * (spec.scale[1] - spec.scale[0])
    crop = np.stack([area, low + u[:, 1] * (high - low), u[:, 2], u[:, 3]], axis=1)
    flip, jitter, gray, blur, solarize, sigma = rng.random(6)
    shifts = rng.random(4) * 2 - 1
    order = np.argsort(rng.random(4))
    strength = np.array(spec.jitter)
    lowest = np.maximum(1 - strength[:HUE], 0)  # a factor is uniform in [max(0, 1 - s), 1 + s]
    factors = lowest + (shifts[:HUE] + 1) / 2 * (1 + strength[:HUE] - lowest)
    width = spec.blur_sigma[1] - spec.blur_sigma[0]
    return View(
        crop=crop,
        flip=np.bool_(flip < spec.flip_p),
        jitter=np.bool_(jitter < spec.jitter_p),
        factors=np.append(factors, shifts[HUE] * strength[HUE]).astype(np.float32),
        order=order.astype(np.int64),
        gray=np.bool_(gray < spec.gray_p),
        sigma=np.float32((spec.blur_sigma[0] + sigma * width) * (blur < spec.blur_p)),
        solarize=np.bool_(solarize < spec.solarize_p),
    )


def crop_box(view: View, spec: ViewSpec, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, h, w) in pixels of an image of that size: the first attempt that fits, else the centre.

    The rule of torchvision's RandomResizedCrop, with the random numbers taken from `view`.
    """
    for area, log_ratio, down, right in view.crop:
        target, ratio = area * height * width, math.exp(log_ratio)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    low, high = spec.ratio
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    return (height - h) // 2, (width - w) // 2, h, w


def pixels_of(image: np.ndarray) -> Tensor:
    """uint8 H W 3 -> the same memory as uint8 1 3 H W, for `crop_resize`: what torch resizes fastest."""
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def crop_resize(pixels: Tensor, view: View, spec: ViewSpec) -> np.ndarray:
    """The view's box of `pixels_of` an image at spec.size, flipped if drawn: uint8 3 H W.

    torch's antialiased resizing of bytes: in whole numbers, so the same on every machine, within two levels of Pillow's
    (torchvision's RandomResizedCrop) and two to three times as fast where there is AVX2.
    """
    top, left, h, w = crop_box(view, spec, *pixels.shape[2:])
    box = pixels[..., top : top + h, left : left + w]
    if spec.interpolation in ("bilinear", "bicubic"):
        out = F.interpolate(box, spec.size, mode=spec.interpolation, antialias=True)[0].numpy()  # 3 H W
    else:  # Pillow's alone
        crop = Image.fromarray(box[0].permute(1, 2, 0).numpy())
        out = np.asarray(crop.resize(spec.size[::-1], INTERPOLATIONS[spec.interpolation])).transpose(2, 0, 1)
    return np.ascontiguousarray(out[:, :, ::-1] if view.flip else out)


def resize_center_crop(image: np.ndarray, size: tuple[int, int], crop_pct: float, interpolation: str) -> np.ndarray:
    """The evaluation crop of uint8 H W 3: shorter side to size / crop_pct, then the centre: uint8 3 H W.

    Equals torchvision's Resize + CenterCrop for square sizes; a non-square size is covered likewise.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation {interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}")
    height, width = (math.floor(side / crop_pct) for side in size)
    if width * image.shape[0] >= height * image.shape[1]:  # the width decides
        height = max(height, int(width * image.shape[0] / image.shape[1]))
    else:
        width = max(width, int(height * image.shape[1] / image.shape[0]))
    out = Image.fromarray(image).resize((width, height), INTERPOLATIONS[interpolation])
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    out = out.crop((left, top, left + size[1], top + size[0]))
    return np.ascontiguousarray(np.asarray(out).transpose(2, 0, 1))


def colour(x: Tensor, params: dict[str, Tensor], fast: bool = False) -> Tensor:
    """Jitter, grey, blur, solarise, in this order: uint8 B 3 H W -> float32 B 3 H W in 0..1.

    `params` holds `View.params()` stacked: jitter B, factors B 4, order B 4, gray B, sigma B, solarize B.
    They are read on the host: leave them there while x is on a device, so that nothing waits for the device.
    fast: jitter and grey are one matrix an image (`_mix`), near torchvision's and not equal to them.
    """
    x = x.float().div_(255)
    params = {name: value.cpu() for name, value in params.items()}
    if fast:
        _mix(x, params)
        params |= {name: torch.zeros_like(params[name]) for name in ("jitter", "gray")}
    if x.device.type == "cpu":
        for i in range(len(x)):
            _colour_alone(x[i : i + 1], {name: value[i] for name, value in params.items()})
    else:
        _colour_together(x, params)
    return x


def _mix(x: Tensor, params: dict[str, Tensor]) -> None:
    """Jitter and grey of B 3 H W in place, in YIQ: hue turns the chroma IQ, saturation scales it, grey removes it,
    contrast scales all about the mean of Y, brightness scales all. Values are clamped once, at the end: until then the
    four commute, so the drawn order does not matter.
    """
    still = torch.tensor([1.0, 1.0, 1.0, 0.0])
    brightness, contrast, saturation, shift = torch.where(params["jitter"][:, None], params["factors"], still).T
    turn, kept = -2 * math.pi * shift, saturation * ~params["gray"]
    sin, cos = kept * turn.sin(), kept * turn.cos()
    chroma = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    matrix = YIQ.inverse()[:, :1] @ YIQ[:1] + YIQ.inverse()[:, 1:] @ chroma @ YIQ[1:]  # B 3 3
    matrix, lift = _on((brightness * contrast).view(-1, 1, 1) * matrix, x), _on(brightness * (1 - contrast), x)
    lift = lift.view(-1, 1, 1)
    # a CPU's cache holds one image, and those that are neither jittered nor grey are left alone
    alone = [slice(i, i + 1) for i in (params["jitter"] | params["gray"]).nonzero().flatten().tolist()]
    for rows in alone if x.device.type == "cpu" else [slice(None)]:
        pixels = x[rows].flatten(2)
        offset = lift[rows] * _gray(x[rows]).mean((1, 2, 3)).view(-1, 1, 1)
        pixels.copy_(torch.baddbmm(offset, matrix[rows], pixels).clamp_(0, 1))


def _colour_alone(x: Tensor, params: dict[str, Tensor]) -> None:
    """One image 1 3 H W after the other, in place: a CPU's cache holds it."""
    if params["jitter"]:
        for op in params["order"].tolist():
            _JITTER[op](x, params["factors"][op].view(1, 1, 1))
    if params["gray"]:
        x.copy_(_gray(x))
    if params["sigma"] > 0:
        _blur_alone(x, params["sigma"])
    if params["solarize"]:
        torch.minimum(x, 1 - x, out=x)


def _colour_together(x: Tensor, params: dict[str, Tensor]) -> None:
    """The same for B 3 H W: samples that share an operation run together, so that a GPU has few kernels to start."""
    for place in range(4):
        for op in range(4):
            rows = (params["jitter"] & (params["order"][:, place] == op)).nonzero().squeeze(1)
            if len(rows):
                on = _on(rows, x)
                part = x[on]
                _JITTER[op](part, _on(params["factors"][rows, op], x).view(-1, 1, 1))
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
    shift = torch.tensor(mean, dtype=x.dtype).to(x.device, non_blocking=True).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=x.dtype).to(x.device, non_blocking=True).view(-1, 1, 1)
    return (x - shift).div_(scale)


def _on(rows: Tensor, x: Tensor) -> Tensor:
    return rows.to(x.device, non_blocking=True)


def _gray(x: Tensor) -> Tensor:
    """B 3 H W -> B 1 H W, ITU-R 601 weights."""
    r, g, b = x.unbind(1)
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114).unsqueeze(1)


# The four work in place on B 3 H W in 0..1, with a factor B 1 1 a sample.


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor[:, None]).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    mean = _gray(x).mean((1, 2, 3), keepdim=True)  # B 1 1 1
    x.mul_(factor[:, None]).add_(mean.mul_(1 - factor[:, None])).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    gray = _gray(x).mul_(1 - factor[:, None])
    x.mul_(factor[:, None]).add_(gray).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> None:
    """Turn the hue by `shift` turns; value and saturation stay (HSV of Smith, 1978).

    A channel is value - chroma * clamp(2 - 6 d, 0, 1), d its distance on the circle of hues, in turns, from the hue
    that has least of it: cyan for red, magenta for green, yellow for blue.
    """
    r, g, b = x.unbind(1)  # B H W
    value, low = torch.maximum(r, g).maximum(b), torch.minimum(r, g).minimum(b)
    chroma = value - low
    # The hue in sixths of a turn, times chroma: by r where r is the value, else by g, else by b. Differences
    # times 1e30, clamped, are 0 or 1: many times faster than torch.where on a CPU.
    not_g, not_r = ((value - one).mul_(1e30).clamp_(max=1) for one in (g, r))
    sixths = torch.lerp((b - r).add_(chroma, alpha=2), (r - g).add_(chroma, alpha=4), not_g)
    sixths = torch.lerp(g - b, sixths, not_r)
    turns = sixths.div_(low.copy_(chroma).mul_(6).clamp_(min=1e-7)).add_(shift)
    d, nearest = torch.empty_like(turns), torch.empty_like(turns)
    for i, least in enumerate((1 / 2, 5 / 6, 1 / 6)):
        torch.sub(turns, least, out=d)
        d.sub_(torch.round(d, out=nearest)).abs_().mul_(-6).add_(2).clamp_(0, 1)
        torch.addcmul(value, chroma, d, value=-1, out=x[:, i])


def _gaussian(sigma: Tensor) -> Tensor:
    """B 13 weights of sigma B in pixels, at most 2."""
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, dtype=torch.float32)
    return torch.softmax(-0.5 * (taps / sigma[:, None]) ** 2, dim=1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur by 13 taps per axis with reflected borders; sigma B on the host."""
    b, c, h, w = x.shape
    kernel = _on(_gaussian(sigma), x).repeat_interleave(c, 0)  # BC 13
    x = F.pad(x, [BLUR_RADIUS] * 4, mode="reflect").view(1, b * c, h + 2 * BLUR_RADIUS, w + 2 * BLUR_RADIUS)
    x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)
    x = F.conv2d(x, kernel[:, None, :, None], groups=b * c)
    return x.view(b, c, h, w)


def _blur_alone(x: Tensor, sigma: Tensor) -> None:
    """The same for one image, in place, as a sum of shifted images: convolutions with one filter a channel are slow."""
    weights = _gaussian(sigma[None])[0, BLUR_RADIUS:].tolist()
    for dim, border in ((2, [0, 0, BLUR_RADIUS, BLUR_RADIUS]), (3, [BLUR_RADIUS, BLUR_RADIUS, 0, 0])):
        padded, n = F.pad(x, border, mode="reflect"), x.shape[dim]
        x.mul_(weights[0])
        for away, weight in enumerate(weights[1:], 1):
            if weight > 1e-7:
                for start in (BLUR_RADIUS - away, BLUR_RADIUS + away):
                    x.add_(padded.narrow(dim, start, n), alpha=weight)


_JITTER = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
