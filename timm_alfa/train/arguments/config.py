"""Defaults from a YAML file: timm's ``--config``, with every key and value checked against the parser."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import reprlib
from typing import Any

import yaml

from ...errors import UsageError
from ...recipes import find_recipe

_logger = logging.getLogger(__name__)


def load_config(path: str, parser: argparse.ArgumentParser, flag: str = "--config") -> dict[str, Any]:
    """Read a YAML mapping of flag names to values, as defaults for ``parser``.

    Keys are flag names with ``_`` or ``-``; unknown ones are warned about and left out. A value must be what the
    flag would take on the command line; ``null`` stands for a default that is itself None. The key ``base`` names
    another file, relative to this one, or a recipe, whose values hold where this file has none.

    Args:
        path: A file, or the name of one of the package's recipes.
        parser: Of the flags.
        flag: How the user named the file; errors start with it.

    Raises:
        UsageError: The file cannot be read, is not plain YAML, is not a mapping, or a value has the wrong type.
    """
    path = find_recipe(path, flag)
    content = _read(path, flag)
    seen = [os.path.realpath(path)]
    while (base := content.pop("base", None)) is not None:
        if not isinstance(base, str):
            raise UsageError(f"{flag} {path}: base: {base!r} is not text, the name of a file or recipe")
        beside = os.path.join(os.path.dirname(seen[-1]), base)
        file = beside if os.path.exists(beside) else find_recipe(base, f"{flag} {path}: base:")
        if os.path.realpath(file) in seen:
            raise UsageError(f"{flag} {path}: base: {base} is based on itself")
        seen.append(os.path.realpath(file))
        content = _read(file, flag) | content
    return _check(path, content, parser, flag)


def _read(path: str, flag: str) -> dict[Any, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # the reader of a value such as `!!int ''` can raise nearly anything
        raise UsageError(f"{flag} {path}: not plain YAML ({_describe(error)})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{flag} {path}: expected 'flag: value' lines, found a {type(content).__name__}")
    return content


def _check(path: str, content: dict[Any, Any], parser: argparse.ArgumentParser, flag: str) -> dict[str, Any]:
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config", "version")}
    defaults = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            _logger.warning(f"{flag} {path}: unknown key {key!r} ignored{hint}")
            continue
        try:
            defaults[name] = _convert(value, actions[name])
        except ValueError as error:
            raise UsageError(f"{flag} {path}: {key}: {reprlib.repr(value)} is not {error}") from error
    return defaults


def _describe(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return where + (getattr(error, "problem", None) or " ".join(str(error).split()))


def _convert(value: Any, action: argparse.Action) -> Any:
    """Return ``value`` as ``action`` would have parsed it; ValueError says what was expected."""
    if value is None and action.default is None:
        return None
    if isinstance(action.const, bool):  # store_true and store_false
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value
    if isinstance(action.default, dict):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError("a mapping of names to values")
        return value
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            raise ValueError(f"a list of {action.nargs} values" if isinstance(action.nargs, int) else "a list")
        if action.nargs == "+" and not value and action.default != []:
            raise ValueError("a list of at least one value")
        return [_convert_scalar(item, action) for item in value]
    if value is True and action.const is not None:  # a flag with an optional value, named without one
        return action.const
    return _convert_scalar(value, action)


def _convert_scalar(value: Any, action: argparse.Action) -> Any:
    kind = action.type or str
    if isinstance(value, bool):
        raise ValueError(_expected(kind))
    if kind is int:
        if not isinstance(value, int):
            raise ValueError(_expected(kind))
        result: Any = value
    elif kind is float:
        try:
            result = float(value)  # PyYAML reads 3e-4, which lacks the dot of YAML 1.1, as a string
        except (TypeError, ValueError) as error:
            raise ValueError(_expected(kind)) from error
    elif kind is str:
        if not isinstance(value, str):
            raise ValueError("text (put it in quotes)")
        result = value
    else:
        result = _parse_text(value, kind)
    if action.choices is not None and result not in action.choices:
        raise ValueError(f"one of {', '.join(map(str, action.choices))}")
    return result


def _parse_text(value: Any, kind: Any) -> Any:
    """Hands a value to a flag's own parsing function."""
    if not isinstance(value, (str, int, float)):
        raise ValueError("a single value")
    try:
        return kind(str(value))
    except (argparse.ArgumentTypeError, ValueError, TypeError) as error:
        raise ValueError(f"valid: {error}") from error


def _expected(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text"}.get(kind, "a single value")
