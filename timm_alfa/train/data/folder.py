"""Folders of images as timm reads them, but for hidden files, and what else lies in them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from timm.data import get_img_extensions
from timm.data.readers.reader import Reader
from timm.utils import natural_key

from ...errors import UsageError

__all__ = [
    "NO_ENDING",
    "FolderReader",
    "Listing",
    "check_listing",
    "image_types",
    "is_hidden",
    "list_images",
    "number_classes",
]

_logger = logging.getLogger(__name__)

# what macOS and Synology's systems add to archives and folders, beside names that start with a dot
_HIDDEN = ("__MACOSX", "@eaDir")
NO_ENDING = "without an ending"
_SHOWN = 3


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's images or classes: ``.git``, ``._cat.jpg``, ..."""
    return name.startswith(".") or name in _HIDDEN


def image_types(input_key: str | None) -> set[str]:
    """Endings of the files that are images: timm's, or those of ``--input-key '.tif;.png'``; in lower case."""
    if not input_key:
        return set(get_img_extensions(as_set=True))
    return {"." + part.strip().lstrip(".").lower() for part in input_key.split(";") if part.strip()}


@dataclass
class Listing:
    """What lies in a folder of classes.

    Attributes:
        images: Path and class of every image, in the order in which they are found.
        skipped: How many files there are of each other ending.
        hidden: Images that are hidden, or in hidden folders.
        empty: Folders of classes that have no images, relative to the folder.
    """

    images: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)


def list_images(folder: str, types: set[str]) -> Listing:
    """List a folder and all folders in it. As in timm, the class of an image is the name of the folder it lies in.

    Args:
        folder: Its own images get the class ''.
        types: Endings of image files, in lower case.
    """
    listing = Listing()
    with_images: set[str] = set()  # folders with images in them or beneath
    direct: set[str] = {folder}
    empty: list[str] = []
    for root, subfolders, files in os.walk(folder, topdown=False, followlinks=True):  # in timm's order
        parts = os.path.relpath(root, folder).split(os.sep) if root != folder else []
        in_hidden = any(is_hidden(part) for part in parts)
        label = parts[-1] if parts else ""
        count = len(listing.images)
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if ending not in types:
                if not in_hidden and not is_hidden(name):
                    listing.skipped[ending or NO_ENDING] += 1
            elif in_hidden or is_hidden(name):
                listing.hidden.append(os.path.join(root, name))
            else:
                listing.images.append((os.path.join(root, name), label))
        if len(listing.images) > count:
            direct.add(root)
            with_images.add(root)
        if with_images.intersection(os.path.join(root, name) for name in subfolders):
            with_images.add(root)
        elif root not in with_images and parts and not in_hidden:
            empty.append(root)
    bare, has_direct = set(empty), direct - {folder}
    listing.empty = sorted(
        os.path.relpath(path, folder)
        for path in empty
        # of empty folders in an empty one the outermost is told; in a class's folder they are no classes
        if os.path.dirname(path) not in bare and os.path.dirname(path) not in has_direct
    )
    return listing


def check_listing(where: str, folder: str, listing: Listing, *, remedy: str = "", tell: bool = True) -> None:
    """Refuse folders in which images have no class or classes no images, and warn of files that are left out.

    Args:
        where: The flag and its value.
        folder: What was listed.
        listing: What lies there.
        remedy: How files of other endings could be read.
        tell: Whether this process gives warnings.

    Raises:
        UsageError: There are no images, images outside of the folders of classes, or such folders without images.
    """
    if not listing.images:
        raise UsageError(f"{where}: no images in {folder}{_others(listing, remedy)}")
    outside = [path for path, label in listing.images if not label]
    if len(outside) == len(listing.images):
        raise UsageError(f"{where}: {folder} has images but no class folders, expected a folder per class")
    if outside:
        raise UsageError(
            f"{where}: {len(outside)} images lie in {folder} itself, such as "
            f"{os.path.basename(outside[0])}; expected all of them in the folders of classes"
        )
    if listing.empty:
        shown = ", ".join(map(repr, listing.empty[:_SHOWN]))
        more = f" and {len(listing.empty) - _SHOWN} more" if len(listing.empty) > _SHOWN else ""
        raise UsageError(
            f"{where}: no images in the class folders {shown}{more} of {folder}"
            f"{_others(listing, remedy)}; fill or remove them"
        )
    if tell and listing.skipped:
        _logger.warning(f"{where}: not all files are read{_others(listing, remedy)}")
    if tell and listing.hidden:
        _logger.warning(f"{where}: {len(listing.hidden)} hidden images are not read, such as {min(listing.hidden)}")


def _others(listing: Listing, remedy: str) -> str:
    kinds = sorted(listing.skipped.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{count} {ending}" for ending, count in kinds[:5]) + (", ..." if len(kinds) > 5 else "")
    return f" (not as images: {shown}{remedy and '; '}{remedy})" if kinds else ""


class FolderReader(Reader):
    """timm's ``ReaderImageFolder`` over a listing: the same images in the same order, numbered alike.

    Args:
        root: The folder of the split.
        images: Path and class of every image.
        class_to_idx: Index of every class; None numbers them in timm's order.
    """

    def __init__(self, root: str, images: list[tuple[str, str]], class_to_idx: dict[Any, int] | None = None) -> None:
        super().__init__()
        self.root = root
        self.class_to_idx = number_classes(label for _, label in images) if class_to_idx is None else class_to_idx
        self.samples = sorted(
            ((path, self.class_to_idx[label]) for path, label in images), key=lambda sample: natural_key(sample[0])
        )

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        return open(path, "rb"), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def number_classes(names: Iterable[str]) -> dict[Any, int]:
    """Number class names as timm does: numbers in them count by their value."""
    return {name: index for index, name in enumerate(sorted(set(names), key=natural_key))}
