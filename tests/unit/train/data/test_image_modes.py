"""Every mode that PIL opens becomes the 8-bit image that a person would see, or is refused."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from timm_alfa.train.data import image_modes
from timm_alfa.train.data.image_modes import MODES, PixelRangeError, convert_image

VALUES = np.array([[0, 127, 128, 257, 32768, 65407, 65408, 65535]], dtype=np.uint16)
EIGHT_BITS = [0, 0, 0, 1, 128, 255, 255, 255]  # v * 255 / 65535, rounded
SIZE = (2, 2)
RED = (200, 30, 60)


def stored(image: Image.Image, form: str, **options: object) -> Image.Image:
    """What opens when the image has been saved."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(file)


def pixels(image: Image.Image, mode: str) -> list[object]:
    return np.asarray(convert_image(image, mode)).tolist()


def colour(image: Image.Image, mode: str = "RGB") -> object:
    """The one colour of an image."""
    converted = convert_image(image, mode)
    assert converted.mode == mode
    ((_, found),) = converted.getcolors()
    return found


def sixteen_bits(mode: str) -> Image.Image:
    if mode == "I":
        return Image.fromarray(VALUES.astype(np.int32))
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (VALUES.shape[1], 1), VALUES.astype(order).tobytes())


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N", "I"])
def test_sixteen_bits_are_scaled_by_their_range(mode: str):
    assert pixels(sixteen_bits(mode), "L") == [EIGHT_BITS]
    assert pixels(sixteen_bits(mode), "RGB") == [[[value] * 3 for value in EIGHT_BITS]]


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I"), ("PPM", "I;16"), ("PPM", "I"), ("JPEG2000", "I;16")],
)
def test_files_of_sixteen_bits(form: str, mode: str):
    opened = stored(sixteen_bits(mode), form)
    assert opened.mode in ("I;16", "I")  # which of them depends on the version of Pillow
    assert pixels(opened, "L") == [EIGHT_BITS]


def test_a_big_endian_file():
    # by hand, for PIL writes none
    entries = [(256, 3, 1, 8), (257, 3, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, 16)]  # fmt: skip
    opened = Image.open(io.BytesIO(tiff(entries, VALUES.astype(">u2").tobytes(), "big")))
    assert opened.mode == "I;16B"
    assert pixels(opened, "L") == [EIGHT_BITS]


def tiff(entries: list[tuple[int, int, int, int]], data: bytes, order: str) -> bytes:
    """A TIFF file of one strip at offset 8: entries are tag, type (3 short, 4 long), count and value."""

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)  # type: ignore[arg-type]

    content = (b"MM" if order == "big" else b"II") + number(42, 2) + number(8 + len(data), 4) + data
    content += number(len(entries), 2)
    for tag, kind, count, value in entries:
        content += number(tag, 2) + number(kind, 2) + number(count, 4)
        content += number(value, 2) + bytes(2) if kind == 3 else number(value, 4)
    return content + bytes(4)


def little(bits: int, photometric: int, sample_format: int, width: int, data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(tiff([
        (256, 3, 1, width), (257, 3, 1, 1), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8),
        (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, len(data)), (339, 3, 1, sample_format),
    ], data, "little")))  # fmt: skip


def test_tiff_files_of_other_ranges():
    twelve = little(12, 1, 1, 2, bytes([0x80, 0x0F, 0xFF]))  # 0x800 and 0xFFF
    assert pixels(twelve, "L") == [[128, 255]]
    signed = little(16, 1, 2, 3, np.array([0, 16384, 32767], dtype="<i2").tobytes())
    assert pixels(signed, "L") == [[0, 128, 255]]
    negative = little(16, 1, 2, 2, np.array([-1000, 3000], dtype="<i2").tobytes())
    with pytest.raises(PixelRangeError, match="a 16-bit image with values from -1000 to 3000, expected 0 to 32767"):
        convert_image(negative, "L")
    white_is_zero = little(16, 0, 1, 3, np.array([0, 32768, 65535], dtype="<u2").tobytes())
    assert pixels(white_is_zero, "L") == [[255, 127, 0]]
    unsigned = little(32, 1, 1, 2, np.array([0, 2**32 - 1], dtype="<u4").tobytes())
    with pytest.raises(PixelRangeError, match="a 32-bit image with values from -1 to 0"):
        convert_image(unsigned, "L")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 65536]], dtype=np.int32), "a 32-bit image with values from 0 to 65536, expected 0 to 65535"),
        (np.array([[-1, 5]], dtype=np.int32), "a 32-bit image with values from -1 to 5"),
        (np.array([[0, 1.5]], dtype=np.float32), "a floating-point image with values from 0 to 1.5, expected 0 to 1"),
        (np.array([[-0.1, 1]], dtype=np.float32), "values from -0.1 to 1"),
        (np.array([[0, np.nan]], dtype=np.float32), "values from nan to nan"),
        (np.array([[0, np.inf]], dtype=np.float32), "values from 0 to inf"),
    ],
)
def test_values_without_a_known_range_are_refused(values: np.ndarray, message: str):
    with pytest.raises(PixelRangeError, match=message):
        convert_image(stored(Image.fromarray(values), "TIFF"), "RGB")


def test_floating_point_from_0_to_1():
    image = stored(Image.fromarray(np.array([[0, 0.25, 0.5, 1]], dtype=np.float32)), "TIFF")
    assert image.mode == "F"
    assert pixels(image, "L") == [[0, 64, 128, 255]]


