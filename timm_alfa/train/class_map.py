"""``--class-map``: a file of class names, read so that no name in it is lost or doubled without a word."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from timm.data.readers.class_map import load_class_map

from ..errors import UsageError
from .text import one_line

__all__ = ["ClassMap", "class_names", "read_class_map", "some"]

ClassMap = dict[Any, int]


def read_class_map(path: str, root: str | None = None) -> ClassMap:
    """Read a class map as timm does: a .txt file with a name per line, or a .pkl file of a dict from names to indices.

    In a text file line ends of any system, spaces around names, a byte-order mark and empty last lines mean nothing.

    Args:
        path: The file, by itself or in ``root``.
        root: Folder of a split.

    Returns:
        Class indices by name.

    Raises:
        UsageError: There is no such file, or it has an empty line, a name twice, no name, or an index below 0.
    """
    inside = os.path.join(root or "", path)
    found = next((place for place in (path, inside) if os.path.isfile(place)), None)
    if found is None:
        raise UsageError(f"--class-map {path}: no such file" + (f", nor in {root}" if root else ""))
    extension = os.path.splitext(path)[1].lower()
    if extension not in (".txt", ".pkl"):
        raise UsageError(f"--class-map {path}: expected a .txt file with a class name per line, or a .pkl dict")
    classes = _read_lines(path, found) if extension == ".txt" else _read_dict(path, found)
    if not classes:
        raise UsageError(f"--class-map {path}: empty, expected a class name per line")
    return classes


def _read_lines(path: str, found: str) -> ClassMap:
    try:
        with open(found, encoding="utf-8-sig") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--class-map {path}: cannot be read as UTF-8 text ({one_line(error)})") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    classes: ClassMap = {}
    for number, name in enumerate(names):
        if not name:
            raise UsageError(f"--class-map {path}: line {number + 1} is empty, expected a class name in every line")
        if name in classes:
            raise UsageError(f"--class-map {path}: '{name}' twice, in lines {classes[name] + 1} and {number + 1}")
        classes[name] = number
    return classes


def _read_dict(path: str, found: str) -> ClassMap:
    try:
        classes: ClassMap = load_class_map(found)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UsageError(f"--class-map {path}: not a .pkl file of a dict ({one_line(error)})") from error
    for name, index in classes.items():
        if not isinstance(name, (str, int)) or name == "" or type(index) is not int or index < 0:
            raise UsageError(f"--class-map {path}: {name!r}: {index!r}, expected class names and indices from 0")
    return classes


def class_names(classes: ClassMap, outputs: int | None = None) -> list[str] | dict[int, str] | None:
    """What each output of a model means, as timm's ``label_names`` has it.

    Args:
        classes: Indices by name; names of one index are joined by a comma.
        outputs: Number of outputs; names beyond it are left out.

    Returns:
        A list by index; a dict where the indices have gaps; None where the classes have no names.
    """
    names: dict[int, str] = {}
    for name, index in classes.items():
        if not isinstance(name, str):
            return None
        if outputs is None or index < outputs:
            names[index] = f"{names[index]}, {name}" if index in names else name
    ordered = dict(sorted(names.items()))
    return (list(ordered.values()) if list(ordered) == list(range(len(ordered))) else ordered) or None


def some(items: Collection[str], separator: str = ", ", most: int = 3) -> str:
    """The first few of ``items`` in words."""
    shown = separator.join(list(items)[:most])
    return shown + (f"{separator}{len(items) - most} more" if len(items) > most else "")
