"""Flags as data: a method lists its flags; parser, checks, arguments of its task and documentation follow from that."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..sizes import Relative, describe_size, parse_size


@dataclass(frozen=True)
class Flag:
    """One flag of a method.

    Args:
        name: As an attribute, ``advprop_eps``.
        default: What leaving it out means. The parser's default is None (False for switches), so that a flag without
            effect is noticed.
        help: For ``--help``, without the default.
        type: Turns text into the value; ``bool`` makes a switch.
        choices: The only values, if there are few.
        nargs: As for argparse.
        expected: What a right value is, for the error; with ``valid``.
        valid: Whether a value is right.
        group: Title in ``--help``; empty for the method's own.
        only_with: A switch without which the flag has no effect.
        argument: Of the method's task, which takes the value; empty if it is not passed on as it is.
        source: Where the paper has it, such as ``alpha in Eq. 4``.
    """

    name: str
    default: Any
    help: str
    type: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None
    nargs: str | None = None
    expected: str = ""
    valid: Callable[[Any], bool] = lambda value: True
    group: str = ""
    only_with: str = ""
    argument: str = ""
    source: str = ""

    def text(self, value: Any) -> str:
        """A value as one would type it."""
        if value is None:
            return "none"
        if isinstance(value, (list, tuple)):
            return " ".join(map(str, value))
        if self.type is size and not isinstance(value, str):
            return describe_size(value)
        return f"{value:.4g}" if self.type is number else str(value)


def number(text: str) -> float:
    """A number or a fraction such as 0.5/255."""
    numerator, slash, denominator = str(text).partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 0.5/255, found {text!r}") from None
    return value


def size(text: str) -> float | str:
    """A number or fraction, or a share of the feature such as 2%, which stays text."""
    if "%" not in str(text):
        return number(text)
    try:
        return str(parse_size(str(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def flag_name(name: str) -> str:
    """``alfa_steps`` -> ``--alfa-steps``."""
    return "--" + name.replace("_", "-")


def at_least_zero(value: float) -> bool:
    """Finite and not negative."""
    return math.isfinite(value) and value >= 0


def above_zero(value: float) -> bool:
    """Finite and positive."""
    return math.isfinite(value) and value > 0


def at_least_one(value: int) -> bool:
    """1, 2, ..."""
    return value >= 1


def is_size_of_at_least_zero(value: float | str) -> bool:
    """A finite number that is not negative, or a share."""
    return isinstance(value, str) or at_least_zero(value)


def is_size_above_zero(value: float | str) -> bool:
    """A finite number that is positive, or such a share."""
    return parse_size(value) != Relative(0) if isinstance(value, str) else above_zero(value)


def spell_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The words of a command line that gives ``args`` their values, those that are not the defaults.

    Args:
        parser: Knows the flags; positional arguments are left out.
        args: Values as the parser, or a configuration file, gave them.
    """
    words: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest, action.default)
        if not action.option_strings or value == action.default or value is None:
            continue
        flag = action.option_strings[-1]
        if action.nargs == 0 and isinstance(value, bool):  # a switch; its opposite is the default
            words.append(flag)
        elif isinstance(value, dict):
            words += [flag, *(f"{name}={item}" for name, item in value.items())]
        elif action.nargs not in (None, "?", 0):
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
        else:
            words.append(f"{flag}={value}")
    return words


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Sequence[Flag]) -> None:
    """Add a method's flags to a parser, in groups of their own."""
    groups: dict[str, Any] = {}
    for flag in flags:
        name = flag.group or title
        group = groups[name] if name in groups else groups.setdefault(name, parser.add_argument_group(name))
        if flag.type is bool:
            group.add_argument(flag_name(flag.name), action="store_true", default=False, help=flag.help)
            continue
        group.add_argument(
            flag_name(flag.name),
            default=None,
            type=flag.type,
            choices=flag.choices,
            nargs=flag.nargs,
            metavar=None if flag.choices else flag.name.rpartition("_")[2].upper(),
            help=f"{flag.help} (default: {flag.text(flag.default)})",
        )


def refuse_flags(args: argparse.Namespace, flags: Sequence[Flag], needed: str) -> None:
    """Raise ``UsageError`` for a flag that was given though its method is off.

    Args:
        args: The command line.
        flags: The method's.
        needed: What would give them an effect, such as ``--method advprop``.
    """
    for flag in flags:
        value = getattr(args, flag.name)
        if value is not None and value is not False:
            raise UsageError(f"{flag_text(flag.name, value)}: has no effect without {needed}")


def fill_flags(args: argparse.Namespace, flags: Sequence[Flag]) -> None:
    """Put the defaults in, then raise ``UsageError`` for the first value that cannot be, or has no effect."""
    for flag in flags:
        value = getattr(args, flag.name)
        # a default that is spelled out, as in the args.yaml of an earlier run, does no harm
        if flag.only_with and value not in (None, flag.default) and not getattr(args, flag.only_with):
            raise UsageError(f"{flag_text(flag.name, value)}: has no effect without {flag_name(flag.only_with)}")
    for flag in flags:
        if getattr(args, flag.name) is None:
            setattr(args, flag.name, flag.default)
        value = getattr(args, flag.name)
        if value is not None and not flag.valid(value):
            raise UsageError(f"{flag_text(flag.name, value)}: expected {flag.expected}")


def settings(args: argparse.Namespace, flags: Sequence[Flag]) -> dict[str, Any]:
    """The arguments of a method's task, from checked flags."""
    return {flag.argument: getattr(args, flag.name) for flag in flags if flag.argument}


def flag_text(name: str, value: Any) -> str:
    """A flag with its value as one would type it: ``--noise-blocks layer3 layer4``, or ``--amp``."""
    if value is True:
        return flag_name(name)
    return f"{flag_name(name)} {' '.join(map(str, value)) if isinstance(value, list) else value}"
