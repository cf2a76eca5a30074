"""HTML and SVG as element trees: whatever text goes in comes out escaped."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

# What HTML forbids: control characters, and halves of surrogate pairs, which undecodable file names are made of.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def element(tag: str, *children: object, **attributes: object) -> Element:
    """An element with children: other elements, and anything else as text. ``None`` is left out.

    Args:
        tag: Its name.
        *children: In order.
        **attributes: ``class_`` is spelled ``class``, other underscores become hyphens; ``None`` leaves one out.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), _clean(value))
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None:
            if last is None:
                made.text = (made.text or "") + _clean(child)
            else:
                last.tail = (last.tail or "") + _clean(child)
    return made


def document(title: str, style: str, *body: Element) -> str:
    """A whole page that loads nothing and runs nothing.

    Args:
        title: Of the window.
        style: CSS, trusted: it is put in as it is.
        *body: The page's content.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", style),
    )
    page = element("html", head, element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{ElementTree.tostring(page, encoding='unicode', method='html')}\n"


def _clean(value: object) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", str(value))
