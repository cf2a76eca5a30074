"""``timm-alfa-plot RUN_DIR``: eta over epochs, as the paper's Figure 4, and the learning curves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..run_folder.records import SCORES, RunRecord, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ETA_PICTURE = "eta.png"
CURVES_PICTURE = "curves.png"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the pictures of some runs into their folders, or another.

    Args:
        argv: Arguments without the program's name.
    """
    parser = argparse.ArgumentParser(prog="timm-alfa-plot", description="Draw the pictures of runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder with a summary.csv")
    parser.add_argument("--output", metavar="DIR", help="where to put the pictures (default: into each run's folder)")
    args = parser.parse_args(argv)
    try:
        for run in args.runs:
            for path in draw(run, args.output):
                print(path)
    except UsageError as error:
        print(f"timm-alfa-plot: error: {error}", file=sys.stderr)
        sys.exit(2)


def draw(run: str | Path, output: str | Path | None = None) -> list[Path]:
    """Draw what a run's records show; returns the pictures' paths.

    Raises:
        UsageError: Not the folder of a run, matplotlib is missing, or the pictures cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError('pictures need matplotlib: pip install "timm-alfa[plot]"') from None
    record = read_run(run)
    folder = Path(output) if output is not None else record.folder
    pictures = [folder / CURVES_PICTURE]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120}):
            _draw_curves(record, pictures[0])
            if record.eta:
                pictures.append(folder / ETA_PICTURE)
                _draw_eta(record, pictures[1])
    except OSError as error:
        raise UsageError(f"{folder}: pictures cannot be written ({error.strerror or error})") from error
    return pictures


def _draw_curves(record: RunRecord, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    for name, label, style in (
        ("train_loss_clean", "training, clean", "-"),
        ("train_loss_adv", "training, adversarial", "--"),
        ("train_loss", "training", "-"),
        ("eval_loss", "validation", "-"),
    ):
        epochs, values = record.series(name)
        if values and not (name == "train_loss" and record.series("train_loss_clean")[1]):
            losses.plot(epochs, values, style, label=label, marker="." if len(values) < 30 else "")
    losses.set(xlabel="epoch", ylabel="loss")
    for name, label in SCORES.items():
        epochs, values = record.series(name)
        if values:
            accuracy.plot(epochs, values, label=label, marker="." if len(values) < 30 else "")
    scored = "accuracy" if record.series("eval_top1")[1] or not record.series("eval_map")[1] else "mAP and F1"
    accuracy.set(xlabel="epoch", ylabel=f"validation {scored} (%)")
    for axes in (losses, accuracy):
        _integer_epochs(axes)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    figure.suptitle(record.title)
    figure.savefig(path)


def _draw_eta(record: RunRecord, path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    count = len(record.eta_blocks)
    for index, block in enumerate(record.eta_blocks):
        epochs, values = record.eta_series(index)
        last = index == count - 1
        color = "black" if last else colormaps["viridis"](index / max(count - 1, 1))
        axes.plot(epochs, values, color=color, linewidth=2.2 if last else 1, label=f"{block} (last)" if last else block)
    axes.axhline(1 / count, color="0.6", linewidth=0.8, linestyle=":", label=f"1/{count}")
    axes.set(xlabel="epoch", ylabel="eta", title=record.title)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.savefig(path)


def _integer_epochs(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
