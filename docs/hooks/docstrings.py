"""Docstrings as Markdown: Sphinx roles become code, and ``Example::`` a block of Python."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([\w.]+)`")
LITERAL = re.compile(r"::\n\n((?:    [^\n]*\n|\n)+)")


def to_markdown(text: str) -> str:
    """A docstring for mkdocstrings.

    Args:
        text: As written.
    """
    text = LITERAL.sub(lambda match: f":\n\n```python\n{textwrap.dedent(match[1]).strip()}\n```\n\n", text + "\n")
    text = re.sub(r"^Example:\n\n```", "For example\n\n```", text, flags=re.MULTILINE)
    return ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)


class PlainMarkdown(griffe.Extension):
    """Rewrites every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one.

        Args:
            obj: Whatever has a docstring.
        """
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite that of the package, which is no object of its own here.

        Args:
            pkg: The package.
        """
        self.on_object(obj=pkg)
