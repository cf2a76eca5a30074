"""``python -m timm_alfa.bench rounding``: what half precision leaves of perturbations, block by block and size by size.

On features of one batch of training, by the model as it starts or after some plain steps.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ..engine.half_precision import HALF, Rounding
from ..errors import UsageError
from ..perturbation import Pgd
from ..tasks.alfa import AlfaTask
from ..tasks.flags import is_size_above_zero, size
from ..tasks.monitor import norms
from ..tasks.visibility import name_of, percent
from ..train.arguments.command_line import parse_args
from ..train.arguments.parser import TrainParser
from ..train.build import assemble, check_inputs
from ..train.loop import prepare_batch
from ..train.propose_alpha import train_plainly
from . import common

SIZES = ("0.5/255", "1.5/255", "0.5%", "2%")


def build_parser() -> argparse.ArgumentParser:
    """The command's flags; all others are the training command's."""
    parser = TrainParser(
        prog="python -m timm_alfa.bench rounding", allow_abbrev=False,
        description="What half precision leaves of perturbations. Other flags are the training command's, such as "
        "--config cifar10-resnet20s --alfa-blocks layer2 --amp --amp-dtype bfloat16.",
    )  # fmt: skip
    parser.add_argument(
        "--sizes", nargs="+", default=list(SIZES), metavar="SIZE",
        help=f"alphas, as for --alfa-alpha (default: {' '.join(SIZES).replace('%', '%%')})",
    )  # fmt: skip
    parser.add_argument("--plain-steps", type=int, default=0, metavar="N", help="train so far first (default: 0)")
    parser.add_argument("--report", default=None, metavar="PATH", help="write PATH.json and PATH.md")
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure and print; see :func:`build_parser`.

    Raises:
        UsageError: A flag's value cannot be, or nothing is in half precision.
    """
    own, others = build_parser().parse_known_args(argv)
    if own.plain_steps < 0:
        raise UsageError(f"--plain-steps {own.plain_steps}: expected a whole number of at least 0")
    sizes = {text: parse_size(text) for text in own.sizes}
    args = parse_args(others)
    if not args.amp and args.model_dtype not in map(name_of, HALF):
        raise UsageError("--amp: expected half precision; add --amp --amp-dtype bfloat16, or --model-dtype bfloat16")
    args.prefetcher = not args.no_prefetcher
    check_inputs(args)
    run = assemble(args, "", None).run
    task = run.task
    if not isinstance(task, AlfaTask) or not isinstance(task.engine.perturbation, Pgd):
        raise UsageError("--alfa-blocks: expected the blocks to perturb, such as @last; add them")
    run.module.train()
    batches = (prepare_batch(run, *batch) for batch in itertools.chain.from_iterable(itertools.repeat(run.loader)))
    train_plainly(task, itertools.islice(batches, own.plain_steps), run.optimizer, run.precision.autocast)
    batch = next(batches)
    half, rows = measure(task, batch, sizes, run.precision.autocast)
    record = {
        "command": "python -m timm_alfa.bench rounding " + " ".join(argv),
        "machine": common.machine(run.device),
        "input": list(batch[0].shape),
        "plain_steps": own.plain_steps,
        "half_precision": half,
        "rows": rows,
    }
    common.write(record, render(record), own.report)


def parse_size(text: str) -> float | str:
    """One of ``--sizes``.

    Raises:
        UsageError: It is none.
    """
    try:
        value = size(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--sizes {text}: {error}") from None
    if not is_size_above_zero(value):
        raise UsageError(f"--sizes {text}: expected a finite step size above 0, such as 0.5/255 or 2%")
    return value


def measure(
    task: AlfaTask,
    batch: tuple[Any, Any],
    sizes: dict[str, float | str],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> tuple[str, list[dict[str, Any]]]:
    """The half precision at work, and a row per block; the model stays as it is.

    Args:
        task: Whose blocks and attack count.
        batch: Input and target, on the device.
        sizes: What alphas are called -> their values.
        autocast: Makes the context of a forward.

    Returns:
        Its name; per block ``block``, ``rounded_to`` (None where its consumer takes the sum as it is) and per size
        ``survives`` and ``ratio``, rms(delta) / rms(f).
    """
    engine, (input, target) = task.engine, batch
    rounding = Rounding(engine)
    pgd = engine.perturbation
    assert isinstance(pgd, Pgd)
    rows: list[dict[str, Any]] = [{"block": block, "survives": {}, "ratio": {}} for block in engine.blocks]
    with autocast(), engine.statistics_kept():
        recording = engine.record(input)
        with engine.adversarial_pass(recording):
            gradients = engine.clean_gradients(recording, target)
            for row, (name, alpha) in itertools.product(rows, sizes.items()):
                engine.perturbation = replace(pgd, alpha=alpha)
                block = row["block"]
                delta = engine.find_delta(recording, block, target, gradients.get(block))
                share = rounding.survival(recording, block, delta)
                row["survives"][name] = 1.0 if share is None else share.item()
                row["ratio"][name] = norms(delta, recording.features[block].tensors)[2].item()
    engine.perturbation = pgd
    for row in rows:
        found = rounding.consumers.get(row["block"], [])
        row["rounded_to"] = ", ".join(name_of(dtype) for dtype in dict.fromkeys(found) if dtype) or None
    return name_of(rounding.dtype), rows


def render(record: dict[str, Any]) -> str:
    """A Markdown table of a record."""
    names = list(record["rows"][0]["survives"])
    shape = "x".join(map(str, record["input"]))
    lines = [
        f"`{record['command']}`",
        "",
        f"{record['machine']}; a batch of {shape} after {record['plain_steps']} plain steps. Share of delta that "
        f"survives {record['half_precision']}, in brackets its rms beside the feature's.",
        "",
        f"| block | rounded to | {' | '.join(names)} |",
        f"| --- | --- |{' ---: |' * len(names)}",
    ]
    for row in record["rows"]:
        cells = [f"{percent(row['survives'][name])} ({percent(row['ratio'][name])})" for name in names]
        lines.append(f"| `{row['block']}` | {row['rounded_to'] or 'not rounded'} | {' | '.join(cells)} |")
    return "\n".join(lines)
