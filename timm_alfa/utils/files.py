"""Files that are either the old one or the whole new one, whenever the power goes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["duplicate_file", "replace_file", "write_file"]


def write_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let ``write(file)`` fill a temporary file beside ``path``, force it to the disk, then put it in the file's place.

    Raises:
        Whatever ``write`` raises, or OSError (disk full, folder gone). The file is then as it was, the temporary one
            gone.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rename ``source``, already on the disk, to ``target`` in one step; the rename is forced to the disk too."""
    os.replace(source, target)
    _sync_folder(Path(target).parent)


def duplicate_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Make ``target`` a second name of ``source`` (a hard link), or a copy where the file system has no hard links."""
    source, target = Path(source), Path(target)
    if target.exists() and target.samefile(source):
        return  # a rename onto another name of the same file would leave both
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except (OSError, NotImplementedError):
        with open(source, "rb") as original:
            write_file(target, lambda file: shutil.copyfileobj(original, file))
        return
    replace_file(temporary, target)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened, and a rename needs no flush of its own
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
