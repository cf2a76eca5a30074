"""A bar chart of a step benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_bars(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Bars of time relative to plain training with their intervals, and the floors as marks.

    Raises:
        ImportError: Matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.42 * len(rows)), layout="constrained", dpi=120)
    axes = figure.subplots()
    positions = range(len(rows))
    ratios = [row["ratio"] for row in rows]
    spread = [[row["ratio"] - row["low"] for row in rows], [row["high"] - row["ratio"] for row in rows]]
    colors = ["0.7" if row["name"].startswith("plain") else "C0" for row in rows]
    axes.barh(positions, ratios, xerr=spread, color=colors)
    axes.plot([row["floor"] for row in rows], positions, "|", color="black", markersize=14, label="floor by FLOPs")
    for position, row in zip(positions, rows, strict=True):
        axes.text(max(row["high"], row["floor"]) * 1.03, position, f"{row['ratio']:.2f}", va="center")
    axes.set_xlim(0, 1.15 * max(max(row["high"], row["floor"]) for row in rows))
    axes.set_yticks(list(positions), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="time / plain step", title=title)
    figure.legend(frameon=False, loc="outside lower right")
    figure.savefig(path)
