"""timm's folder dataset, saying which file it is that does not decode."""

from __future__ import annotations

import logging
import os
import struct
from typing import Any

from PIL import Image
from timm.data import ImageDataset

from ..errors import DataError
from .text import one_line

__all__ = ["NamedImageDataset"]

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
            if self.input_img_mode:
                image = image.convert(self.input_img_mode)
            image.load()
        return image, target, *features
