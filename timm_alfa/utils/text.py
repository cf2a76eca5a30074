"""Other people's error messages, made fit for a one-line error of ours."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UsageError


def one_line(error: BaseException) -> str:
    """Return the message of ``error`` without line breaks, 300 characters at most; its class if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


@contextmanager
def mistakes_in_one_line(what: str) -> Iterator[None]:
    """Turn what timm and the dataset packages raise about wrong names and values into one line that says where."""
    try:
        yield
    except UsageError:
        raise
    except (
        AssertionError, AttributeError, EOFError, ImportError, LookupError, OSError, RuntimeError, TypeError,
        ValueError, pickle.PickleError,
    ) as error:  # fmt: skip
        lines = str(error).strip().splitlines()
        raise UsageError(f"{what.strip()}: {lines[0] if lines else type(error).__name__}") from error
