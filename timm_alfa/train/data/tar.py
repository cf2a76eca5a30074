"""A .tar file of images as timm reads it, but for hidden files."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from typing import Any

import numpy as np
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from ...errors import UsageError
from .class_map import check_same_names
from .folder import NO_ENDING, Listing, check_listing, image_types, is_hidden, number_classes

__all__ = ["TarReader"]


class TarReader(ReaderImageInTar):
    """timm's reader of a .tar file, without the hidden files in it.

    Args:
        where: How the user named it.
        root: The .tar file.
        class_map: Index of every class; None numbers them in timm's order.
        tell: Whether this process gives warnings.

    Raises:
        UsageError: The file is damaged or has no images, some lie outside of folders, or its classes are not those of
            ``class_map``.
    """

    def __init__(self, where: str, root: str, class_map: dict[Any, int] | None = None, *, tell: bool = True) -> None:
        try:
            super().__init__(root)
            skipped = _other_files(root)
        except tarfile.TarError as error:
            raise UsageError(f"{where}: {root} cannot be read as a .tar file ({error})") from error
        except ValueError as error:  # timm unpacks an empty list
            raise UsageError(f"{where}: no images in {root}") from error
        labels = [self.class_idx_to_name[target] for target in self.targets]
        paths = [(sample[0].path, label) for sample, label in zip(self.samples, labels, strict=True)]
        seen = np.array([not any(map(is_hidden, path.removeprefix("./").split("/"))) for path, _ in paths])
        hidden = [path for (path, _), is_seen in zip(paths, seen, strict=True) if not is_seen]
        images = [found for found, is_seen in zip(paths, seen, strict=True) if is_seen]
        listing = Listing([(path, "" if label == "." else label) for path, label in images], skipped, hidden)
        check_listing(where, root, listing, tell=tell)
        names = [label for _, label in images]
        if class_map is not None:
            check_same_names(
                f"--class-map: not the class folders of {where}", ("in the map", class_map), ("in the file", names)
            )
        self.samples = self.samples[seen]
        self.class_name_to_idx = number_classes(names) if class_map is None else class_map
        self.class_idx_to_name = {index: name for name, index in self.class_name_to_idx.items()}
        self.targets = np.array([self.class_name_to_idx[name] for name in names])


def _other_files(root: str) -> Counter[str]:
    types = image_types(None) | {".tar"}
    with tarfile.open(root, mode="r:") as archive:  # headers alone
        names = [os.path.basename(item.name) for item in archive if item.isfile()]
    endings = (os.path.splitext(name)[1].lower() or NO_ENDING for name in names if not is_hidden(name))
    return Counter(ending for ending in endings if ending not in types)
