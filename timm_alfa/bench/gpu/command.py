"""``python -m timm_alfa.bench gpu``: the suite on a GPU and the cost of a step there, in as many minutes as there are.

Parts run one after another, each with a time limit; one that fails does not stop the rest. Results go to one folder,
from which the next call goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ...errors import UsageError
from ...train.arguments.parser import TrainParser
from ...train.device import check_device
from .parts import GROUPS, MODELS, SMOKE_MODELS, TESTS, Part, list_parts
from .process import Outcome, run_part
from .report import describe_machine, write_report

STATE = "parts.jsonl"
SHORTEST = 15.0  # seconds: nothing is begun for less


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = TrainParser(prog="python -m timm_alfa.bench gpu", description="What a GPU is wanted for, by the minute.")
    parser.add_argument("--output", default="output/gpu", metavar="DIR", help="default: output/gpu")
    parser.add_argument("--minutes", type=float, default=8, metavar="M", help="for this call (default: 8)")
    parser.add_argument(
        "--parts", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="NAME", help=f"of {', '.join(GROUPS)}"
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--smoke", action="store_true", help="a trial on the CPU: small models, few tests, nothing compiled"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run what is not done yet and write the tables; see :func:`build_parser`.

    Raises:
        UsageError: A flag's value cannot be.
        SystemExit: 1 after a part that failed.
    """
    args = build_parser().parse_args(argv)
    if not args.minutes > 0:
        raise UsageError(f"--minutes {args.minutes}: expected a time above 0")
    if args.smoke:
        args.device = "cpu"
    check_device(args.device, given=True)
    if not TESTS.is_dir() and "tests" in args.parts:
        raise UsageError("--parts tests: there are no tests beside this package; run it in a clone, or leave them out")
    machine = describe_machine(torch.device(args.device))
    folder = Path(args.output)
    outcomes = read_outcomes(folder, machine)
    parts = list_parts(SMOKE_MODELS if args.smoke else MODELS, args.device, smoke=args.smoke)
    print(machine, flush=True)
    pending = list_pending(parts, args.parts, outcomes)
    tried = run_parts(pending, folder, machine, parts, outcomes, 60 * args.minutes, smoke=args.smoke)
    if any(outcome.state in ("failed", "cut off") for outcome in tried):
        sys.exit(1)


def run_parts(
    pending: Sequence[Part],
    folder: Path,
    machine: str,
    parts: Sequence[Part],
    outcomes: dict[str, Outcome],
    seconds: float,
    *,
    smoke: bool = False,
) -> list[Outcome]:
    """Run parts while there is time, and write the tables after each.

    Args:
        pending: In this order.
        folder: Of the results.
        machine: For the tables.
        parts: All, for the tables.
        outcomes: Of earlier calls, by name; what is run now is added.
        seconds: For all of them.
        smoke: Whether this is a trial.

    Returns:
        What became of ``pending``.
    """
    end = time.monotonic() + seconds
    tried = []
    for part in pending:
        remaining = end - time.monotonic()
        outcome = Outcome(part.name, "left")
        if remaining > SHORTEST:
            base = folder / "parts" / part.name
            outcome = run_part(part, base.with_suffix(".log"), base, remaining, smoke=smoke)
            with open(folder / STATE, "a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        tried.append(outcome)
        outcomes[part.name] = outcome
        print(f"{outcome.name}: {outcome.state} ({outcome.seconds:.0f} s) {outcome.detail}".rstrip(), flush=True)
        write_report(folder, machine, parts, list(outcomes.values()))
    print(summary(tried, folder), flush=True)
    return tried


def summary(tried: Sequence[Outcome], folder: Path) -> str:
    """What was done, and by name what was not."""
    lines = [f"{sum(outcome.state == 'done' for outcome in tried)} of {len(tried)} parts done, tables in {folder}"]
    for state in ("failed", "cut off", "refused", "left"):
        names = [outcome.name for outcome in tried if outcome.state == state]
        if names:
            lines.append(f"{state}: {', '.join(names)}")
    return "\n".join(lines)


def read_outcomes(folder: Path, machine: str) -> dict[str, Outcome]:
    """The latest outcome of every part, by name; makes the folder if there is none.

    Raises:
        UsageError: The folder has the results of another machine.
    """
    path = folder / STATE
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps({"machine": machine}) + "\n")
    first, *rest = path.read_text().splitlines()
    if json.loads(first)["machine"] != machine:
        raise UsageError(f"--output {folder}: has the results of {json.loads(first)['machine']}; name another folder")
    found = [Outcome(**json.loads(line)) for line in rest]
    return {outcome.name: outcome for outcome in found}


def list_pending(parts: Sequence[Part], groups: Sequence[str], outcomes: dict[str, Outcome]) -> list[Part]:
    """What is not done, in order; what was tried in vain comes last."""
    chosen = [part for part in parts if part.group in groups]
    left = [part for part in chosen if part.name not in outcomes or outcomes[part.name].state == "left"]
    again = [part for part in chosen if part not in left and outcomes[part.name].state != "done"]
    return left + again
