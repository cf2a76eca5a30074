r"""Equations become MathML when the site is built, so that a page needs no script for them.

Pages have ``$...$`` and ``$$...$$``, as GitHub shows them. The Markdown extension arithmatex finds them outside of code
and leaves ``\(...\)`` and ``\[...\]``, which are converted here.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.+?)\\\)</span>', flags=re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.+?)\\\]</div>', flags=re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Convert what arithmatex has found.

    Args:
        html: Body of a page.
    """
    html = DISPLAY.sub(lambda match: f'<div class="equation">{to_mathml(match[1], "block")}</div>', html)
    return INLINE.sub(lambda match: to_mathml(match[1], "inline"), html)


def to_mathml(latex: str, display: str) -> str:
    """One equation.

    Args:
        latex: Its source, perhaps with HTML's entities.
        display: ``inline`` or ``block``.

    Raises:
        ValueError: It has a command that the converter does not know.
    """
    mathml: str = convert(html.unescape(latex).strip(), display=display)
    if "\\" in mathml:
        raise ValueError(f"equation with an unknown command: {latex}")
    return mathml
