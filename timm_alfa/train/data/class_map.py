"""``--class-map``: class names and their indices from a file, read so that no name is lost on the way."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from typing import Any

from timm.data.readers.class_map import load_class_map

from ...errors import UsageError
from ...utils.text import mistakes_in_one_line

__all__ = ["check_same_names", "read_class_map"]

_SHOWN = 3


def read_class_map(class_map: str, folder: str = "") -> dict[Any, int]:
    """Read a file of classes as timm does, and refuse what timm would take for other classes than were meant.

    Args:
        class_map: A ``.txt`` file of UTF-8, with or without a byte-order mark: one name per line, whose index is the
            line's number from 0. Or a ``.pkl`` file: a dict of names (of streams and Hugging Face datasets, or of the
            source's class indices) and indices from 0; several names can share an index.
        folder: Where the file is looked for if there is none of that path.

    Raises:
        UsageError: There is no such file, it is of another kind, or it has no names, one of them twice or an empty one.
    """
    path = class_map if os.path.exists(class_map) else os.path.join(folder, class_map)
    where = f"--class-map {class_map}"
    if not os.path.isfile(path):
        raise UsageError(f"{where}: no such file" + (f", nor in {folder}" if folder else ""))
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".txt", ".pkl"):
        raise UsageError(f"{where}: expected a .txt file with a class name per line, or a .pkl dict")
    if suffix == ".txt":
        return _number(where, _read_lines(where, path))
    with mistakes_in_one_line(where):
        found: dict[Any, Any] = load_class_map(path)
    if not found:
        raise UsageError(f"{where}: no class names in it")
    for name, index in found.items():
        if not isinstance(name, (str, int)) or name == "":
            raise UsageError(f"{where}: {name!r} is no class name, expected text, or a class index of the dataset")
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise UsageError(f"{where}: {name!r} has the index {index!r}, expected a whole number from 0")
    return found


def _read_lines(where: str, path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: cannot be read as UTF-8 text ({error})") from error
    while lines and not lines[-1]:
        del lines[-1]
    return lines


def _number(where: str, names: list[str]) -> dict[Any, int]:
    if not names:
        raise UsageError(f"{where}: no class names in it")
    numbered: dict[Any, int] = {}
    for index, name in enumerate(names):
        if not name:
            raise UsageError(f"{where}: line {index + 1} is empty, expected a class name on every line")
        if name in numbered:
            raise UsageError(
                f"{where}: {name!r} is on line {numbered[name] + 1} and on line {index + 1}, expected every name once"
            )
        numbered[name] = index
    return numbered


def check_same_names(what: str, first: tuple[str, Iterable[Any]], second: tuple[str, Iterable[Any]]) -> None:
    """Check that two lists of classes have the same names.

    Args:
        what: How the message starts: the flag, its value and what is wrong.
        first: Where the one list is from, such as ``in the map``, and its names.
        second: The same of the other.

    Raises:
        UsageError: Naming up to three classes of either that the other lacks.
    """
    lonely = set(first[1]) ^ set(second[1])
    if not lonely:
        return
    show = ascii if len({_plain(name) for name in lonely}) < len(lonely) else repr  # ascii where names look alike
    parts = []
    for place, own in (first, second):
        names = sorted(lonely.intersection(own), key=str)
        if names:
            shown = ", ".join(map(show, names[:_SHOWN]))
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{shown}{more} only {place}")
    raise UsageError(f"{what}: {'; '.join(parts)}; expected the same classes")


def _plain(name: Any) -> str:
    return "".join(unicodedata.normalize("NFKC", str(name)).split())
