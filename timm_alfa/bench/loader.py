"""``python -m timm_alfa.bench loader``: images per second of ``--cache-images`` against timm's own loader.

Both read and augment the same images with the same flags, in this process and without workers, so that what is compared
is the work per image. Batches are drawn in turns; the seconds are those of the processor, which other programs on the
machine stretch less than the clock's. Reading the images into memory, once, is not in them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import torch

from ..errors import UsageError
from ..train.arguments.command_line import parse_args
from ..train.arguments.parser import TrainParser
from ..train.data.datasets import check_data_arguments, create_datasets
from ..train.data.loaders import create_loaders
from ..train.model import build_model, resolve_preprocessing
from . import common


def build_parser() -> argparse.ArgumentParser:
    """The command's flags; all others are the training command's."""
    parser = TrainParser(
        prog="python -m timm_alfa.bench loader", allow_abbrev=False,
        description="Speed of --cache-images. Other flags are the training command's, such as --config cifar10.",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements of each (default: 15)")
    parser.add_argument("--batches", type=int, default=10, metavar="N", help="batches per measurement (default: 10)")
    parser.add_argument("--report", default=None, metavar="PATH", help="write PATH.json and PATH.md")
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure and print; see :func:`build_parser`.

    Raises:
        UsageError: A flag's value cannot be.
    """
    own, others = build_parser().parse_known_args(argv)
    for name in ("rounds", "batches"):
        if getattr(own, name) < 1:
            raise UsageError(f"--{name} {getattr(own, name)}: expected a whole number of at least 1")
    args = parse_args([*others, "--cache-images"])
    check_data_arguments(args)
    torch.set_num_threads(1)
    sources = {"timm's loader": endless(args, cached=False), "--cache-images": endless(args, cached=True)}
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(own.rounds):
        for name, batches in sources.items():
            start = time.process_time()
            for _ in range(own.batches):
                next(batches)
            seconds[name].append(time.process_time() - start)
    record = {
        "command": "python -m timm_alfa.bench loader " + " ".join(argv),
        "machine": common.machine(torch.device("cpu")),
        "images_per_second": {
            name: own.batches * args.batch_size / sorted(values)[len(values) // 2] for name, values in seconds.items()
        },
    }
    common.write(record, render(record), own.report)


def endless(args: argparse.Namespace, *, cached: bool) -> Iterator[Any]:
    """Batches of the training loader on the CPU, the first of them drawn already."""
    args = argparse.Namespace(**{**vars(args), "cache_images": cached, "workers": 0})
    args.prefetcher, args.distributed = not args.no_prefetcher, False
    data_config = resolve_preprocessing(args, build_model(args))
    train, _ = create_datasets(args, data_config)
    loader, *_ = create_loaders(
        args, data_config, train, None, device=torch.device("cpu"), img_dtype=torch.float32, collate_fn=None
    )
    batches = chain.from_iterable(repeat(loader))
    next(batches)
    return batches


def render(record: dict[str, Any]) -> str:
    """A Markdown table of a record."""
    speeds = record["images_per_second"]
    first = next(iter(speeds.values()))
    lines = [
        f"`{record['command']}`",
        "",
        f"{record['machine']}; one thread, seconds of the processor.",
        "",
        "| loader | images/s | against timm's |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {speed:,.0f} | {speed / first:.1f} |" for name, speed in speeds.items()),
    ]
    return "\n".join(lines)
