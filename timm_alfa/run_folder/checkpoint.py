"""Reading a training checkpoint that may be damaged, something else altogether, or made to do harm."""

from __future__ import annotations

import argparse
import os
import zipfile
from typing import Any

import torch

from ..errors import UsageError

__all__ = ["read_checkpoint", "recorded_label_names"]


def read_checkpoint(path: str | os.PathLike[str], flag: str = "--resume") -> dict[str, Any]:
    """Read a training checkpoint onto the CPU without running any code that it may hold.

    Args:
        path: The file.
        flag: How the user named the file; errors start with it.

    Returns:
        The checkpoint's dict; ``state_dict`` in it is a dict of tensors.

    Raises:
        UsageError: The file is missing, truncated or damaged (checksums are compared), holds Python objects other than
            tensors, plain values and the arguments of a run, or is no training checkpoint.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{flag} {path}: no such file, expected a checkpoint such as last.pth.tar")
    expected = "expected a checkpoint of a training run, such as last.pth.tar"
    try:
        # torch.load does not compare checksums
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise UsageError(f"{flag} {path}: damaged (wrong checksum of {damaged}), {expected}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # a damaged file can make the readers raise nearly anything
        foreign = _foreign_globals(path)
        if foreign:
            raise UsageError(f"{flag} {path}: not loaded, it holds Python objects ({foreign}); {expected}") from error
        raise UsageError(f"{flag} {path}: truncated, damaged or no checkpoint at all; {expected}") from error
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UsageError(f"{flag} {path}: no 'state_dict' in it, {expected}; for weights alone: --initial-checkpoint")
    return checkpoint


def recorded_label_names(checkpoint: dict[str, Any]) -> list[str] | dict[int, str] | None:
    """The class names that a training checkpoint holds: in order, or by index; empty where the data did not name them.

    None where it does not say, as those of timm, or says something else.

    Args:
        checkpoint: What a checkpoint, or a ``config.json``, holds.
    """
    names = checkpoint.get("label_names")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    if isinstance(names, dict) and all(str(key).isdecimal() and isinstance(name, str) for key, name in names.items()):
        return {int(index): name for index, name in names.items()}
    return None


def _foreign_globals(path: str | os.PathLike[str]) -> str:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path)))
    except Exception:  # it reads zip files only, and undamaged ones
        return ""
