"""Draw docs/images/step.svg, the data flow of one ALFA step; run from anywhere: python docs/figures/draw_step.py."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PICTURE = Path(__file__).parent.parent / "images" / "step.svg"
SIZE = (9.6, 3.7)  # inches
CLEAN, ADVERSARIAL, NEUTRAL = "#2a6fb0", "#b8442f", "#555555"
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "timm-alfa", "font.family": "DejaVu Sans", "mathtext.fontset": "cm"}


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str, note: str = "") -> None:
    """A box around ``text``, its left edge at ``x`` and its middle at height ``y``, with a note below."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y - 0.38), width, 0.76, boxstyle="round,pad=0,rounding_size=0.12", fc=color + "18", ec=color, lw=1.4
        )
    )
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=11, color="#222222")
    if note:
        axes.text(x + width / 2, y - 0.62, note, ha="center", va="center", fontsize=8.5, color=NEUTRAL)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = NEUTRAL, bend: float = 0.0
) -> None:
    """An arrow; dashed and bent where it is a gradient."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=13,
            color=color,
            lw=1.4,
            shrinkA=0,
            shrinkB=0,
            linestyle="--" if bend else "-",
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def draw(picture: Path = PICTURE) -> None:
    """Write the picture.

    Args:
        picture: The file, .svg or .png.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=SIZE, facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, 14.4)
        axes.set_ylim(0, 5.55)
        axes.axis("off")
        top, bottom = 4.0, 1.35
        box(axes, 0.3, top, 1.3, "images $x$", NEUTRAL)
        box(axes, 2.2, top, 2.5, "layers before\nthe block", CLEAN, "run once")
        box(axes, 5.3, top, 1.5, "feature $f$", CLEAN)
        box(axes, 7.5, top, 1.9, "tail $T$", CLEAN, "the rest of the network")
        box(axes, 10.1, top, 1.7, "clean loss", CLEAN)
        box(axes, 4.65, bottom, 2.8, r"$\delta = \alpha\,\mathrm{sgn}(g)$", ADVERSARIAL, "Eq. 4, K steps")
        box(axes, 8.2, bottom, 1.7, r"$T(f + \delta)$", ADVERSARIAL, "only the tail runs again")
        box(axes, 10.6, bottom, 1.9, "adversarial\nloss", ADVERSARIAL)
        box(axes, 12.6, 2.68, 1.5, "loss\n(Eq. 3)", NEUTRAL)
        arrow(axes, (1.6, top), (2.2, top))
        arrow(axes, (4.7, top), (5.3, top), CLEAN)
        arrow(axes, (6.8, top), (7.5, top), CLEAN)
        arrow(axes, (9.4, top), (10.1, top), CLEAN)
        arrow(axes, (11.8, top), (13.2, 3.06), CLEAN)
        arrow(axes, (10.9, top + 0.38), (6.05, top + 0.38), ADVERSARIAL, bend=0.14)
        axes.text(8.5, 4.92, r"gradient $g$ of the clean loss at $f$", ha="center", fontsize=10, color=ADVERSARIAL)
        arrow(axes, (6.05, top - 0.38), (6.05, bottom + 0.38), ADVERSARIAL)
        axes.text(5.9, 2.68, "$f,\\ g$", ha="right", va="center", fontsize=11, color=ADVERSARIAL)
        arrow(axes, (7.45, bottom), (8.2, bottom), ADVERSARIAL)
        arrow(axes, (9.9, bottom), (10.6, bottom), ADVERSARIAL)
        arrow(axes, (12.5, bottom), (13.2, 2.3), ADVERSARIAL)
        axes.text(12.75, 3.75, "1", ha="left", fontsize=10, color=CLEAN)
        axes.text(13.05, 1.45, r"$\lambda$", ha="left", fontsize=12, color=ADVERSARIAL)
        axes.text(
            0.3,
            0.28,
            "One backward through the sum trains all weights. At evaluation and in checkpoints only the blue row is "
            "left: a plain model.",
            ha="left",
            fontsize=9.5,
            color=NEUTRAL,
        )
        metadata = {"Date": None} if picture.suffix == ".svg" else {}
        figure.savefig(picture, dpi=100, facecolor="white", metadata=metadata)
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
