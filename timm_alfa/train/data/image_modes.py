"""PIL images of any mode as the 8-bit images that models are trained on: the one place where pixels are converted."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["MODES", "PixelRangeError", "convert_image"]

_logger = logging.getLogger(__name__)

# channels of the modes that --input-img-mode can ask for; others have more or fewer bits, or numbers of colours
MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "YCbCr": 3, "HSV": 3, "LAB": 3}
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0
_told_of_dark_images = False


class PixelRangeError(ValueError):
    """An image whose values have no known range, so that nobody can say which of them are black and white."""


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Decode an image and convert it to an 8-bit mode; 8-bit grey and RGB images become what ``image.convert`` makes.

    * 16-bit grey (``I;16`` and its kin, and ``I``, as which some formats and versions of Pillow open the same files):
      0..65535 becomes 0..255, rounded; of TIFF files with 12 bits 0..4095, with 16 bits of which one is a sign
      0..32767. PIL's own ``convert`` makes 255 of everything above 255. The scale does not depend on the image; the
      first one that uses less than 12 of 16 bits is warned about.
    * Floating point (``F``): 0..1 becomes 0..255, rounded.
    * Transparent parts (``RGBA``, ``LA``, ``PA``, a transparent colour) show a white background, unless ``mode`` has an
      alpha channel. PIL's ``convert`` shows the colours that are stored there, which no viewer does.
    * CMYK, YCbCr, LAB, HSV, palettes and 1-bit images show their colours, as in PIL. JPEG files of CMYK are read as
      Adobe writes them, inverted.

    Args:
        image: Open, of any mode; decoded if it is not yet.
        mode: One of ``MODES``.

    Returns:
        An image of that mode.

    Raises:
        PixelRangeError: A value of ``I`` above 16 bits or below 0, or of ``F`` outside 0..1 (or not a number).
        OSError, ValueError, ...: As of ``image.load()``, where the file is damaged.
    """
    image.load()
    if image.mode in ("RGB", "L") and "transparency" not in image.info:
        return _to_mode(image, mode)
    transparent: Any = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        grey = _to_eight_bits(image)
        if isinstance(transparent, int):
            grey.putalpha(Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)))
        image = grey
    elif image.mode in ("La", "RGBa"):  # colours multiplied by alpha
        image = image.convert(image.mode[:-1] + "A")
    elif image.mode.endswith("A") or transparent is not None or _palette_mode(image) == "RGBA":
        if isinstance(transparent, tuple) and max(transparent) > 255:  # of 16 bits, while PIL reads the upper 8
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        image = image.convert("LA" if image.mode == "LA" else "RGBA")
    if image.mode in ("LA", "RGBA") and mode not in ("LA", "RGBA"):
        image = _on_white(image)
    return _to_mode(image, mode)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """PIL's conversion, with the step between that it lacks for some pairs."""
    if image.mode != mode and (image.mode == "LAB" or mode in ("HSV", "LAB")):
        image = image.convert("RGB")
    return image.convert(mode)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # neither holds of values that are not numbers
            raise PixelRangeError(
                f"a floating-point image with values from {low:g} to {high:g}, expected 0 to 1; "
                "store it with 8 or 16 bits"
            )
        scaled = np.rint(values * 255)
    else:
        white = _white(image)
        if low < 0 or high > white:
            raise PixelRangeError(
                f"a {'16' if white < 65535 else '32'}-bit image with values from {low} to {high}, "
                f"expected 0 to {white}; store it with 8 or 16 unsigned bits"
            )
        if white == 2**16 - 1 and 0 < high < 2**12:
            _tell_of_dark_images(int(high))
        scaled = (values.astype(np.uint32) * 255 + white // 2) // white
    grey = scaled.astype(np.uint8)
    if _tiff_tag(image, _TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # PIL inverts such images of 8 bits, and no others
        grey = 255 - grey
    return Image.fromarray(grey)


def _tell_of_dark_images(high: int) -> None:
    global _told_of_dark_images
    if not _told_of_dark_images:
        _told_of_dark_images = True
        _logger.warning(
            f"A 16-bit image has no value above {high}, and so none above {(high * 255 + 32767) // 65535} "
            "of 255 as it is read; images of fewer bits need scaling to 65535 to be seen. "
            "There may be more of them."
        )


def _white(image: Image.Image) -> int:
    """The largest value that an integer image could have."""
    bits = _tiff_tag(image, _TIFF_BITS)
    if image.mode == "I" and bits == 16:  # of TIFF files, only signed ones open in this mode
        return 2**15 - 1
    return 2**12 - 1 if bits == 12 else 2**16 - 1


def _tiff_tag(image: Any, tag: int) -> Any:
    value = image.tag_v2.get(tag) if image.format == "TIFF" else None
    return value[0] if isinstance(value, tuple) else value


def _palette_mode(image: Image.Image) -> str | None:
    return image.palette.mode if image.mode == "P" and image.palette is not None else None


def _on_white(image: Image.Image) -> Image.Image:
    """An image without its alpha channel, of ``L`` or ``RGB``; as it was, bit for bit, where nothing is transparent."""
    opaque = image.mode[:-1]
    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert(opaque)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert(opaque)
