"""What a run's folder says: ``summary.csv``, ``args.yaml`` and ``eta.csv`` as Python values."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError
from ..eta_history import FILE_NAME, read_history


@dataclass
class RunRecord:
    """One run.

    Args:
        folder: Its folder.
        args: The resolved configuration.
        epochs: One dict of metrics per row of ``summary.csv``; what is not a number there is left out.
        eta_blocks: The perturbed blocks of an L-ALFA run, in order; empty for others.
        eta: Rows of step and eta, [steps][1 + r].
    """

    folder: Path
    args: dict[str, Any]
    epochs: list[dict[str, float]]
    eta_blocks: list[str]
    eta: list[list[float]]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Epochs (counted from 1) and values of one column."""
        points = [(row["epoch"] + 1, row[name]) for row in self.epochs if name in row]
        return [x for x, _ in points], [y for _, y in points]


def read_run(folder: str | Path) -> RunRecord:
    """Read the records of a run.

    Raises:
        UsageError: The folder is not that of a run, or a record in it cannot be read.
    """
    folder = Path(folder)
    summary = folder / "summary.csv"
    if not summary.is_file():
        raise UsageError(f"{folder}: expected the folder of a run, with a summary.csv in it")
    try:
        with summary.open(newline="") as file:
            epochs = [_numbers(row) for row in csv.DictReader(file)]
        args_file = folder / "args.yaml"
        args = (yaml.safe_load(args_file.read_text()) or {}) if args_file.is_file() else {}
        if not isinstance(args, dict):
            raise ValueError(f"args.yaml holds no flags but {args!r}")
        blocks, eta = read_history(folder)
    except (ValueError, yaml.YAMLError, UnicodeDecodeError) as error:
        names = f"summary.csv, args.yaml or {FILE_NAME}"
        raise UsageError(f"{folder}: {names} cannot be read ({str(error).splitlines()[0]})") from None
    return RunRecord(folder, args, [row for row in epochs if "epoch" in row], blocks, eta)


def _numbers(row: dict[str, str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, text in row.items():
        try:
            value = float(text)
        except (TypeError, ValueError):
            continue
        if value == value:  # NaN: nothing was measured
            values[name] = value
    return values
