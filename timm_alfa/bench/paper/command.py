"""``python -m timm_alfa.bench paper``: the paper's tables and figures, trained and reported.

Every run is the training command with a recipe. What is interrupted, in whatever way, goes on when the same command is
given again; finished runs are lines of ``results.jsonl`` and are not repeated.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ...errors import UsageError
from ...train.arguments.command_line import parse_args
from .jobs import Job, read_results, run_all, unfinished
from .report import write_report
from .runs import Run, Sheet
from .sheets import RUNS, SHEETS

# folders that torchvision's datasets make
_TORCHVISION = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m timm_alfa.bench paper",
        description="Train and report the paper's tables and figures.",
        epilog="Flags after -- go to every run's training command, such as -- --amp --amp-dtype bfloat16.",
    )
    add = parser.add_argument
    numbers = {kind: [key.split()[1] for key in SHEETS if key.startswith(kind)] for kind in ("table", "figure")}
    add("--table", nargs="+", default=[], choices=numbers["table"], metavar="N", help="tables, 1 to 10")
    add("--figure", nargs="+", default=[], choices=numbers["figure"], metavar="N", help="figures, 2 to 4")
    add("--controls", action="store_true", help="runs that take the objective apart")
    add(
        "--only",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="of these, only runs with a name like 'cifar10-resnet20s*' (--list shows the names)",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="S", help="default: 0 1 2 3 4")
    add("--epochs", type=int, default=None, metavar="E", help="shorten (or stretch) every schedule to E epochs")
    add(
        "--data-dir",
        nargs="+",
        default=[],
        metavar="[DATASET=]DIR",
        help="images; with several datasets cifar10=DIR cifar100=DIR imagenet=DIR. Folders of images per split and "
        "class, or for CIFAR what torchvision keeps",
    )
    add("--output", default="output/paper", metavar="DIR", help="where runs and results go (default: output/paper)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the runs and their commands, train nothing")
    what.add_argument(
        "--report", action="store_true", help="write report.md and pictures of the results so far, train nothing"
    )
    add(
        "--against",
        default="",
        metavar="NAME",
        help="with --report: the run that gains are counted from (default: plain training)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train, list or report; see :func:`build_parser`.

    Raises:
        UsageError: Flags, folders or runs that cannot be.
        SystemExit: 1 when runs are left without a result, 130 after an interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    border = arguments.index("--") if "--" in arguments else len(arguments)
    args = build_parser().parse_args(arguments[:border])
    try:
        sys.exit(_main(args, arguments[border + 1 :]))
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def _main(args: argparse.Namespace, extra: list[str]) -> int:
    for name in ("jobs", "epochs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: expected a whole number of at least 1")
    output = Path(args.output)
    sheets = select(args)
    if args.against and not args.report:
        raise UsageError(f"--against {args.against}: is for --report")
    if args.against and args.against not in RUNS:
        raise UsageError(f"--against {args.against}: there is no such run; --list shows the names")
    if args.report:
        print(write_report(sheets, read_results(output), output, against=RUNS.get(args.against)))
        return 0
    folders = data_folders(args.data_dir, sheets, needed=not args.list)
    jobs = create_jobs(sheets, args.seeds, args.epochs, folders, extra)
    if args.list:
        _print_list(sheets, jobs, output)
        return 0
    left = run_all(jobs, output, at_once=args.jobs)
    print(
        f"{len(jobs) - len(unfinished(jobs, output))} of {len(jobs)} runs have results in {output}; "
        "--report makes tables of them"
    )
    return 1 if left else 0


def select(args: argparse.Namespace) -> dict[str, Sheet]:
    """The tables and figures that were asked for (all of the paper's by default), with the rows of ``--only``.

    Raises:
        UsageError: No run is left.
    """
    keys = [f"table {n}" for n in args.table] + [f"figure {n}" for n in args.figure] + ["controls"] * args.controls
    sheets = {}
    for key in keys or [key for key in SHEETS if key != "controls"]:
        sheet = SHEETS[key]
        rows = tuple(row for row in sheet.rows if any(fnmatch.fnmatch(row.run.name, only) for only in args.only))
        if rows:
            sheets[key] = Sheet(sheet.title, rows, sheet.note)
    if not sheets:
        raise UsageError(f"--only {' '.join(args.only)}: none of the runs has such a name; --list shows them")
    return sheets


def data_folders(values: Sequence[str], sheets: dict[str, Sheet], *, needed: bool) -> dict[str, list[str]]:
    """Flags of the training command that say where each dataset's images are.

    Args:
        values: Of ``--data-dir``.
        sheets: Whose datasets count.
        needed: Whether the folders must exist; if not, missing ones are shown by the dataset's name.

    Raises:
        UsageError: A dataset has no folder, or one without its images.
    """
    datasets = list(dict.fromkeys(row.run.dataset for sheet in sheets.values() for row in sheet.rows))
    folders: dict[str, str] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals:
            if len(datasets) > 1:
                raise UsageError(
                    f"--data-dir {value}: the runs need several datasets; say which it is: "
                    f"{' '.join(f'{dataset}=DIR' for dataset in datasets)}"
                )
            name, folder = datasets[0], value
        elif name not in ("cifar10", "cifar100", "imagenet"):
            raise UsageError(f"--data-dir {value}: expected cifar10=DIR, cifar100=DIR or imagenet=DIR")
        folders[name] = folder
    flags = {}
    for name in datasets:
        if name not in folders and needed:
            raise UsageError(f"--data-dir: {name} is missing, expected {name}=DIR (or --only runs of other datasets)")
        folder = folders.get(name, name)
        flags[name] = ["--data-dir", folder]
        packed = _TORCHVISION.get(name)
        if packed is not None and os.path.isdir(os.path.join(folder, packed)):
            flags[name] += ["--dataset", f"torch/{name}"]
        elif needed and not os.path.isdir(os.path.join(folder, "train")):
            also = f", or torchvision's {packed}" if packed else ""
            raise UsageError(f"--data-dir {name}={folder}: expected a folder 'train' of images per class in it{also}")
    return flags


def create_jobs(
    sheets: dict[str, Sheet],
    seeds: Sequence[int],
    epochs: int | None,
    folders: dict[str, list[str]],
    extra: Sequence[str],
) -> list[Job]:
    """Every run of the sheets once per seed, seed by seed, so that what is finished first can be compared.

    Raises:
        UsageError: Flags that the training command does not take.
    """
    runs = dict.fromkeys(row.run for sheet in sheets.values() for row in sheet.rows)
    setting = shlex.join([*(["--epochs", str(epochs)] if epochs else []), *extra])
    schedules = {run: scaled_schedule(run, epochs) for run in runs}
    jobs = []
    for seed in seeds:
        for run in runs:
            source = folders[run.dataset]
            decisive = ["--config", run.recipe, *run.flags, *source[2:], *schedules[run], "--seed", str(seed), *extra]
            parsed = parse_args([*decisive, *source[:2]])
            if not parsed.test_split:
                raise UsageError("--test-split '': the runs' results are those of the test split")
            jobs.append(Job(run.name, seed, setting, tuple(decisive), tuple(source[:2])))
    return jobs


def scaled_schedule(run: Run, epochs: int | None) -> list[str]:
    """Flags that make the recipe's schedule ``epochs`` long, its warm-up and decays in proportion."""
    if epochs is None:
        return []
    recipe = parse_args(["--config", run.recipe, *run.flags])
    share = epochs / recipe.epochs
    flags = ["--epochs", str(epochs)]
    if recipe.sched == "multistep":
        milestones: list[int] = []
        for milestone in recipe.decay_milestones:
            milestones.append(max(1, round(milestone * share), *(earlier + 1 for earlier in milestones)))
        flags += ["--decay-milestones", *map(str, milestones)]
    else:
        flags += ["--decay-epochs", f"{recipe.decay_epochs * share:g}"]
    if recipe.warmup_updates is not None:
        flags += ["--warmup-updates", str(max(1, round(recipe.warmup_updates * share)))]
    return flags


def _print_list(sheets: dict[str, Sheet], jobs: Sequence[Job], output: Path) -> None:
    for sheet in sheets.values():
        print(f"# {sheet.title}")
        for row in sheet.rows:
            paper = "" if row.paper is None else f" (paper: {row.paper:.2f})"
            print(f"\n## {row.label}{paper}: {row.run.name}")
            for job in jobs:
                if job.run == row.run.name:
                    print(job.shown(output))
        print()
