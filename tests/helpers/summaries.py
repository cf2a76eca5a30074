"""``summary.csv`` of a run, as it is, or without the clock's readings, which no two runs share."""

from __future__ import annotations

import csv
from pathlib import Path

COST = ("train_step_time", "train_images_per_second")


def read_summary(folder: Path) -> list[dict[str, str]]:
    """One dict per row."""
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def reproducible_summary(folder: Path) -> list[dict[str, str]]:
    """Only the columns that the same command and seed make again."""
    return [{name: row[name] for name in row if name not in COST} for row in read_summary(folder)]
