"""eta of every step, as a file: ``eta.csv``, one row per step and one column per block."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..utils.files import write_file

FILE_NAME = "eta.csv"


class EtaHistory:
    """Buffers eta on its device and writes it from time to time.

    Args:
        blocks: The columns' names.
    """

    def __init__(self, blocks: Sequence[str]):
        self.blocks = list(blocks)
        self._steps: list[int] = []
        self._values: list[Tensor] = []
        self._started = False

    def add(self, step: int, eta: Tensor) -> None:
        """eta [r] with which step ``step``, counted from 1, was made."""
        self._steps.append(step)
        self._values.append(eta)

    def write(self, folder: Path | None) -> None:
        """Move what was collected to ``eta.csv`` in ``folder``, or drop it. A resume replaces rows from its step on."""
        steps, values = self._steps, self._values
        self._steps, self._values = [], []
        if folder is None or not steps:
            return
        path = folder / FILE_NAME
        rows = [[step, *row] for step, row in zip(steps, torch.stack(values).tolist(), strict=True)]
        if not self._started:
            earlier = [row for row in read_history(folder)[1] if row[0] < rows[0][0]]
            text = _csv([["step", *self.blocks], *([int(row[0]), *row[1:]] for row in earlier)])
            write_file(path, lambda file: file.write(text.encode()))
            self._started = True
        with path.open("a", newline="") as file:
            file.write(_csv(rows))


def read_history(folder: Path) -> tuple[list[str], list[list[float]]]:
    """The blocks, and rows of step and eta; nothing without an ``eta.csv``. A row that a crash cut short is dropped."""
    path = folder / FILE_NAME
    if not path.exists():
        return [], []
    whole, _, _ = path.read_text().rpartition("\n")
    header, *rows = csv.reader(whole.splitlines())
    return header[1:], [[float(value) for value in row] for row in rows]


def _csv(rows: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
