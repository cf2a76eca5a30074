"""The report of the paper's experiments: Markdown tables and pictures, our numbers beside the paper's."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...utils.files import write_file
from ..paired import Paired, compare_pairs
from .runs import Run, Sheet

REPORT = "report.md"


@dataclass(frozen=True)
class Line:
    """A row of a report.

    Args:
        label: Of the row.
        top1: Accuracies by seed.
        paper: The paper's accuracy.
        gain: Ours over plain training, or another run, with the same seeds; None without common seeds, and for that
            run itself.
        paper_gain: The paper's gain over the same run.
        seconds: Median seconds per epoch.
        delta: Median size of the perturbation relative to the feature, its rms over the feature's, at the last block.
        commands: What was run.
    """

    label: str
    top1: dict[int, float]
    paper: float | None
    gain: Paired | None
    paper_gain: float | None
    seconds: float | None
    delta: float | None
    commands: list[str] = field(default_factory=list)


def write_report(
    sheets: dict[str, Sheet], records: Sequence[dict[str, Any]], output: Path, *, against: Run | None = None
) -> Path:
    """Write ``report.md`` and, where matplotlib is installed, a picture per table; return the path of the former.

    Args:
        sheets: What to report on.
        records: Of ``results.jsonl``. Those of different settings (epochs, further flags) get sections of their own.
        output: Where to write.
        against: The run that gains are counted from, in a report of its own, ``report-against-NAME.md``, which leaves
            the commands to ``report.md``; None for plain training.

    Raises:
        UsageError: None of the records belongs to these sheets, or to ``against``.
    """
    if against is not None and not any(record["run"] == against.name for record in records):
        raise UsageError(f"--against {against.name}: no results of this run in {output}")
    sections = []
    for setting in sorted({record["setting"] for record in records}):
        same = [record for record in records if record["setting"] == setting]
        for key, sheet in sheets.items():
            lines = [line for line in lines_of(sheet, same, against=against) if line.top1 or line.paper is not None]
            if any(line.top1 for line in lines):
                picture = re.sub(r"[^\w.]+", "-", f"{key} {setting}".strip()) + ".png"
                drawn = _draw(output / picture, sheet.title, setting, lines)
                sections.append(_section(sheet, setting, lines, picture if drawn else None, commands=against is None))
    if not sections:
        raise UsageError(f"--report: no results of these runs in {output}")
    machines = sorted({record["machine"] for record in records})
    base = f"`{against.name}`" if against else "plain training"
    head = (
        "# The paper's experiments\n\nTop-1 in percent on the test images, of the checkpoint that was best on the "
        "validation images: mean and standard deviation over seeds. *gain* is the mean of the differences to "
        f"{base} with the same seed, with its 95 % confidence interval and the p of a paired t-test. *delta* is "
        "the size of the perturbation relative to the feature (rms over rms) at the last perturbed block in the last "
        "epoch. Seconds per epoch are medians of the wall clock, start-up, validation and checkpoints included.\n\n"
        f"Trained on: {'; '.join(machines)}.\n"
    )
    path = output / (f"report-against-{against.name}.md" if against else REPORT)
    write_file(path, lambda file: file.write("\n".join([head, *sections]).encode()))
    return path


def lines_of(sheet: Sheet, records: Sequence[dict[str, Any]], *, against: Run | None = None) -> list[Line]:
    """The rows of a sheet with the results of one setting; of several results of a run and seed the last counts."""
    by_run: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        by_run.setdefault(record["run"], {})[record["seed"]] = record
    papers = {row.run.name: row.paper for row in sheet.rows}
    lines = []
    for row in sheet.rows:
        other = _compared(row.run, against)
        own, base = by_run.get(row.run.name, {}), by_run.get(other, {})
        common = sorted(own.keys() & base.keys())
        paper_base = papers.get(other)
        seconds = [record["seconds_per_epoch"] for record in own.values() if record["seconds_per_epoch"] is not None]
        ratios = [list(record["delta_ratio"].values())[-1] for record in own.values() if record["delta_ratio"]]
        deltas = [ratio for ratio in ratios if not math.isnan(ratio)]
        lines.append(
            Line(
                label=row.label,
                top1={seed: own[seed]["top1"] for seed in sorted(own)},
                paper=row.paper,
                gain=compare_pairs([own[seed]["top1"] - base[seed]["top1"] for seed in common]) if common else None,
                paper_gain=None if row.paper is None or paper_base is None else row.paper - paper_base,
                seconds=statistics.median(seconds) if seconds else None,
                delta=statistics.median(deltas) if deltas else None,
                commands=[own[seed]["command"] for seed in sorted(own)],
            )
        )
    return lines


def _compared(run: Run, against: Run | None) -> str:
    """Name of the run that ``run`` is compared with; empty for none, as for a run with itself or of another model."""
    if against is None:
        return run.plain
    return against.name if against.base == run.base and against.name != run.name else ""


def _section(sheet: Sheet, setting: str, lines: Sequence[Line], picture: str | None, *, commands: bool) -> str:
    text = [
        f"## {sheet.title}",
        "",
        f"With `{setting}`." if setting else "As in the recipes.",
        "",
        "| run | paper | ours | seeds | paper's gain | gain | p | delta | s/epoch |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    text += [f"| {' | '.join(_cells(line))} |" for line in lines]
    if sheet.note:
        text += ["", sheet.note]
    if picture is not None:
        text += ["", f"![{sheet.title}]({picture})"]
    if commands:
        shown = [command for line in lines for command in line.commands]
        text += ["", "<details><summary>Commands</summary>", "", "```bash", *shown, "```", "", "</details>"]
    return "\n".join([*text, ""])


def _cells(line: Line) -> list[str]:
    values = list(line.top1.values())
    ours = f"{statistics.fmean(values):.2f}" if values else ""
    if len(values) > 1:
        ours += f" ± {statistics.stdev(values):.2f}"
    gain = p = ""
    if line.gain is not None:
        gain = f"{line.gain.mean:+.2f}"
        if not math.isnan(line.gain.p):
            gain += f" ({line.gain.low:+.2f} to {line.gain.high:+.2f})"
            p = "<0.001" if line.gain.p < 0.001 else f"{line.gain.p:.3f}"
    return [
        line.label,
        "" if line.paper is None else f"{line.paper:.2f}",
        ours,
        str(len(values)),
        "" if line.paper_gain is None else f"{line.paper_gain:+.2f}",
        gain,
        p,
        "" if line.delta is None else f"{line.delta:.2g}",
        "" if line.seconds is None else f"{line.seconds:.1f}",
    ]


def _draw(path: Path, title: str, setting: str, lines: Sequence[Line]) -> bool:
    """Accuracies of every seed, their means, and the paper's where they are near; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    shown = textwrap.fill(setting, 125, break_on_hyphens=False)
    height = 1.2 + 0.34 * len(lines) + 0.17 * len(shown.splitlines())
    figure = Figure(figsize=(8, height), layout="constrained", dpi=120)
    axes = figure.subplots()
    seeds = [(value, place) for place, line in enumerate(lines) for value in line.top1.values()]
    means = [(statistics.fmean(line.top1.values()), place) for place, line in enumerate(lines) if line.top1]
    # a smaller experiment's differences are not to be seen beside the paper's accuracies
    papers = [
        (line.paper, place)
        for place, line in enumerate(lines)
        if line.paper is not None and min(abs(line.paper - mean) for mean, _ in means) < 15
    ]
    axes.plot(*zip(*seeds, strict=True), ".", color="C0", alpha=0.5, label="each seed")
    axes.plot(*zip(*means, strict=True), "|", color="C0", markersize=16, markeredgewidth=2, label="our mean")
    if papers:
        axes.plot(*zip(*papers, strict=True), "D", color="0.2", markerfacecolor="none", label="paper")
    axes.set_yticks(range(len(lines)), [textwrap.fill(line.label, 44) for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="top-1 in percent")
    figure.suptitle(title)
    figure.legend(frameon=False, loc="outside lower center", ncols=3, title=shown, title_fontsize="small")
    figure.savefig(path)
    return True
