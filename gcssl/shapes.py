"""`data.path=shapes`: a generated set whose class is the kind of object, not its colour, place, size or pose.

An image shows two objects of one class, a silhouette with a texture (both silhouettes have the same area), each in
light and dark tints of its own, on a shaded ground with bits of clutter. Image i of a split is a pure function of the
split, i and the size, in integer arithmetic alone, so that it has the same bytes on every machine; drawn when read.

kNN on an untrained gcvit_nano is right for 15 to 35 % (docs/LOG.md: how the set was chosen).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gcssl.errors import UserError
from gcssl.sources import Raw

SILHOUETTES = ("disc", "cross")
TEXTURES = ("plain", "stripes", "checks", "spot", "dots")
CLASSES = [f"{texture} {silhouette}" for silhouette in SILHOUETTES for texture in TEXTURES]
SPLITS = {"train": 1, "test": 2}  # streams that never meet
UNIT = 64  # steps a pixel; every coordinate is an integer number of them
TURN = 256  # steps a full turn
MASK = (1 << 64) - 1
# sin(2 pi k / 256) * 1024 for the first quarter turn, written out: sin() may differ between machines
QUARTER = (
    0, 25, 50, 75, 100, 125, 150, 175, 200, 224, 249, 273, 297, 321, 345, 369, 392, 415, 438, 460, 483,
    505, 526, 548, 569, 590, 610, 630, 650, 669, 688, 706, 724, 742, 759, 775, 792, 807, 822, 837, 851,
    865, 878, 891, 903, 915, 926, 936, 946, 955, 964, 972, 980, 987, 993, 999, 1004, 1009, 1013, 1016,
    1019, 1021, 1023, 1024, 1024,
)  # fmt: skip


Colour = tuple[int, int, int]


def sine(angle: int) -> int:
    """1024 sin of an angle in 1/256 turns."""
    angle %= TURN
    if angle >= TURN // 2:
        return -sine(angle - TURN // 2)
    return QUARTER[min(angle, TURN // 2 - angle)]


class Draws:
    """A stream of integers: splitmix64 (Steele, Lea, Flood, 2014), keyed by the split and the image."""

    def __init__(self, *key: int) -> None:
        self.state = 0
        for part in key:
            self.state = (self.state ^ part) & MASK
            self.state = self.next()

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = ((self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        return (self.next() >> 32) * n >> 32

    def between(self, low: int, high: int) -> int:
        """Uniform in low..high, both included."""
        return low + self.below(high - low + 1)

    def tint(self, level: int, spread: int) -> Colour:
        """A grey of this level, each channel up to `spread` off."""
        red, green, blue = (level + self.between(-spread, spread) for _ in range(3))
        return red, green, blue


def _disc(u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    return u * u + v * v <= r * r


def _cross(u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    arm = r * 406 >> 10
    u, v = abs(u), abs(v)
    return ((u <= arm) & (v <= 3 * arm)) | ((v <= arm) & (u <= 3 * arm))


# inside(u, v, r): is the point (u, v), seen from the object's centre in its own axes, in it; each covers pi r^2
INSIDE: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {"disc": _disc, "cross": _cross}


def _texture(name: str, u: np.ndarray, v: np.ndarray, r: int, draws: Draws) -> np.ndarray:
    """Where the object has its second colour; u, v, r as for INSIDE."""
    period = max(1, r * draws.between(40, 50) >> 6)
    shift, other = draws.below(2 * period), draws.below(2 * period)
    if name == "plain":
        return np.zeros(np.broadcast(u, v).shape, bool)
    if name == "stripes":
        return (u + shift) // period + 0 * v & 1 == 1
    if name == "checks":
        return (u + shift) // period + (v + other) // period & 1 == 1
    if name == "spot":
        return 3 * (u * u + v * v) < r * r
    across, down = (u + shift) % period - period // 2, (v + other) % period - period // 2
    return 9 * (across * across + down * down) < period * period


@dataclass(frozen=True)
class Shapes:
    """The images of one split, drawn when read; H W in pixels."""

    split: str
    n: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return self.n

    def read(self, i: int) -> np.ndarray:
        return draw(SPLITS[self.split], i, label_of(i), self.size)

    def where(self, i: int) -> str:
        return f"shapes {self.split} {i}"


def shapes_split(split: str, n: int, size: tuple[int, int]) -> Raw:
    """`n` images with classes in equal parts."""
    if n < len(CLASSES):
        raise UserError(f"data.shapes_n: given {n}, expected at least {len(CLASSES)}, one image a class")
    return Raw(Shapes(split, n, size), np.arange(n) % len(CLASSES), list(CLASSES))


def label_of(i: int) -> int:
    return i % len(CLASSES)


def draw(split: int, i: int, label: int, size: tuple[int, int]) -> np.ndarray:
    """Image i: uint8 H W 3."""
    draws = Draws(split, i)
    height, width = size
    side = min(size) * UNIT
    canvas = _ground(draws, height, width)
    for _ in range(draws.between(4, 8)):
        colours = draws.tint(draws.between(40, 215), 40), (0, 0, 0)
        _place(
            canvas, draws, _anywhere(draws, size), side * draws.between(20, 50) >> 10, _BITS[draws.below(2)], colours
        )
    silhouette, texture = SILHOUETTES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    centres: list[tuple[int, int]] = []
    for _ in range(2):
        centres.append(_apart(draws, size, centres, side * 420 >> 10))
        radius = side * draws.between(260, 330) >> 10
        _place(canvas, draws, centres[-1], radius, INSIDE[silhouette], _two_colours(draws, texture == "plain"), texture)
    return canvas


def _bar(u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    return (abs(u) <= 2 * r) & (abs(v) * 2 <= r)


_BITS = (_bar, _disc)


def _anywhere(draws: Draws, size: tuple[int, int]) -> tuple[int, int]:
    return draws.below(size[0] * UNIT), draws.below(size[1] * UNIT)


def _apart(draws: Draws, size: tuple[int, int], others: list[tuple[int, int]], gap: int) -> tuple[int, int]:
    """A centre (y, x) away from the border and, if twelve tries find one, `gap` away from the others."""
    margin = min(size) * UNIT * 150 >> 10
    centre = (0, 0)
    for _ in range(12):
        centre = (
            draws.between(margin, size[0] * UNIT - margin),
            draws.between(margin, size[1] * UNIT - margin),
        )
        if all((centre[0] - y) ** 2 + (centre[1] - x) ** 2 >= gap * gap for y, x in others):
            break
    return centre


def _ground(draws: Draws, height: int, width: int) -> np.ndarray:
    """A shade from one colour to another across the image: uint8 H W 3."""
    first, angle = draws.tint(draws.between(100, 155), 20), draws.below(TURN)
    second = [channel + draws.between(-30, 30) for channel in first]
    c, s = sine(angle + TURN // 4), sine(angle)
    y = np.arange(height, dtype=np.int64)[:, None] * 2 - height + 1
    x = np.arange(width, dtype=np.int64)[None, :] * 2 - width + 1
    across = (y * s + x * c) * 128 // (1024 * (height + width)) + 128  # 0..255
    shade = np.array(first) * 256 + across[..., None] * (np.array(second) - np.array(first))
    return np.clip(shade >> 8, 0, 255).astype(np.uint8)


def _place(
    canvas: np.ndarray,
    draws: Draws,
    centre: tuple[int, int],
    r: int,
    inside: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    colours: tuple[Colour, Colour],
    texture: str = "plain",
) -> None:
    """Paint one object of radius r (in 1/64 px) into canvas (H W 3); touches its box alone."""
    angle, reach = draws.below(TURN), (r * 5 >> 1) + UNIT
    top, left = (max(0, (c - reach) // UNIT) for c in centre)
    bottom, right = (min(n, (c + reach) // UNIT + 1) for c, n in zip(centre, canvas.shape, strict=False))
    dy = (np.arange(top, bottom, dtype=np.int64) * UNIT + UNIT // 2 - centre[0])[:, None]
    dx = (np.arange(left, right, dtype=np.int64) * UNIT + UNIT // 2 - centre[1])[None, :]
    c, s = sine(angle + TURN // 4), sine(angle)
    u, v = (dx * c + dy * s) >> 10, (dy * c - dx * s) >> 10
    mask, second = inside(u, v, r), _texture(texture, u, v, r, draws)
    box = canvas[top:bottom, left:right]
    box[mask & ~second] = colours[0]
    box[mask & second] = colours[1]


def _two_colours(draws: Draws, either: bool) -> tuple[Colour, Colour]:
    """A light and a dark one, slightly tinted; in either order where only the first will be seen."""
    pair = draws.tint(draws.between(190, 235), 20), draws.tint(draws.between(20, 65), 20)
    return pair[::-1] if either and draws.below(2) else pair
