"""What ends a command early: errors that become one line (mistakes, exit code 2; bad numbers, 1), or a lost reader."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


class UsageError(ValueError):
    """What the user asked for cannot be done: a wrong flag, name, file or combination.

    The message is one line that names the flag (or file), the value found and what would be right.
    """


class DataError(RuntimeError):
    """The training data cannot be read; the message's last line names the file."""


class NonFiniteError(ArithmeticError):
    """Training met a number that is infinite or not a number; the message says which, when, and on what rank."""


class BlockError(ValueError):
    """A block name that does not resolve, or a block that cannot be perturbed; the message says what would do."""


def data_problem(error: DataError) -> str:
    """The line of a DataError that is its message; a loader's worker process puts its traceback before it."""
    return str(error).splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")


def end_without_reader() -> NoReturn:
    """End a command whose output nobody reads any more (``| head``); Python would complain once more at exit.

    Raises:
        SystemExit: 1.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
