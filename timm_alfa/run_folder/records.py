"""What a run's folder says: its records as Python values."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError
from .eta_history import FILE_NAME, read_history

ENVIRONMENT_FILE = "environment.yaml"
SCORES = {  # in percent, of one class per image or of independent labels
    "eval_top1": "top-1",
    "eval_top5": "top-5",
    "eval_map": "mAP",
    "eval_micro_f1": "micro F1",
    "eval_macro_f1": "macro F1",
    "eval_sample_f1": "sample F1",
}


@dataclass
class RunRecord:
    """One run.

    Args:
        folder: Its folder.
        args: The resolved configuration.
        epochs: One dict of metrics per row of ``summary.csv``; what is not a number there is left out.
        eta_blocks: The perturbed blocks of an L-ALFA run, in order; empty for others.
        eta: Rows of step and eta, [steps][1 + r].
        environment: The command, hardware and versions, as far as they were recorded.
    """

    folder: Path
    args: dict[str, Any]
    epochs: list[dict[str, float]]
    eta_blocks: list[str]
    eta: list[list[float]]
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model and how it was trained: ``resnet20s, L-ALFA, PGD-3``."""
        parts = [str(self.args.get("model", self.folder.name))]
        if self.args.get("alfa_blocks"):
            parts.append("L-ALFA" if self.args.get("alfa_learnable") else "ALFA")
            parts.append(f"PGD-{self.args.get('alfa_steps', 1)}")
        elif self.args.get("method") not in (None, "standard"):
            parts.append(str(self.args["method"]))
        return ", ".join(parts)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Epochs (counted from 1) and values of one column."""
        points = [(row["epoch"] + 1, row[name]) for row in self.epochs if name in row]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, name: str) -> float | None:
        """What was last recorded of one column."""
        values = self.series(name)[1]
        return values[-1] if values else None

    def mean(self, name: str) -> float | None:
        """The mean over the epochs of one column."""
        values = self.series(name)[1]
        return sum(values) / len(values) if values else None

    @property
    def metric(self) -> str:
        """The column that ``--eval-metric`` means by best."""
        return f"eval_{self.args.get('eval_metric', 'top1')}"

    def best(self) -> tuple[float, float] | None:
        """The best epoch (counted from 1) and its metric; None without validation."""
        epochs, values = self.series(self.metric)
        if not values:
            return None
        value = min(values) if self.metric == "eval_loss" else max(values)
        return epochs[values.index(value)], value

    def blocks_with(self, prefix: str) -> list[str]:
        """What follows ``prefix`` in the names of columns, in order: for ``train_eta_`` the blocks with an eta."""
        names = dict.fromkeys(name for row in self.epochs for name in row if name.startswith(prefix))
        return [name.removeprefix(prefix) for name in names]

    def eta_series(self, index: int) -> tuple[list[float], list[float]]:
        """Epochs, in fractions, and eta of one block, step by step."""
        # By the last epoch's number: with --val-interval not every epoch has a row.
        steps_per_epoch = max(self.eta[-1][0] / (self.epochs[-1]["epoch"] + 1), 1) if self.epochs else 1
        return [row[0] / steps_per_epoch for row in self.eta], [row[index + 1] for row in self.eta]


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
        args, environment = _mapping(folder / "args.yaml"), _mapping(folder / ENVIRONMENT_FILE)
        blocks, eta = read_history(folder)
    except (ValueError, yaml.YAMLError, OSError) as error:
        names = f"summary.csv, args.yaml, {ENVIRONMENT_FILE} or {FILE_NAME}"
        raise UsageError(f"{folder}: {names} cannot be read ({str(error).splitlines()[0]})") from None
    return RunRecord(folder, args, [row for row in epochs if "epoch" in row], blocks, eta, environment)


def _mapping(path: Path) -> dict[str, Any]:
    """The names and values in a YAML file; none where there is no file."""
    content = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no names and values but {content!r}")
    return content


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
