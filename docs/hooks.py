"""What the site makes of pages: equations become MathML, and flags' tables come from the code."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

from timm_alfa.tasks.flags import Flag, flag_name
from timm_alfa.tasks.registry import METHODS

CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
INLINE = re.compile(r"(?<![\\$\w])\$([^$\n]+?)\$(?!\w)")
ROLE = re.compile(r":(?:class|func|mod|meth|data|attr):<code>([^<]+)</code>")
FLAGS = re.compile(r"<!-- flags: ([\w-]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with a page's source."""
    markdown = FLAGS.sub(lambda found: flags_table(METHODS[found[1]].flags), markdown)
    parts = CODE.split(markdown)  # code is at the odd places
    return "".join(part if index % 2 else with_mathml(part) for index, part in enumerate(parts))


def on_page_content(html: str, **_: Any) -> str:
    """Called with a page's HTML: cross-references of docstrings as plain names, ``Example::`` with one colon."""
    html = ROLE.sub(
        lambda found: f"<code>{found[1].rpartition('.')[2] if found[1][0] == '~' else found[1]}</code>", html
    )
    return html.replace("::</p>", ":</p>")


def short_name(reference: str) -> str:
    """``~timm_alfa.AlfaTask`` without its path, others as they are."""
    return reference.rpartition(".")[2] if reference.startswith("~") else reference


def with_mathml(text: str) -> str:
    """LaTeX between dollars as MathML, which browsers draw without a script."""
    text = DISPLAY.sub(lambda found: convert(found[1].strip(), display="block"), text)
    return INLINE.sub(lambda found: convert(found[1]), text)


def flags_table(flags: tuple[Flag, ...] | list[Flag]) -> str:
    """Flag, argument, default, values, meaning and equation, a row each."""
    rows = ["| flag | argument | default | values | meaning | source |", "| --- | --- | --- | --- | --- | --- |"]
    for flag in flags:
        values = ", ".join(f"`{choice}`" for choice in flag.choices) if flag.choices else flag.expected
        default = "off" if flag.type is bool else flag.text(flag.default)
        argument = f"`{flag.argument}`" if flag.argument else ""
        meaning = flag.help.replace("%%", "%")
        if flag.only_with:
            meaning += f" (with `{flag_name(flag.only_with)}`)"
        rows.append(f"| `{flag_name(flag.name)}` | {argument} | `{default}` | {values} | {meaning} | {flag.source} |")
    return "\n".join(rows)
