"""Records and texts beside ``docs`` become pages of the site, under ``records/``; links to them follow.

A page links to ``../results/README.md``, which works in a checkout and on GitHub. The site has it as
``records/results/README.md``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PATTERNS = ("results/**/*.md", "results/**/*.png", "patches/*", "CHANGELOG.md", "CONTRIBUTING.md")
FOLDER = "records/"
LINK = re.compile(r"\]\(((?:\.\./)+)((?:results|patches)/[^)\s]*|CHANGELOG\.md|CONTRIBUTING\.md)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files.

    Args:
        files: Of the site.
        config: Of the site.
    """
    from mkdocs.structure.files import File

    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            name = FOLDER + path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links follow.

    Args:
        markdown: Text of a page.
        page: The page.
    """
    if page.file.src_uri.startswith(FOLDER):
        return markdown
    depth = page.file.src_uri.count("/")
    return LINK.sub(lambda match: moved_link(match, depth), markdown)


def moved_link(match: re.Match[str], depth: int) -> str:
    """A link as it is in the site; unchanged where it does not leave ``docs`` exactly.

    Args:
        match: Of :data:`LINK`.
        depth: Of the page below ``docs``.
    """
    if match[1].count("../") != depth + 1:
        return match[0]
    return f"]({'../' * depth}{FOLDER}{match[2]})"