def test_images_that_use_few_of_their_bits_are_warned_about_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(image_modes, "_told_of_dark_images", False)
    with caplog.at_level(logging.WARNING):
        convert_image(sixteen_bits("I;16"), "L")
        convert_image(Image.new("I;16", SIZE, 0), "L")  # black
        assert not caplog.messages
        for _ in range(2):
            convert_image(Image.new("I;16", SIZE, 4095), "L")
    (message,) = caplog.messages
    assert "no value above 4095, and so none above 16 of 255" in message


@pytest.mark.parametrize("mode", MODES)
def test_what_is_8_bits_already_becomes_what_pil_makes(mode: str):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for image in (noise, noise.convert("L")):
        if image.mode == "RGB" or mode not in ("HSV", "LAB"):  # which PIL does not make of grey
            assert convert_image(image, mode).tobytes() == image.convert(mode).tobytes()
    for image in (noise.convert("RGBA"), noise.convert("L").convert("LA")):  # opaque
        base = image.convert(image.mode[:-1])
        assert convert_image(image, "RGB").tobytes() == base.convert("RGB").tobytes()
        assert convert_image(image, "L").tobytes() == base.convert("L").tobytes()


@pytest.mark.parametrize("mode", ["P", "PA", "LA", "La", "RGBA", "RGBa", "CMYK", "1", "YCbCr", "LAB", "HSV", "RGBX",
                                  "I;16", "I;16B", "I;16L", "I", "F", "L", "RGB"])  # fmt: skip
@pytest.mark.parametrize("target", MODES)
def test_every_mode_becomes_every_mode_that_can_be_asked_for(mode: str, target: str):
    assert convert_image(Image.new(mode, SIZE), target).mode == target


def test_transparent_parts_are_white():
    hidden, grey = (10, 20, 30), 40
    assert colour(stored(Image.new("RGBA", SIZE, (*hidden, 0)), "PNG")) == (255, 255, 255)
    assert colour(stored(Image.new("RGBA", SIZE, (*hidden, 0)), "PNG"), "L") == 255
    assert colour(stored(Image.new("RGBA", SIZE, (0, 100, 200, 51)), "PNG")) == (204, 224, 244)
    assert colour(stored(Image.new("LA", SIZE, (grey, 0)), "PNG")) == (255, 255, 255)
    assert colour(stored(Image.new("LA", SIZE, (grey, 51)), "PNG"), "L") == 212
    assert colour(stored(Image.new("LA", SIZE, (grey, 255)), "PNG"), "L") == grey
    assert colour(stored(Image.new("RGBA", SIZE, (*hidden, 0)), "TIFF")) == (255, 255, 255)
    assert colour(stored(Image.new("RGBA", SIZE, (*hidden, 0)), "WEBP", lossless=True, exact=True)) == (255, 255, 255)
    assert colour(Image.new("PA", SIZE, (0, 0))) == (255, 255, 255)
    assert colour(Image.new("La", SIZE, (0, 0)), "L") == 255
    assert colour(Image.new("RGBa", SIZE, (0, 0, 0, 0))) == (255, 255, 255)


def test_one_transparent_colour():
    palette = Image.new("P", SIZE)
    palette.putpalette([10, 20, 30, *RED])
    palette.putpixel((0, 0), 1)
    assert pixels(stored(palette, "PNG"), "RGB")[0] == [[*RED], [10, 20, 30]]
    for options in ({"transparency": 0}, {"transparency": b"\x00\xff"}):
        assert pixels(stored(palette, "PNG", **options), "RGB")[0] == [[*RED], [255, 255, 255]]
    assert pixels(stored(palette, "PNG", transparency=b"\x33\xff"), "RGB")[0] == [[*RED], [206, 208, 210]]
    assert pixels(stored(palette, "GIF", transparency=0), "RGB")[0] == [[*RED], [255, 255, 255]]
    assert pixels(stored(palette, "PNG", transparency=0), "RGBA")[0] == [[*RED, 255], [10, 20, 30, 0]]
    assert colour(stored(Image.new("RGB", SIZE, RED), "PNG", transparency=RED)) == (255, 255, 255)
    assert colour(stored(Image.new("L", SIZE, 7), "PNG", transparency=7), "L") == 255
    assert colour(stored(Image.new("L", SIZE, 7), "PNG", transparency=8), "L") == 7
    sixteen = Image.fromarray(np.array([[300, 25700]], dtype=np.uint16))
    assert pixels(stored(sixteen, "PNG", transparency=300), "L") == [[255, 100]]


def test_colours_of_other_kinds():
    red = Image.new("RGB", SIZE, RED)
    inverted = stored(red.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert inverted.mode == "CMYK"
    assert b"Adobe" in inverted.fp.getvalue()
    for image in (inverted, stored(red.convert("CMYK"), "TIFF"), stored(red.convert("YCbCr"), "TIFF"),
                  stored(red.convert("LAB"), "TIFF"), red.convert("HSV")):  # fmt: skip
        mode = image.mode
        assert mode not in ("RGB", "L")
        assert np.abs(np.subtract(colour(image), RED)).max() <= 3, mode
        assert abs(colour(image, "L") - 84) <= 2, mode


def test_lab_is_that_of_the_colour_profile(tmp_path: Path):
    red = Image.new("RGB", SIZE, RED)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(red, to_lab).save(tmp_path / "red.tif")
    with Image.open(tmp_path / "red.tif") as image:
        assert np.abs(np.subtract(colour(image), RED)).max() <= 2


def test_black_and_white():
    image = Image.new("1", SIZE)
    image.putpixel((1, 0), 1)
    for form in ("PNG", "TIFF"):
        opened = stored(image, form)
        assert opened.mode == "1"
        assert pixels(opened, "L") == [[0, 255], [0, 0]]
