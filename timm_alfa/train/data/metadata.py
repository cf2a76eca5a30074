"""``--task multilabel`` with a folder of images: labels in a ``metadata.csv`` or ``metadata.jsonl`` beside them.

Both are files that Hugging Face's ``imagefolder`` reads, so the same folder also works as ``--dataset hfds/FOLDER``.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from timm.data.readers.class_map import remap_target
from timm.data.readers.reader import Reader
from timm.data.readers.targets import get_field, has_field, multi_field_class_to_idx, multi_field_target

from ...errors import UsageError

__all__ = ["METADATA_FILES", "LabelledReader", "find_metadata"]

_logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"  # the column, or key, of an image's path


def find_metadata(where: str, folder: str) -> Path:
    """The file of labels in a split's folder.

    Args:
        where: The flag that names the split, and its value; errors start with it.
        folder: Of the split.

    Raises:
        UsageError: There is none, or there are both.
    """
    found = [path for path in (Path(folder, name) for name in METADATA_FILES) if path.is_file()]
    if len(found) != 1:
        names = " or ".join(METADATA_FILES)
        what = f"has both {names}" if found else f"has no {names}"
        raise UsageError(f"{where}: {folder} {what}; --task multilabel expects one, with a {FILE_NAME} for every image")
    return found[0]


class LabelledReader(Reader):
    """Images in the order of a file of labels, with their labels as timm's readers give them.

    Args:
        where: The flag that names the split, and its value; errors start with it.
        path: Of ``metadata.csv``, with a column ``file_name`` (relative to the file) and one column per label, in which
            numbers above 0 mean present. Or of ``metadata.jsonl``, with an object per line: ``file_name``, and either
            one field per label as above or one that lists class indices or holds a number per class.
        num_classes: How many labels there are.
        target_key: Names of the fields of labels, with commas between; without it, of a CSV file all other columns. One
            name alone is a field of lists.
        dense: Whether lists hold a number from 0 to 1 per class, in place of class indices.
        class_map: Names, or indices, in the lists -> index of the label.
        tell: Whether this process gives warnings.

    Attributes:
        class_to_idx: Label names -> their indices; empty where lists do not name them.
        labels: Per image: indices of its labels, or with ``dense`` a number per label.

    Raises:
        UsageError: A line cannot be used; it is named.
    """

    def __init__(
        self,
        where: str,
        path: Path,
        *,
        num_classes: int,
        target_key: str | None = None,
        dense: bool = False,
        class_map: Mapping[Any, int] | None = None,
        tell: bool = True,
    ) -> None:
        super().__init__()
        self.root = str(path.parent)
        self.class_to_idx: dict[Any, int] = dict(class_map or {})
        self.paths: list[str] = []
        self.labels: list[list[Any]] = []
        keys = [key.strip() for key in target_key.split(",")] if target_key else []
        columns = path.suffix == ".csv" or len(keys) > 1
        seen: set[str] = set()
        for line, row in _rows(where, path):
            at = f"{where}: {path.name}, line {line}"
            if not keys and path.suffix != ".csv":
                raise UsageError(f"{where}: --target-key is missing, expected one of {_fields(row)} in {path.name}")
            keys = keys or [name for name in row if name != FILE_NAME]
            if columns and not self.labels:
                self.class_to_idx = self._number(where, path, keys, num_classes, class_map)
            labels = (
                _of_columns(at, row, keys) if columns else _of_list(at, row, keys[0], num_classes, dense, class_map)
            )
            name = str(row.get(FILE_NAME) or "")
            file = os.path.normpath(os.path.join(self.root, name))
            if not name or not os.path.isfile(file):
                raise UsageError(f"{at}: {FILE_NAME} is {name!r}, which is no file in {self.root}")
            if file in seen:
                raise UsageError(f"{at}: {name!r} is there a second time")
            seen.add(file)
            self.paths.append(file)
            self.labels.append(labels)
        if not self.paths:
            raise UsageError(f"{where}: {path} has no lines with images")
        if tell:
            _tell_of_others(where, path, seen)

    @staticmethod
    def _number(
        where: str, path: Path, keys: list[str], num_classes: int, class_map: Mapping[Any, int] | None
    ) -> dict[str, int]:
        if class_map:
            raise UsageError(f"{where}: --class-map has no effect, {path.name} has a field per label")
        if len(keys) != num_classes:
            raise UsageError(
                f"--num-classes {num_classes}: {path.name} of {where} has {len(keys)} fields of labels "
                f"({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}); expected as many"
            )
        return multi_field_class_to_idx(keys)

    def __getitem__(self, index: int) -> tuple[BinaryIO, list[Any]]:
        return open(self.paths[index], "rb"), self.labels[index]

    def __len__(self) -> int:
        return len(self.paths)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.paths[index]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def _rows(where: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and what the lines hold."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                if FILE_NAME not in (reader.fieldnames or ()):
                    raise UsageError(f"{where}: {path.name} has no column {FILE_NAME} in its first line")
                for row in reader:
                    if None in row or None in row.values():
                        raise UsageError(f"{where}: {path.name}, line {reader.line_num}: has more or fewer columns")
                    yield reader.line_num, row
                return
            for number, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                row = json.loads(text)
                if not isinstance(row, dict):
                    raise UsageError(f"{where}: {path.name}, line {number}: expected an object, found {text.strip()!r}")
                yield number, row
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UsageError(f"{where}: {path} cannot be read: {error}") from error


def _of_columns(at: str, row: Mapping[str, Any], keys: Sequence[str]) -> list[int]:
    """Indices of the labels whose fields are above 0."""
    numbers = {}
    for key in keys:
        if not has_field(row, key):
            raise UsageError(f"{at}: has no field {key!r}, expected one of {_fields(row)}")
        numbers[key] = _number(at, key, get_field(row, key))
    return multi_field_target({key: numbers[key] for key in keys}, keys)


def _number(at: str, key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{at}: {key} is {value!r}, expected a number, above 0 for a label that is present")
    return number


def _of_list(
    at: str, row: Mapping[str, Any], key: str, num_classes: int, dense: bool, class_map: Mapping[Any, int] | None
) -> list[Any]:
    """A list of indices, or a number per class."""
    if not has_field(row, key):
        raise UsageError(f"{at}: has no field {key!r}, expected one of {_fields(row)}")
    found = get_field(row, key)
    if not isinstance(found, list):
        raise UsageError(f"{at}: {key} is {found!r}, expected a list; several fields are named with commas between")
    if class_map:
        try:
            found = remap_target(found, class_map, dense=dense)
        except (LookupError, ValueError, TypeError) as error:
            raise UsageError(f"{at}: {key} is {found!r}, which --class-map does not know: {error}") from error
    if dense:
        if len(found) != num_classes or not all(0 <= _number(at, key, value) <= 1 for value in found):
            raise UsageError(f"{at}: {key} is {found!r}, expected {num_classes} numbers from 0 to 1")
        return [float(value) for value in found]
    for value in found:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_classes:
            raise UsageError(
                f"{at}: {key} has {value!r}, expected class indices from 0 to {num_classes - 1} (--num-classes); a "
                "number per class is read with --target-format multihot"
            )
    return found


def _fields(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in row if name != FILE_NAME)


def _tell_of_others(where: str, path: Path, seen: set[str]) -> None:
    """Warn of files of the same kinds that no line names."""
    endings = {os.path.splitext(file)[1].lower() for file in seen}
    others = [
        os.path.join(root, name)
        for root, _, names in os.walk(path.parent, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in endings
    ]
    lost = [file for file in others if os.path.normpath(file) not in seen]
    if lost:
        _logger.warning(f"{where}: {len(lost)} images are not in {path.name} and not read, such as {min(lost)}")
