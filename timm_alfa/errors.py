"""The one error that a command line turns into a single line and exit code 2."""

from __future__ import annotations


class UsageError(ValueError):
    """What the user asked for cannot be done: a wrong flag, name, file or combination.

    The message is one line that names the flag (or file), the value found and what would be right.
    """


class BlockError(ValueError):
    """A block name that does not resolve, or a block that cannot be perturbed; the message says what would do."""
