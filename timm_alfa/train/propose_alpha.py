"""The second half of ``--alfa-dry-run``: which alpha, as a share of the feature, to start with at every block."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..engine.size_sweep import TARGET_RISE, Effect, propose, sweep_sizes
from ..perturbation import Pgd
from ..tasks.alfa import AlfaTask
from ..tasks.visibility import name_of, percent

STEPS, SECONDS = 50, 60.0  # of plain training before the sweep: the gradient of a new classifier says nothing
BATCHES = 4
PICTURE = "alfa-sizes.png"


def propose_alpha(
    args: argparse.Namespace,
    task: AlfaTask,
    batches: Iterator[tuple[Any, Any]],
    *,
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], AbstractContextManager[Any]],
    folder: Path,
) -> str:
    """Train plainly for a moment, then perturb a few batches by every size.

    Args:
        args: The command line.
        task: Whose blocks, steps and norm count.
        batches: Of the training data, on the device, without end.
        optimizer: Of the model; it takes its full learning rate.
        autocast: Makes the context of a forward.
        folder: For the picture, where matplotlib is installed.

    Returns:
        A table, and what it proposes.
    """
    engine = task.engine
    held_back = list(itertools.islice(batches, BATCHES))
    trained = train_plainly(task, itertools.islice(batches, STEPS), optimizer, autocast, seconds=SECONDS)
    pgd = engine.perturbation
    assert isinstance(pgd, Pgd)
    effects = sweep_sizes(engine, held_back, pgd=pgd, autocast=autocast)
    half = task.step.rounding.dtype
    survives = f" / delta that survives {name_of(half)}" if half is not None else ""
    lines = [
        f"What alpha does after {trained} plain steps, on {len(held_back)} batches "
        f"(rise of the loss / predictions that change{survives}):",
        render(effects),
    ]
    lines += [describe(block, found) for block, found in effects.items()]
    picture = draw(folder, args.model, effects)
    if picture is not None:
        lines.append(f"Picture: {picture}")
    return "\n".join(lines)


def train_plainly(
    task: AlfaTask,
    batches: Iterable[tuple[Any, Any]],
    optimizer: torch.optim.Optimizer,
    autocast: Callable[[], AbstractContextManager[Any]],
    *,
    seconds: float = math.inf,
) -> int:
    """Steps without the method, one per batch until the time is over; returns their number.

    Args:
        task: Whose model and criterion to take.
        batches: Of the training data, on the device.
        optimizer: Of the model; it takes its full learning rate.
        autocast: Makes the context of a forward.
        seconds: After which no further step begins.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
    start, trained = time.monotonic(), 0
    for input, target in batches:
        with autocast():
            loss = task.criterion(task.engine.model(input), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained += 1
        if time.monotonic() - start > seconds:
            break
    return trained


def render(effects: Mapping[str, Sequence[Effect]]) -> str:
    """A row per size, a column per block."""
    blocks = list(effects)
    rows = [["alpha", *blocks]]
    rows += [[percent(row[0].share), *map(_cell, row)] for row in zip(*effects.values(), strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cell(effect: Effect) -> str:
    survives = "" if math.isnan(effect.survives) else f" / {percent(effect.survives)}"
    return f"{percent(effect.rise, sign=True)} / {percent(effect.flips)}{survives}"


def describe(block: str, effects: Sequence[Effect]) -> str:
    """One block's proposal in a line."""
    found = propose(effects)
    if found is None:
        return f"{block}: no size raises the loss; train longer first, or choose another block"
    return (
        f"{block}: try --alfa-alpha {percent(found.share)}, which raises the loss by {percent(found.rise)} "
        f"(aim: about {percent(TARGET_RISE)})"
    )


def draw(folder: Path, model: str, effects: Mapping[str, Sequence[Effect]]) -> Path | None:
    """Rise and changed predictions against alpha, a line per block; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 3.2), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    for block, found in effects.items():
        shares = [100 * effect.share for effect in found]
        left.plot(shares, [100 * effect.rise for effect in found], ".-", label=block)
        right.plot(shares, [100 * effect.flips for effect in found], ".-")
    left.axhline(100 * TARGET_RISE, color="0.6", linewidth=1, linestyle=":")
    left.set(ylabel="rise of the loss (%)", title=model)
    left.set_yscale("symlog", linthresh=10)
    right.set(ylabel="predictions that change (%)")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="alpha (% of the feature's rms)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside right upper")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / PICTURE)
    return folder / PICTURE
