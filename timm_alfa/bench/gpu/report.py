"""The tables of what has been measured so far, in the form of ``results/``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import common, step
from .parts import MODES, Part
from .process import Outcome

TITLES = {"eager": "Eager", "graph": "One CUDA graph per step", "compiled": "Compiled"}


def describe_machine(device: torch.device) -> str:
    """Card, driver and versions, in one line."""
    line = common.machine(device)
    if device.type != "cuda":
        return line
    line += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        line += f", driver {subprocess.run(query, capture_output=True, text=True).stdout.split()[0]}"
    return line


def write_report(folder: Path, machine: str, parts: Sequence[Part], outcomes: Sequence[Outcome]) -> None:
    """Write ``README.md``, a table file per model and ``step.jsonl`` into ``folder``.

    Args:
        folder: Has the records of the parts that are done in ``parts/``.
        machine: From :func:`describe_machine`.
        parts: All.
        outcomes: The latest of each part that was tried.
    """
    records = {part.name: _read(folder, part) for part in parts if part.model is not None}
    measured = [(part, record) for part in parts if (record := records.get(part.name)) is not None]
    (folder / "step.jsonl").write_text("".join(json.dumps(record) + "\n" for _, record in measured))
    for name in dict.fromkeys(part.model.name for part, _ in measured if part.model):
        tables = [step.render(record) for part, record in measured if part.model and part.model.name == name]
        (folder / f"{name}.md").write_text("\n\n".join(tables) + "\n")
    (folder / "README.md").write_text("\n".join(_lines(machine, measured, outcomes)) + "\n")


def _lines(machine: str, measured: Sequence[tuple[Part, dict[str, Any]]], outcomes: Sequence[Outcome]) -> list[str]:
    lines = [
        "# What a step costs on a GPU",
        "",
        f"{machine}.",
        "bfloat16 autocast, channels-last; every table of the models' files is one command (its first line), with the",
        "steps in turns in one process. Times are relative to plain training in the same mode, medians.",
    ]
    for mode in MODES:
        of_mode = [(part, record) for part, record in measured if part.group == mode]
        if of_mode:
            lines += ["", f"## {TITLES[mode]}", "", *_table(of_mode)]
    lines += ["", "## Parts", "", "| part | outcome | seconds | last line |", "| --- | --- | ---: | --- |"]
    lines += [
        f"| {outcome.name} | {outcome.state} | {outcome.seconds:.0f} | {outcome.detail.replace('|', '/')} |"
        for outcome in outcomes
    ]
    return lines


def _table(measured: Sequence[tuple[Part, dict[str, Any]]]) -> list[str]:
    """One line per model: the plain step in milliseconds, the others in plain steps."""
    lines = [
        "| model, batch | plain, ms | ALFA PGD-1 | PGD-5 | L-ALFA, blocks | AdvProp 1, 5 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model in dict.fromkeys(part.model for part, _ in measured if part.model):
        rows = [row for part, record in measured if part.model == model for row in record["rows"]]
        ratios = {row["name"]: f"{row['ratio']:.2f}" for row in reversed(rows)}
        named = {name: [(key, ratio) for key, ratio in ratios.items() if key.startswith(name)] for name in _COLUMNS}
        blocks = [f"{ratio}, {count}" for key, ratio in named["L-ALFA"] if (count := _blocks_of(key))]
        plain = next(f"{1000 * row['seconds']:.1f}" for row in rows if row["name"] == "plain")
        advprop = ", ".join(ratio for _, ratio in sorted(named["AdvProp"]))
        cells = [
            f"`{model.name}`, {model.batch_size}", plain, *(_first(named[name]) for name in _COLUMNS[:2]),
            "; ".join(blocks), advprop,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


_COLUMNS = ("ALFA PGD-1", "ALFA PGD-5", "L-ALFA", "AdvProp")


def _first(found: Sequence[tuple[str, str]]) -> str:
    return found[0][1] if found else ""


def _blocks_of(name: str) -> str:
    """Of ``L-ALFA PGD-1, 4 blocks``: 4."""
    found = re.search(r"(\d+) blocks", name)
    return found[1] if found else ""


def _read(folder: Path, part: Part) -> dict[str, Any] | None:
    """A part's record, its command without this machine's folders."""
    path = folder / "parts" / f"{part.name}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    record["command"] = record["command"].partition(" --output ")[0]
    return record
