"""The README and the pages of ``docs``, and what is in them: code, commands, links, equations."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
STARTS_TRAINING = re.compile(r"(?:train_alfa\.py|-m timm_alfa\.train|timm-alfa-train) ")
FENCE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[str]:
    """Every command of the blocks of bash, continued lines joined, comments taken out."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def training_commands(*pages: Path) -> list[list[str]]:
    """Arguments of every training command, without what starts the program."""
    lines = [line for page in pages for line in command_lines(page)]
    return [shlex.split(STARTS_TRAINING.split(line, maxsplit=1)[1]) for line in lines if STARTS_TRAINING.search(line)]


def without_code(page: Path) -> str:
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", text_of(page)))


def equations(page: Path) -> list[tuple[str, str]]:
    """Source and display (block or inline) of every equation."""
    text = without_code(page)
    found = [(source, "block") for source in re.findall(r"\$\$(.+?)\$\$", text, flags=re.DOTALL)]
    rest = re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
    return found + [(source, "inline") for source in re.findall(r"\$([^$\n]+)\$", rest)]


def tables(text: str) -> list[list[list[str]]]:
    """Cells of every table, titles first."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, flags=re.MULTILINE)
    return [
        [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
            for line in table.splitlines()
            if not re.fullmatch(r"[|\s:-]+", line) or "-" not in line
        ]
        for table in found
    ]


def links(page: Path) -> list[str]:
    """Relative links and pictures, from outside of code."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    return [target for target in targets if not target.startswith(("http:", "https:"))]


def anchors(page: Path) -> set[str]:
    """Those of the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(page)), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def names_in_scope() -> dict[str, Any]:
    """What a code block may take for granted."""
    model = timm.create_model("resnet18", channels=(4, 8, 8, 8), num_classes=10, zero_init_last=False)
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    return {
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "images": images,
        "target": target,
        "loader": DataLoader([(images, target), (images.flip(0), target.flip(0))], batch_size=None),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "device": torch.device("cpu"),
    }
