"""Every colour mode decodes to true RGB; a damaged or hostile file is a bad image with one line."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from gcssl.data import BadImage, _jpeg, _true_rgb, decode


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def first(data: bytes) -> tuple[int, ...]:
    image = decode(data)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    return tuple(image[0, 0].tolist())


@pytest.mark.fault(
    "16-bit and float images",
    "true values, not saturated",
)
def test_sixteen_bit_and_float_images_keep_their_range() -> None:
    ramp = (np.arange(256) * 256 + 200).astype(np.uint16).reshape(16, 16)  # no multiples of 257: modulo 256 shows
    ramp[0, 0], ramp[-1, -1] = 0, 65535
    grey = decode(saved(Image.fromarray(ramp), "png"))
    assert np.abs(grey[..., 0] - ramp / 257).max() <= 0.5
    assert np.array_equal(grey[..., 0], grey[..., 2])
    tiff = decode(saved(Image.fromarray(ramp.astype(np.int32)), "tiff"))
    assert np.array_equal(tiff, grey)
    for scale in (1.0, 255.0, 65535.0):
        floats = Image.fromarray((ramp / 65535 * scale).astype(np.float32))
        assert np.abs(decode(saved(floats, "tiff"))[..., 0].astype(int) - grey[..., 0]).max() <= 1
    for bad in (np.nan, -5.0, 1e9):
        with pytest.raises(BadImage, match="expected 0..65535"):
            decode(saved(Image.fromarray(np.array([[0.0, bad]], np.float32)), "tiff"))


@pytest.mark.fault(
    "CMYK, grey, palette, 1-bit images",
    "the reference's colours",
)
def test_colour_modes() -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    assert first(saved(red, "png")) == (200, 30, 40)
    assert first(saved(red.convert("P", palette=Image.Palette.ADAPTIVE), "png")) == (200, 30, 40)
    assert np.abs(np.array(first(saved(red.convert("CMYK"), "jpeg", quality=95))) - [200, 30, 40]).max() < 8
    assert first(saved(red.convert("L"), "png")) == (82,) * 3
    assert first(saved(Image.new("1", (8, 8), 1), "png")) == (255,) * 3


@pytest.mark.fault(
    "transparent images",
    "laid on white",
)
def test_transparency_is_laid_on_white() -> None:
    assert first(saved(Image.new("RGBA", (8, 8), (200, 0, 0, 0)), "png")) == (255, 255, 255)
    assert first(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "png")) == (127, 127, 127)
    assert first(saved(Image.new("LA", (8, 8), (0, 0)), "png")) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 200, 30, 40])
    assert first(saved(palette, "png", transparency=1)) == (255, 255, 255)
    assert first(saved(palette, "png", transparency=0)) == (200, 30, 40)
    assert first(saved(Image.new("RGB", (8, 8), (1, 2, 3)), "png", transparency=(1, 2, 3))) == (255, 255, 255)


@pytest.mark.fault(
    "EXIF turns and animations",
    "turned; the first frame",
)
def test_exif_turns_and_gifs_show_their_first_frame() -> None:
    image = Image.new("RGB", (16, 8), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    turned = decode(saved(image, "png", exif=exif))
    assert turned.shape == (16, 8, 3) and turned[2, 4].tolist() == [255, 0, 0]
    frames = [Image.new("RGB", (8, 8), c) for c in ((200, 0, 0), (0, 200, 0))]
    for kind in ("gif", "mpo"):
        shown = first(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.abs(np.array(shown) - (200, 0, 0)).max() < 8


def jpegs() -> list[bytes]:
    """Of all subsamplings, baseline and progressive, with and without restart markers, of odd sizes; grey and CMYK."""
    found = []
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (7, 9, 3), np.uint8)
        image = Image.fromarray(pixels).resize((61 + i, 43 + i % 5), Image.Resampling.BICUBIC)
        options = {"quality": (50, 75, 95)[i % 3], "subsampling": i % 3, "progressive": i % 2 == 1}
        found.append(saved(image, "jpeg", restart_marker_blocks=3 * (i // 6), **options))
    found.append(saved(image, "jpeg", keep_rgb=True))
    return [*found, *(saved(image.convert(mode), "jpeg") for mode in ("L", "CMYK"))]


def by_pillow(encoded: bytes) -> np.ndarray | None:
    try:
        return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    except Exception:  # a dozen types
        return None


def test_jpegs_have_pillows_pixels_and_faults() -> None:
    """Sound ones by the fast decoder, and 2,000 with bytes changed, cut out or put in: equal, or bad for both."""
    sound, rng = jpegs(), np.random.default_rng(0)
    cases = list(sound)
    for i in range(2000):
        data, place = sound[i % len(sound)], int(rng.integers(len(sound[i % len(sound)])))
        more = rng.integers(0, 256, 1 + i % 5, np.uint8).tobytes()
        cases.append(data[:place] + more + data[place + i % 3 * len(more) :] if i % 8 else data[:place])
    fast = 0
    for case in cases:
        wanted = by_pillow(case)
        try:
            found = decode(case)
            fast += _jpeg(case, Image.open(io.BytesIO(case))) is not None
        except BadImage:
            found = None
        assert (wanted is None) == (found is None) and (found is None or np.array_equal(found, wanted))
    assert [_jpeg(case, Image.open(io.BytesIO(case))) is not None for case in sound] == [True] * 13 + [False] * 2
    assert 300 < fast < 1700 and any(by_pillow(case) is None for case in cases)


def test_a_jpeg_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    (tmp_path / "a.jpg").write_bytes(saved(image, "jpeg", exif=exif))
    turned = decode(tmp_path / "a.jpg")
    assert turned.shape == (16, 8, 3) and turned[2, 4, 0] > 200


def bomb() -> bytes:
    """A PNG of 20000 x 20000 black pixels in a few hundred kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.fault(
    "truncated, empty, random, HTML, bombs of pixels and text",
    "each a bad image with one line",
)
def test_damaged_files_are_bad_images_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg, png = saved(noise, "jpeg"), saved(noise, "png")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    cases = [
        b"",
        b"\x00" * 100,
        b"<html>\n</html>",
        jpeg[: len(jpeg) // 2],
        png[: len(png) // 2],
        bytes(flipped),
        bomb(),
    ]
    for data in cases:
        with pytest.raises(BadImage) as caught:
            decode(data)
        assert str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # what some libraries do
    with pytest.raises(BadImage, match="No such file"):
        decode(tmp_path / "nothing.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # no pixel of a bomb is read
    with pytest.raises(BadImage, match="20000x20000"):
        decode(bomb())


def test_the_reason_of_an_unrecognisable_file(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>")
    for source in (b"<html>", tmp_path / "page.jpg"):
        with pytest.raises(BadImage, match="none of the formats JPEG, PNG, .*AVIF$"):
            decode(source)


@pytest.mark.fault(
    "EPS, which would start Ghostscript",
    "refused, nothing starts",
)
def test_a_file_that_would_start_a_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "gs"  # Pillow hands PostScript to ghostscript
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(BadImage):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    assert not (tmp_path / "started").exists()


def test_damaged_exif_leaves_a_sound_image_as_stored() -> None:
    assert first(saved(Image.new("RGB", (8, 8), (10, 20, 30)), "png", exif=b"Exif\0\0no tiff")) == (10, 20, 30)


def test_premultiplied_grey_is_laid_on_white() -> None:
    """No file opens so; an image of the datasets library may be of any mode."""
    half = Image.merge("LA", (Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 128)))
    for image in (half, half.convert("La")):
        assert abs(_true_rgb(image).getpixel((0, 0))[0] - (100 * 128 + 255 * 127) / 255) <= 2  # type: ignore[index]
