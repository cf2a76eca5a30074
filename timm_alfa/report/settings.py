"""A run's configuration: what was set, and what was left as it is by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..tasks import registry
from ..tasks.flags import flag_name
from ..train.arguments.command_line import parse_args


def split_settings(args: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Flags whose values differ from the training command's defaults, and the others; both as text.

    A flag of a later version, or of another script, counts as set unless its value is empty.
    """
    of_methods = registry.defaults()
    del of_methods["alfa_blocks"]  # which features is what a reader looks for first
    defaults = vars(parse_args([])) | of_methods
    is_set = {
        name: value is not None and (value != defaults[name] if name in defaults else value not in (False, "", [], {}))
        for name, value in args.items()
    }
    texts = {name: _text(value) for name, value in args.items()}
    return (
        {flag_name(str(name)): texts[name] for name in args if is_set[name]},
        {flag_name(str(name)): texts[name] for name in args if not is_set[name]},
    )


def differing_settings(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Flags that are not the same in all runs: each run's value as text."""
    names = sorted({name for args in runs for name in args}, key=str)
    rows = {flag_name(str(name)): [_text(args.get(name)) for args in runs] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
