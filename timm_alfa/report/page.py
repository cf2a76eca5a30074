"""``timm-alfa-report RUN_DIR...``: one self-contained HTML page of a run, or of several beside each other."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from xml.etree.ElementTree import Element

from ..errors import UsageError
from ..run_folder.records import SCORES, RunRecord, read_run
from ..utils.files import write_file
from . import sections
from .markup import document, element
from .sections import charts, metric_chart, number, overlay, section
from .settings import differing_settings

FILE_NAME = "report.html"
SPEED = "train_images_per_second"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page of some runs.

    Args:
        argv: Arguments without the program's name.

    Raises:
        SystemExit: 2 after one line, where a folder is not a run's or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="timm-alfa-report", description="One self-contained HTML page of a run, or several runs compared."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder with a summary.csv")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"the page, or a folder for it (default: {FILE_NAME} in the "
        "run's folder, or in the folder that holds all the runs)",
    )
    args = parser.parse_args(argv)
    try:
        print(write_report(args.runs, args.output))
    except UsageError as error:
        print(f"timm-alfa-report: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page of one run, or the comparison of several; return its path.

    Args:
        runs: Their folders.
        output: A file, or an existing folder. By default ``report.html`` in the run's folder, or in the innermost
            folder that holds all of several runs.

    Raises:
        UsageError: A folder is not that of a run or is named twice, or the page cannot be written.
    """
    records = [read_run(run) for run in runs]
    folders = [record.folder.resolve() for record in records]
    for folder, count in Counter(folders).items():
        if count > 1:
            raise UsageError(f"{folder}: named {count} times; expected each run once")
    path = Path(os.path.commonpath(folders)) if output is None else Path(output)
    if path.is_dir():
        path /= FILE_NAME
    text = render(records)
    try:
        write_file(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def render(records: Sequence[RunRecord]) -> str:
    """The page as HTML.

    Args:
        records: Of one run, or of several to compare.
    """
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    if len(records) == 1:
        title, parts = records[0].title, _one_run(records[0])
    else:
        title, parts = f"{len(records)} runs", _several_runs(records)
    return document(title, style, element("main", *parts))


def _one_run(record: RunRecord) -> list[Element | None]:
    empty = None if record.epochs else element("p", "No epoch of this run has been recorded yet.")
    return [
        element("header", element("h1", record.title), element("p", str(record.folder))),
        empty,
        _tiles(record),
        section("Learning curves", charts(*(
            metric_chart(record, chart)
            for chart in (sections.ACCURACIES, sections.LABELS, sections.LOSSES, sections.RATES)
        ))),
        section("Learned strengths", charts(sections.eta_chart(record))),
        section("Perturbations", sections.norm_charts(record), sections.block_table(record)),
        section("Cost", charts(metric_chart(record, sections.SPEEDS))),
        section("Configuration", *sections.settings_tables(record)),
        section("Records", sections.epoch_table(record)),
    ]  # fmt: skip


def _several_runs(records: Sequence[RunRecord]) -> list[Element | None]:
    names = [record.folder.resolve().name for record in records]
    labels = [
        name if names.count(name) == 1 else str(record.folder) for name, record in zip(names, records, strict=True)
    ]
    labelled = list(zip(labels, records, strict=True))
    differences = differing_settings([record.args for record in records])
    return [
        element("header", element("h1", f"{len(records)} runs"), element("p", ", ".join(labels))),
        section("Results", _results(labelled)),
        section("Learning curves", charts(
            overlay("validation accuracy, top-1 (%)", labelled, ["eval_top1"]),
            overlay("validation mAP (%)", labelled, ["eval_map"]),
            overlay("validation loss", labelled, ["eval_loss"]),
            overlay("training loss on clean images", labelled, ["train_loss_clean", "train_loss"]),
            overlay("learning rate", labelled, ["lr"]),
        )),
        section("Learned strengths", charts(*(
            sections.eta_chart(record, f"eta of {label}") for label, record in labelled
        ))),
        section("Cost", charts(overlay("images per second", labelled, [SPEED], zero=True))),
        section(
            "Configuration",
            sections.table(
                "What differs", ["flag", *labels], [[flag, *values] for flag, values in differences.items()]),
            *(sections.fold(label, element("div", *sections.settings_tables(record))) for label, record in labelled),
        ),
    ]  # fmt: skip


def _results(labelled: Sequence[tuple[str, RunRecord]]) -> Element:
    scores = [
        name for name in ("eval_top1", "eval_map") if any(record.last(name) is not None for _, record in labelled)
    ]
    heads = [
        "run",
        "method",
        "best",
        "at epoch",
        *(f"last {SCORES[name]}" for name in scores),
        "last validation loss",
        "images per second",
        "time per image / first run's",
        "epochs",
    ]
    reference = labelled[0][1].mean(SPEED)
    rows = []
    for label, record in labelled:
        epoch, best = record.best() or (None, None)
        speed = record.mean(SPEED)
        relative = reference / speed if reference and speed else None
        values = [best, epoch, *map(record.last, scores), record.last("eval_loss"), speed, relative]
        rows.append([label, record.title, *map(number, values), _progress(record)])
    return sections.table("Results", heads, rows, caption=False)


def _tiles(record: RunRecord) -> Element:
    """The few numbers that are asked for first."""
    epoch, best = record.best() or (None, None)
    name = {**SCORES, "eval_loss": "validation loss"}.get(record.metric, record.metric)
    unit = " %" if record.metric in SCORES else ""
    tiles = [
        (f"best {name}" + (f", epoch {epoch:g}" if epoch else ""), best, unit),
        (f"last {name}", record.last(record.metric), unit),
        ("last training loss", record.last("train_loss"), ""),
        ("time per step", record.mean("train_step_time"), " s"),
        ("images per second", record.mean(SPEED), ""),
    ]
    shown = [(label, number(value) + unit) for label, value, unit in tiles if value is not None]
    items = [
        element("div", element("dt", label), element("dd", value))
        for label, value in [*shown, ("epochs", _progress(record))]
    ]
    return element("dl", *items, class_="tiles")


def _progress(record: RunRecord) -> str:
    """Epochs done, and planned where that is known."""
    done = f"{record.epochs[-1]['epoch'] + 1:g}" if record.epochs else "0"
    planned = record.args.get("epochs")
    return f"{done} of {planned}" if planned is not None and str(planned) != done else done
