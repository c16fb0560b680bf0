"""`data.path=shapes`: a generated set whose class is the kind of object, not its colour, place, size or pose.

An image shows a few objects of one class (a silhouette with a texture; all silhouettes have the same area), each in
colours of its own, on a shaded and noisy ground with bits of clutter. Image i of a split is a pure function of the split,
i and the size, in integer arithmetic alone, so that it has the same bytes on every machine; it is drawn when read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from gcssl.errors import UserError
from gcssl.sources import Raw

SILHOUETTES = ("disc", "square", "triangle", "cross", "ring")
TEXTURES = ("stripes", "checks")
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

    def colour(self) -> tuple[int, int, int]:
        bits = self.next()
        return bits & 255, bits >> 8 & 255, bits >> 16 & 255


def _disc(u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    return u * u + v * v <= r * r


def _square(u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) <= r * 907 >> 10


def _triangle(u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    inner = r * 796 >> 10  # radius of the inscribed circle
    return (v <= inner) & (887 * abs(u) - 512 * v <= inner * 1024)  # 1024 times cos and sin of 30 degrees


def _cross(u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    arm = r * 406 >> 10
    u, v = abs(u), abs(v)
    return ((u <= arm) & (v <= 3 * arm)) | ((v <= arm) & (u <= 3 * arm))


def _ring(u: np.ndarray, v: np.ndarray, r: int) -> np.ndarray:
    square = (u * u + v * v) * 16
    return (square <= 25 * r * r) & (square >= 9 * r * r)


# inside(u, v, r): is the point (u, v), seen from the object's centre in its own axes, in it; each covers pi r^2
INSIDE: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}


@dataclass(frozen=True)
class Shapes:
    """The images of one split, drawn when read; H W in pixels."""

    split: str
    n: int
    size: tuple[int, int]

    def __len__(self) -> int:
        return self.n

    def read(self, i: int) -> Image.Image:
        return Image.fromarray(draw(SPLITS[self.split], i, label_of(i), self.size))

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
    for _ in range(draws.between(8, 14)):
        r = side * draws.between(20, 60) >> 10
        inside = _BITS[draws.below(2)]
        _place(canvas, draws, _anywhere(draws, size), r, inside, None)
    silhouette, texture = SILHOUETTES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    centres: list[tuple[int, int]] = []
    for _ in range(draws.between(3, 4)):
        r = side * draws.between(120, 190) >> 10
        centre = _apart(draws, size, centres, side * 400 >> 10)
        centres.append(centre)
        _place(canvas, draws, centre, r, INSIDE[silhouette], texture)
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
    """A shade from one colour to another across the image, with noise: uint8 H W 3."""
    first, angle = draws.colour(), draws.below(TURN)
    second = [min(255, max(0, c + draws.between(-70, 70))) for c in first]
    c, s = sine(angle + TURN // 4), sine(angle)
    y = np.arange(height, dtype=np.int64)[:, None] * 2 - height + 1
    x = np.arange(width, dtype=np.int64)[None, :] * 2 - width + 1
    across = (y * s + x * c) * 128 // (1024 * (height + width)) + 128  # 0..255
    shade = np.array(first) * 256 + across[..., None] * (np.array(second) - np.array(first))
    noise = _noise(draws.next(), height * width * 3).reshape(height, width, 3)
    return np.clip((shade >> 8) + noise, 0, 255).astype(np.uint8)


def _noise(key: int, n: int) -> np.ndarray:
    """Integers around 0 (sum of two bytes, spread about 18): int64 n."""
    z = np.arange((n + 3) // 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    halves = [(z >> np.uint64(16 * k)) & np.uint64(0xFFFF) for k in range(4)]
    values = np.stack(halves, 1).reshape(-1)[:n].astype(np.int64)
    return ((values & 255) + (values >> 8) - 255) * 44 >> 8


def _place(
    canvas: np.ndarray,
    draws: Draws,
    centre: tuple[int, int],
    r: int,
    inside: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    texture: str | None,
) -> None:
    """Paint one object into canvas (H W 3): two colours in its texture, or one; touches its box alone."""
    angle, reach = draws.below(TURN), (r * 5 >> 1) + UNIT
    top, left = (max(0, (c - reach) // UNIT) for c in centre)
    bottom, right = (min(n, (c + reach) // UNIT + 1) for c, n in zip(centre, canvas.shape, strict=False))
    dy = (np.arange(top, bottom, dtype=np.int64) * UNIT + UNIT // 2 - centre[0])[:, None]
    dx = (np.arange(left, right, dtype=np.int64) * UNIT + UNIT // 2 - centre[1])[None, :]
    c, s = sine(angle + TURN // 4), sine(angle)
    u, v = (dx * c + dy * s) >> 10, (dy * c - dx * s) >> 10
    mask = inside(u, v, r)
    box = canvas[top:bottom, left:right]
    first, second = _two_colours(draws)
    if texture is None:
        box[mask] = first
        return
    period = max(1, r * draws.between(36, 48) >> 6)
    phase = draws.below(2 * period)
    odd = (u + phase) // period
    if texture == "checks":
        odd = odd + (v + draws.below(2 * period)) // period
    box[mask & (odd & 1 == 0)] = first
    box[mask & (odd & 1 == 1)] = second


def _two_colours(draws: Draws) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    first = second = draws.colour()
    for _ in range(8):
        second = draws.colour()
        if sum(abs(a - b) for a, b in zip(first, second, strict=True)) >= 260:
            break
    return first, second
