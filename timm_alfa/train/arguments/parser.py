"""An argument parser whose mistakes are one line, and the flags of timm's that are recognised only to be refused."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from ...errors import UsageError


class ParseKeyValues(ParseKwargs):
    """timm's ``KEY=VALUE ...`` action, with an argument error where timm's fails with a traceback."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Check, then do what timm's does."""
        for value in values:
            if (value and not value.split("=", 1)[0].isidentifier()) or (value and "=" not in value):
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, found {value!r}")
        super().__call__(parser, namespace, values, option_string)


class TrainParser(argparse.ArgumentParser):
    """Raises ``UsageError`` instead of printing the usage, and names the nearest flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Raise ``UsageError``."""
        raise UsageError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with a guess for an unknown flag."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=", 1)[0], flags, n=3)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            raise UsageError(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed


class HelpFormatter(argparse.HelpFormatter):
    """Appends the default to a help sentence where there is one worth reading."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        uninformative = action.default is argparse.SUPPRESS or action.default in (None, False, "", [], {})
        if uninformative or not action.help or action.nargs == 0:
            return action.help
        return f"{action.help} (default: %(default)s)"


# flag, default, argparse type (bool: a switch), choices, number of values
_REFUSED: tuple[tuple[str, Any, type, Sequence[str] | None, str | None], ...] = (
    ("--torchscript", False, bool, None, None),
    ("--fuser", "", str, None, None),
    ("--aug-splits", 0, int, None, None),
    ("--jsd-loss", False, bool, None, None),
    ("--resplit", False, bool, None, None),
    ("--split-bn", False, bool, None, None),
    ("--naflex-loader", False, bool, None, None),
    ("--naflex-train-seq-lens", [128, 256, 576, 784, 1024], int, None, "+"),
    ("--naflex-max-seq-len", 576, int, None, None),
    ("--naflex-patch-sizes", None, int, None, "+"),
    ("--naflex-patch-size-probs", None, float, None, "+"),
    ("--naflex-loss-scale", "linear", str, ("none", "sqrt", "linear"), None),
    ("--naflex-patchify-channels-first", False, bool, None, None),
)


def add_refused_arguments(parser: argparse.ArgumentParser) -> None:
    """Add timm's flags that this script leaves out, hidden from --help.

    They keep their defaults, so that a configuration file that timm wrote is read without complaint.
    """
    group = parser.add_argument_group()
    for flag, default, kind, choices, nargs in _REFUSED:
        if kind is bool:
            group.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
        else:
            group.add_argument(flag, default=default, type=kind, choices=choices, nargs=nargs, help=argparse.SUPPRESS)


def check_refused(args: argparse.Namespace) -> None:
    """Raise ``UsageError`` for a flag that is set but not supported here."""
    for flag, default, *_ in _REFUSED:
        value = getattr(args, flag.lstrip("-").replace("-", "_"))
        if value != default:
            shown = flag if value is True else f"{flag} {value}"
            raise UsageError(
                f"{shown}: not supported by train_alfa.py; patches/ adds ALFA to timm's own train.py, which has it"
            )
