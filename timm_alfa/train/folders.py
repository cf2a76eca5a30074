"""Images in folders and .tar files by class, as timm reads them, with a word about everything that is not read."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from timm.data import get_img_extensions
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key

from ..errors import UsageError
from .class_map import ClassMap, some

__all__ = ["FolderReader", "image_extensions", "is_hidden", "label_tar"]

_logger = logging.getLogger(__name__)


def is_hidden(parts: Iterable[str]) -> bool:
    """Whether a path below a split's folder has a part that systems hide: ``.git``, ``._cat.jpg``, ``__MACOSX``."""
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in parts)


def image_extensions(input_key: str | None) -> set[str]:
    """The extensions of files that are read, in lower case; ``--input-key`` lists them as ``.jpg;.webp``."""
    if not input_key:
        return set(get_img_extensions(as_set=True))
    return {extension.strip().lower() for extension in input_key.split(";") if extension.strip()}


class FolderReader(ReaderImageFolder):
    """timm's reader of a folder of class folders: same images, same order, same indices.

    Hidden files and folders are not read. A warning counts the files that are left out, by extension, and names class
    folders without images and folders that share one name and so are one class.

    Args:
        root: Folder of a split.
        split: What errors and warnings call it, such as ``--train-split train``.
        class_map: Indices by name; None numbers the classes by name.
        class_map_file: What errors call it.
        extensions: Of the files that are images, in lower case.

    Attributes:
        present: Names of the classes that have images.

    Raises:
        UsageError: No images, images outside of class folders, or classes that the class map does not have.
    """

    def __init__(
            self,
            root: str,
            split: str,
            *,
            class_map: ClassMap | None = None,
            class_map_file: str = "",
            extensions: set[str] | None = None,
    ) -> None:
        Reader.__init__(self)
        self.root = root
        extensions = image_extensions(None) if extensions is None else extensions
        files: list[str] = []
        folders: list[tuple[str, ...]] = []
        skipped: Counter[str] = Counter()
        hidden: Counter[str] = Counter()
        empty: list[str] = []
        for place, subfolders, names in os.walk(root, topdown=False, followlinks=True):
            parts = PurePath(os.path.relpath(place, root)).parts
            found = 0
            for name in names:
                extension = os.path.splitext(name)[1].lower()
                if is_hidden((*parts, name)):
                    hidden[next(part for part in (*parts, name) if is_hidden([part]))] += extension in extensions
                elif extension in extensions:
                    found += 1
                    files.append(os.path.join(place, name))
                    folders.append(parts)
                else:
                    skipped[extension or "without extension"] += 1
            if parts and not found and not is_hidden(parts) and all(is_hidden([name]) for name in subfolders):
                empty.append(os.path.join(*parts))
        _warn(split, extensions, skipped=skipped, hidden=+hidden, empty=empty)
        targets, self.class_to_idx = _number(files, folders, split, root, class_map, class_map_file)
        self.present = {parts[-1] for parts in folders}
        self.samples = sorted(zip(files, targets, strict=True), key=lambda sample: natural_key(sample[0]))


def label_tar(reader: Any, split: str, *, class_map: ClassMap | None = None, class_map_file: str = "") -> None:
    """Take hidden files out of timm's reader of a .tar file, and number the classes of the rest anew.

    Args:
        reader: A ``ReaderImageInTar`` without a class map; it is changed.
        split: As for ``FolderReader``, and so are the others.

    Raises:
        UsageError: As for ``FolderReader``.
    """
    kept: list[int] = []
    files: list[str] = []
    folders: list[tuple[str, ...]] = []
    hidden: Counter[str] = Counter()
    for position, (info, _, inner) in enumerate(reader.samples):
        path = PurePath(info.path)
        parts = tuple(part for part in path.parent.parts if part != os.sep)
        if inner is not None:
            parts = (PurePath(inner.path).stem, *parts)
        if is_hidden((*parts, path.name)):
            hidden[next(part for part in (*parts, path.name) if is_hidden([part]))] += 1
            continue
        kept.append(position)
        files.append(info.path)
        folders.append(parts)
    _warn(split, set(), skipped=Counter(), hidden=hidden, empty=[])
    targets, reader.class_name_to_idx = _number(files, folders, split, reader.root, class_map, class_map_file)
    reader.present = {parts[-1] for parts in folders}
    reader.class_idx_to_name = {index: name for name, index in reader.class_name_to_idx.items()}
    reader.samples, reader.targets = reader.samples[kept], np.array(targets)


def _number(
        files: Sequence[str],
        folders: Sequence[tuple[str, ...]],
        split: str,
        root: str,
        class_map: ClassMap | None,
        class_map_file: str,
) -> tuple[list[int], ClassMap]:
    """Class indices of files, and of names: a class is the last folder's name."""
    if not files:
        raise UsageError(f"{split}: no images in {root}")
    outside = [os.path.basename(file) for file, parts in zip(files, folders, strict=True) if not parts]
    if len(outside) == len(files):
        raise UsageError(f"{split}: images but no class folders in {root}, expected a folder per class")
    if outside:
        raise UsageError(f"{split}: {len(outside)} images outside of class folders in {root} ({some(sorted(outside))})")
    by_name: dict[str, set[tuple[str, ...]]] = {}
    for parts in folders:
        by_name.setdefault(parts[-1], set()).add(parts)
    for name, places in by_name.items():
        if len(places) > 1:
            paths = some(sorted(os.path.join(*parts) for parts in places))
            _logger.warning(f"{split}: folders of one name are one class, '{name}': {paths}")
    unmapped = [] if class_map is None else [repr(name) for name in sorted(by_name) if name not in class_map]
    if unmapped:
        raise UsageError(f"--class-map {class_map_file}: has no {some(unmapped)}, of which {split} has images; "
                         "expected every class folder's name")
    classes = class_map or {name: index for index, name in enumerate(sorted(by_name, key=natural_key))}
    return [classes[parts[-1]] for parts in folders], classes


def _warn(split: str, extensions: set[str], *, skipped: Counter[str], hidden: Counter[str], empty: list[str]) -> None:
    if skipped:
        counts = ", ".join(f"{count:,} {extension}" for extension, count in skipped.most_common())
        _logger.warning(f"{split}: {skipped.total():,} files are not read ({counts}), "
                        f"only {', '.join(sorted(extensions))}; --input-key lists others")
    if hidden:
        _logger.warning(f"{split}: {hidden.total():,} hidden images are not read ({some(sorted(hidden))})")
    if empty:
        _logger.warning(f"{split}: {len(empty)} folders without images are no classes ({some(sorted(empty))})")
