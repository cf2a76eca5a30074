"""Draw the pictures of the README and the documentation: ``python docs/figures/draw.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GREY, GREEN = "#3b6ea5", "#d9772b", "#666666", "#4b8b3b"
matplotlib.rcParams.update({"svg.hashsalt": "timm-alfa", "svg.fonttype": "path", "font.size": 10})


class Sketch:
    """Boxes and arrows on a canvas of a given size, in units of a box's height."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height), dpi=100)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def box(self, x: float, y: float, text: str, *, w: float = 1.3, h: float = 0.5, color: str = GREY) -> Any:
        """A box centred at x, y; returns that place and its half sizes."""
        self.axes.add_patch(
            FancyBboxPatch(
                (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0.02,rounding_size=0.08", fc="white", ec=color, lw=1.4
            )
        )
        self.axes.text(x, y, text, ha="center", va="center", color="black", linespacing=1.25)
        return x, y, w / 2 + 0.02, h / 2 + 0.02

    def arrow(
        self, start: tuple[float, float], end: tuple[float, float], *, color: str = GREY, bend: float = 0, ls: Any = "-"
    ) -> None:
        """From one point to another."""
        self.axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle="-|>", mutation_scale=11, color=color, lw=1.4, ls=ls,
                connectionstyle=f"arc3,rad={bend}", shrinkA=1, shrinkB=1,
            )
        )  # fmt: skip

    def text(self, x: float, y: float, text: str, *, color: str = GREY, ha: str = "center", size: float = 9) -> None:
        """A note."""
        self.axes.text(x, y, text, ha=ha, va="center", color=color, fontsize=size)

    def save(self, path: Path) -> None:
        """As SVG, the same bytes each time."""
        self.figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})


def draw_step(path: Path) -> None:
    """One training step in a picture: the method."""
    s = Sketch(8.6, 2.9)
    top, low = 2.2, 0.75
    s.box(0.75, top, "images x", w=1.1)
    s.box(2.45, top, "layers before\nthe block")
    s.box(4.15, top, r"feature $f$", color=BLUE, w=1.2)
    s.box(5.85, top, r"tail $T$")
    s.box(7.6, top, "clean loss", color=BLUE)
    for a, b in ((1.32, 1.78), (3.12, 3.53), (4.77, 5.18), (6.52, 6.93)):
        s.arrow((a, top), (b, top), color=BLUE)
    s.arrow((7.3, top - 0.28), (4.3, top - 0.28), color=ORANGE, bend=-0.22, ls=(0, (3, 2)))
    s.text(5.85, 1.43, r"gradient $g$ at $f$", color=ORANGE)
    s.box(4.15, low, r"$f+\delta$", color=ORANGE, w=1.2)
    s.box(5.85, low, r"tail $T$ again")
    s.box(7.6, low, "adversarial loss", color=ORANGE, w=1.45)
    s.arrow((4.15, top - 0.28), (4.15, low + 0.28), color=ORANGE)
    s.text(4.05, 1.47, r"$+\,\delta = \alpha\,$sgn$(g)$", color=ORANGE, ha="right")
    for a, b in ((4.77, 5.18), (6.52, 6.85)):
        s.arrow((a, low), (b, low), color=ORANGE)
    s.text(0.2, low + 0.22, "The layers before the block run once.", ha="left")
    s.text(0.2, low - 0.02, "The tail runs again, on the perturbed feature.", ha="left")
    s.text(0.2, low - 0.26, "Training minimises the sum of both losses.", ha="left")
    s.save(path)


def draw_flow(path: Path) -> None:
    """One training step in a picture: the code."""
    s = Sketch(8.6, 4.6)
    s.box(1.5, 4.2, "train_alfa.py\ntrain/", w=1.9)
    s.box(4.3, 4.2, "tasks/registry.py\nflags to arguments", w=2.1)
    s.box(7.1, 4.2, "tasks/alfa.py\nAlfaTask", w=1.9, color=BLUE)
    s.box(7.1, 3.2, "engine/tail_by_tail.py\ntail by tail", w=2.1, color=BLUE)
    s.box(1.5, 3.2, "your own loop", w=1.9)
    s.box(4.3, 3.2, "wrapper.py\nin one graph", w=1.9, color=BLUE)
    s.box(5.7, 2.1, "engine/core.py: Engine\nrecord, find_delta, adversarial_output", w=4.2, color=GREEN)
    s.box(1.5, 2.1, "loss.py\nEq. 3 and 5", w=1.9)
    s.box(1.5, 0.7, "eta.py\nEq. 5, Algorithm 1", w=1.9)
    s.box(4.3, 0.7, "perturbation.py, pgd.py\nEq. 4: pgd_step", w=2.3, color=ORANGE)
    s.box(7.1, 0.7, "engine/replay.py\nT(f + delta)", w=2.0)
    for a, b in (
        ((2.47, 4.2), (3.23, 4.2)), ((5.37, 4.2), (6.13, 4.2)), ((7.1, 3.93), (7.1, 3.47)),
        ((2.47, 3.2), (3.33, 3.2)), ((4.3, 2.93), (4.7, 2.37)), ((7.1, 2.93), (6.7, 2.37)),
        ((3.58, 2.1), (2.47, 2.1)), ((5.2, 1.83), (4.6, 0.97)), ((6.4, 1.83), (6.9, 0.97)),
        ((4.0, 1.83), (2.3, 0.97)),
    ):  # fmt: skip
        s.arrow(a, b)
    s.save(path)


def main(folder: str = "docs/images") -> None:
    """Draw all of them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    draw_step(Path(folder) / "step.svg")
    draw_flow(Path(folder) / "flow.svg")


if __name__ == "__main__":
    main(*sys.argv[1:])
