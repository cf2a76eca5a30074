"""timm's and torchvision's datasets of image files, converted by one function, saying which file cannot be used."""

from __future__ import annotations

import logging
import os
import struct
from functools import partial
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import Dataset

from ...errors import DataError
from ...utils.text import one_line
from .image_modes import PixelRangeError, convert_image

__all__ = ["NamedImageDataset", "TorchImages", "open_image"]

_logger = logging.getLogger(__name__)

# what PIL raises on damaged files, and opening on missing ones
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_MAX_CONSECUTIVE = int(os.environ.get("TIMM_DATASET_MAX_RETRIES") or 10)


class NamedImageDataset(ImageDataset):
    """A ``timm.data.ImageDataset`` of images as ``convert_image`` makes them, whose errors name the file.

    As in timm, an image that does not decode is replaced by the next one, and after ten in a row (or
    TIMM_DATASET_MAX_RETRIES) loading ends with a DataError. One whose values have no known range, or whose labels
    ``target_transform`` does not take, ends it at once.

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
            except PixelRangeError as error:
                raise DataError(f"{self._name(position)}: {error}") from error
            except _DECODE_ERRORS as error:
                problem = f"{self._name(position)} does not decode as an image ({one_line(error)})"
                _logger.warning(f"{problem}; the next image takes its place")
        else:
            raise DataError(f"{problem}, nor do the {_MAX_CONSECUTIVE - 1} before it")
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            try:
                target = self.target_transform(target)
            except (ValueError, TypeError) as error:
                raise DataError(f"{self._name(position)}: its labels are {target!r}: {one_line(error)}") from error
        return image, target, *features

    def _read(self, position: int) -> tuple[Any, ...]:
        file, target, *features = self.reader[position]
        with file:
            if self.load_bytes:
                return file.read(), target, *features
            image: Image.Image = Image.open(file)
            if self.input_img_mode:
                image = convert_image(image, self.input_img_mode)
            image.load()
        return image, target, *features

    def _name(self, position: int) -> str:
        return self.filename(position, absolute=True) or f"image {position}"  # which may have come without a path


class TorchImages(Dataset[tuple[Any, Any]]):
    """A torchvision dataset of images as ``convert_image`` makes them; by itself, it makes RGB or leaves them alone.

    Args:
        dataset: Without transforms. If it reads files by its attribute ``loader``, that is replaced.
        mode: PIL mode of the images.

    Attributes:
        reader: The dataset; its classes and labels are found there, as those of timm's datasets.
        transform: Applied to images; ``timm.data.create_loader`` sets it.
    """

    def __init__(self, dataset: Any, mode: str) -> None:
        if hasattr(dataset, "loader"):
            dataset.loader = partial(open_image, mode=mode)
        self.reader = dataset
        self.mode = mode
        self.transform: Any = None

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.reader[index]
        try:
            image = convert_image(image, self.mode)
        except PixelRangeError as error:
            raise DataError(f"image {index} of {type(self.reader).__name__}: {error}") from error
        return (image if self.transform is None else self.transform(image)), target

    def __len__(self) -> int:
        return len(self.reader)


def open_image(path: str, mode: str) -> Image.Image:
    """Read a file as ``convert_image`` makes it.

    Raises:
        DataError: Naming the file, if it does not decode or its values have no known range.
    """
    try:
        with open(path, "rb") as file:
            return convert_image(Image.open(file), mode)
    except PixelRangeError as error:
        raise DataError(f"{path}: {error}") from error
    except _DECODE_ERRORS as error:
        raise DataError(f"{path} does not decode as an image ({one_line(error)})") from error
