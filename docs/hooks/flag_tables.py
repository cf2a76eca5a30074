"""Tables of flags, made from the code when the site is built: ``<!-- flags: advprop -->`` in a page becomes a table.

The name is a method of :data:`timm_alfa.tasks.registry.METHODS`; ``robust`` stands for the robust accuracy at a run's
end, and ``command`` for every flag of the training command that belongs to no method.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any

from timm_alfa.robust.evaluation import FLAGS as ROBUST
from timm_alfa.tasks import registry
from timm_alfa.tasks.flags import Flag, flag_name
from timm_alfa.train.arguments.command_line import build_parser

MACRO = re.compile(r"^<!-- flags: ([\w-]+) -->$", flags=re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables in.

    Args:
        markdown: Text of a page.
    """
    return MACRO.sub(lambda match: table_for(match[1]), markdown)


def table_for(name: str) -> str:
    """The Markdown of one macro.

    Args:
        name: A method, ``robust`` or ``command``.

    Raises:
        ValueError: There is no such name.
    """
    if name == "command":
        return command_tables(build_parser())
    if name == "robust":
        return flag_table(ROBUST)
    if name not in registry.METHODS:
        raise ValueError(f"flags: {name}: expected command, robust or one of {', '.join(registry.METHODS)}")
    return flag_table(registry.METHODS[name].flags)


def flag_table(flags: Sequence[Flag]) -> str:
    """Flag, argument of the task, default and meaning; a column without content is left out.

    Args:
        flags: Of one method.
    """
    head = ["flag", "argument", "default", "meaning"]
    rows = [
        [
            f"`{flag_name(flag.name)}`",
            f"`{flag.argument}`" if flag.argument else "",
            default_text(flag),
            meaning_text(flag),
        ]
        for flag in flags
    ]
    used = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return table([head[column] for column in used], [[row[column] for column in used] for row in rows])


def default_text(flag: Flag) -> str:
    """What leaving the flag out means.

    Args:
        flag: Any.
    """
    if flag.type is bool:
        return "off"
    return "none" if flag.default is None else f"`{flag.text(flag.default)}`"


def meaning_text(flag: Flag) -> str:
    """What a flag does, what it takes, and where the paper has it.

    Args:
        flag: Any.
    """
    values = ", ".join(f"`{choice}`" for choice in flag.choices) if flag.choices else flag.expected
    parts = [flag.help.replace("%%", "%"), *([f"Takes {values}"] if values else [])]
    text = ". ".join(part[0].upper() + part[1:] for part in parts)
    return f"{text} ({flag.source})" if flag.source else text


def command_tables(parser: argparse.ArgumentParser) -> str:
    """One table for every group of flags that is not a method's.

    Args:
        parser: Of the training command.
    """
    of_methods = {flag.name for method in registry.METHODS.values() for flag in method.flags}
    parts = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest not in of_methods and action.option_strings]
        if actions:
            title = str(group.title).capitalize() if str(group.title).islower() else str(group.title)
            rows = [[_names(action), _default(action), _help(action)] for action in actions]
            parts.append(f"### {title}\n\n{table(['flag', 'default', 'meaning'], rows)}")
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Args:
        head: Titles of the columns.
        rows: One text for each.
    """
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _names(action: argparse.Action) -> str:
    return ", ".join(f"`{name}`" for name in action.option_strings)


def _default(action: argparse.Action) -> str:
    if action.nargs == 0 or action.default in (None, argparse.SUPPRESS, "", [], {}):
        return ""
    value = action.default
    return f"`{' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}`"


def _help(action: argparse.Action) -> str:
    text = re.sub(r" \(default: %\(default\)s\)", "", action.help or "").replace("%%", "%")
    choices = f" ({', '.join(f'`{choice}`' for choice in action.choices)})" if action.choices else ""
    return re.sub(r"<", "&lt;", text) + choices
