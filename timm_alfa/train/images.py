"""timm's datasets of images, saying which file it is that does not decode, and the one way from a file to a mode.

Modes of 8 bits are converted as Pillow does it, which is what timm does: palettes and CMYK become their colours, and
parts that are transparent keep the colour that the file stores for them. Pillow cuts wider ones off at 255, so that
16-bit images become white; here they are scaled by their range.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from timm.data import ImageDataset, IterableImageDataset
from torch.utils.data import get_worker_info

from ..errors import DataError
from .text import one_line

__all__ = ["NamedImageDataset", "NamedStream", "RangeError", "load_image", "to_mode"]

_logger = logging.getLogger(__name__)

# what PIL raises on damaged files, and opening on missing ones
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_MAX_CONSECUTIVE = int(os.environ.get("TIMM_DATASET_MAX_RETRIES") or 10)


class NamedImageDataset(ImageDataset):
    """A ``timm.data.ImageDataset`` whose warnings and errors about images that do not decode name the file.

    As in timm, such an image is replaced by the next one, and after ten in a row (or TIMM_DATASET_MAX_RETRIES) loading
    ends with a DataError.

    Args:
        dataset: The dataset to read as; its reader, mode and transforms are taken over.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(
            root=None,
            reader=dataset.reader,
            load_bytes=dataset.load_bytes,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
            additional_features=dataset.additional_features,
        )

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        for attempt in range(_MAX_CONSECUTIVE):
            position = (index + attempt) % len(self.reader)
            try:
                image, target, *features = self._read(position)
                break
            except _DECODE_ERRORS as error:
                problem = f"{self.filename(position, absolute=True)} does not decode as an image ({one_line(error)})"
                _logger.warning(f"{problem}; the next image takes its place")
        else:
            raise DataError(f"{problem}, nor do the {_MAX_CONSECUTIVE - 1} before it")
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return image, target, *features

    def _read(self, position: int) -> tuple[Any, ...]:
        file, target, *features = self.reader[position]
        with file:
            if self.load_bytes:
                return file.read(), target, *features
            image: Image.Image = Image.open(file)
            try:
                image = to_mode(image, self.input_img_mode)
            except RangeError as error:
                raise DataError(f"{self.filename(position, absolute=True)}: {error}") from None
            image.load()
        return image, target, *features


class NamedStream(IterableImageDataset):
    """A ``timm.data.IterableImageDataset`` that says what is wrong with its samples, where timm would fail later.

    Args:
        dataset: The stream to read as; its reader and transforms are taken over.
        what: What errors call it: the flag of the split and its value.
        outputs: Number of the model's outputs, or None.
    """

    def __init__(self, dataset: IterableImageDataset, what: str, outputs: int | None) -> None:
        super().__init__(
            root=None, reader=dataset.reader, transform=dataset.transform, target_transform=dataset.target_transform
        )
        self.what = what
        self.outputs = outputs
        self.mode: str = getattr(dataset.reader, "input_img_mode", "RGB")
        if hasattr(dataset.reader, "input_img_mode"):
            dataset.reader.input_img_mode = ""  # converted here

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        count = 0
        try:
            for image, target in self.reader:
                count += 1
                if isinstance(target, int) and self.outputs is not None and target >= self.outputs:
                    raise DataError(
                        f"{self.what}: a sample of class {target}, but the model has {self.outputs} outputs; expected "
                        f"--num-classes {target + 1} or more"
                    )
                if isinstance(image, Image.Image):
                    image = to_mode(image, self.mode)
                image = image if self.transform is None else self.transform(image)
                yield image, target if self.target_transform is None else self.target_transform(target)
        except RangeError as error:
            raise DataError(f"{self.what}: sample {count}: {error}") from None
        except KeyError as error:
            raise DataError(f"{self.what}: {error} is a class or key that --class-map or the samples do not have; "
                            "expected --class-map, --input-key and --target-key that fit the stream") from error
        except (TypeError, ValueError) as error:  # timm's reader gives up on keys that samples do not have
            raise DataError(f"{self.what}: sample {count + 1} cannot be read ({one_line(error)})") from error
        if not count and not self._is_spare_worker():
            keys = getattr(self.reader, "input_key", "")
            raise DataError(f"{self.what}: no sample in the stream; expected shards that exist, and samples with "
                            f"{keys or 'images'} (--input-key) and their labels (--target-key)")

    def _is_spare_worker(self) -> bool:
        """Whether other workers may have all of the shards."""
        return get_worker_info() is not None and getattr(self.reader, "global_num_workers", 1) > 1


def load_image(path: str, mode: str) -> Image.Image:
    """The image of a file, for torchvision's folder datasets.

    Raises:
        DataError: Its range of values is not known.
    """
    with open(path, "rb") as file:
        image = Image.open(file)
        try:
            return to_mode(image, mode)
        except RangeError as error:
            raise DataError(f"{path}: {error}") from None


def to_mode(image: Image.Image, mode: str | None) -> Image.Image:
    """The image in a mode, such as ``RGB`` or ``L``.

    16-bit values are scaled from 0..65535 to 0..255, floating-point ones from 0..1. Integers of 32 bits are what Pillow
    makes of some 16-bit files, and are taken as such where they fit.

    Args:
        image: As opened.
        mode: Of 8 bits per channel, or empty to leave the image as it is.

    Raises:
        RangeError: Values of 32 bits that are in no such range.
    """
    if not mode:
        return image
    if mode in _EIGHT_BITS and image.mode in _WIDE:
        image = _eight_bits(image)
    elif image.mode == "P" and "transparency" in image.info and mode in ("RGB", "L"):
        image = image.convert("RGBA").convert("RGB")  # the same colours, without Pillow's warning
    elif image.mode in ("LAB", "PA", "La", "RGBa") and mode in _EIGHT_BITS:
        image = _through_another_mode(image)
    return image.convert(mode)


class RangeError(Exception):
    """Nothing says what the values of an image mean."""


_EIGHT_BITS = ("L", "RGB", "RGBA", "LA")
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind != "f":
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise RangeError(f"32-bit integers from {low} to {high}, whose range is not known; expected 8 or 16 bits")
        return Image.fromarray(np.round(values.astype(np.float64) * (255 / 65535)).astype(np.uint8))
    least, most = float(values.min()), float(values.max())
    if not (least >= 0 and most <= 1):
        raise RangeError(f"floating-point values from {least:g} to {most:g}, whose range is not known; expected 0 to 1")
    return Image.fromarray(np.round(values.astype(np.float64) * 255).astype(np.uint8))


def _through_another_mode(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None  # it is not done in place
        return converted
    return image.convert({"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}[image.mode])
