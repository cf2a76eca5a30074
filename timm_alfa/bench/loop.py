"""``python -m timm_alfa.bench loop``: what the training command adds to a plain loop over timm's parts, ALFA off.

Both train the same model on the same images, held in memory, batch by batch through timm's own data loader. Epochs of a
few batches are timed in turns in one process, with a second plain loop (A/A) that shows the noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data import create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter
from torch import nn
from torch.utils.data import Dataset

from ..errors import UsageError
from ..train.arguments.command_line import parse_args
from ..train.arguments.parser import TrainParser
from ..train.build import assemble
from ..train.loop import train_one_epoch
from . import common
from .timing import compare

CLASSES = 10
OPTIMIZER: dict[str, Any] = {"opt": "sgd", "lr": 1e-6, "momentum": 0.9, "weight_decay": 2e-5}


class Images(Dataset[tuple[np.ndarray, int]]):
    """Random images of 8-bit pixels, as an image folder's transforms would hand them on.

    Args:
        count: How many.
        side: Height and width.
    """

    transform: Any = None  # timm's loader sets it; there is nothing left to transform

    def __init__(self, count: int, side: int):
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.pixels[index], index % CLASSES


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = TrainParser(prog="python -m timm_alfa.bench loop", description="The training loop against a plain one.")
    common.add_arguments(parser)
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="steps per measurement (default: 4)")
    parser.add_argument("--output", default=None, metavar="PATH", help="write PATH.json and PATH.md")
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure and print; see :func:`build_parser`.

    Raises:
        UsageError: A flag's value cannot be.
    """
    args = build_parser().parse_args(argv)
    common.check_arguments(args, positive=("batches",))
    if args.amp == "float16":
        raise UsageError("--amp float16: needs a loss scaler, which the plain loop has not; use bfloat16")
    device = torch.device(args.device)
    images = Images(args.batches * args.batch_size, args.img_size)
    epochs = {
        "plain loop": plain_epoch(args, images),
        "plain loop again (A/A)": plain_epoch(args, images),
        "train_alfa.py, ALFA off": command_epoch(args, images),
    }
    ratios = compare(epochs, rounds=args.rounds, device=device)
    record = {
        "command": "python -m timm_alfa.bench loop " + " ".join(argv),
        "machine": common.machine(device),
        "input": [args.batch_size, 3, args.img_size, args.img_size],
        "batches": args.batches,
        "rows": [
            {"name": name, **asdict(ratio), "images_per_second": len(images) / ratio.seconds}
            for name, ratio in ratios.items()
        ],
    }
    common.write(record, render(record), args.output)


def plain_epoch(args: argparse.Namespace, images: Images) -> Callable[[], None]:
    """An epoch of the loop that anybody would write: loader, forward, backward, step, schedule, average of the loss."""
    model = common.create_model(args, num_classes=CLASSES)
    config = resolve_data_config({"img_size": args.img_size}, model=model)
    dataset: Any = images  # which timm means to be a folder
    loader: Any = create_loader(
        dataset,
        config["input_size"],
        args.batch_size,
        is_training=True,
        num_workers=0,
        mean=config["mean"],
        std=config["std"],
        device=torch.device(args.device),
        pin_memory=False,
        persistent_workers=False,
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = create_optimizer_v2(model, **OPTIMIZER)
    scheduler: Any = create_scheduler_v2(optimizer, sched="cosine", num_epochs=300, updates_per_epoch=len(loader))[0]
    autocast = common.autocast_for(args)
    called = torch.compile(model) if args.compile else model

    def epoch() -> None:
        model.train()
        losses = AverageMeter()
        for index, (batch, target) in enumerate(loader):
            if args.channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            with autocast():
                loss = criterion(called(batch), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.update(loss.item(), len(batch))
            scheduler.step_update(num_updates=index + 1, metric=losses.avg)

    return epoch


def command_epoch(args: argparse.Namespace, images: Images) -> Callable[[], object]:
    """An epoch of the training command, assembled from flags as every run is."""
    flags = [
        "--model", args.model, "--num-classes", str(CLASSES), "--img-size", str(args.img_size), "-b",
        str(args.batch_size), "--device", args.device, "--workers", "0", "--val-split=", "--smoothing", "0",
        "--warmup-epochs", "0",
    ]  # fmt: skip
    flags += [text for name, value in OPTIMIZER.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--amp", "--amp-dtype", args.amp] if args.amp else []
    flags += ["--channels-last"] if args.channels_last else []
    flags += ["--torchcompile"] if args.compile else []
    parsed = parse_args(flags)
    parsed.prefetcher = True
    run = assemble(parsed, "", None, datasets=(images, None)).run
    return partial(train_one_epoch, run, 0)


def render(record: dict[str, Any]) -> str:
    """A Markdown table of a record."""
    lines = [
        f"`{record['command']}`",
        "",
        f"{record['machine']}; input {'x'.join(map(str, record['input']))}, epochs of {record['batches']} steps.",
        "",
        "| loop | time / plain | 95% interval | images/s |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['name']} | {row['ratio']:.3f} | {row['low']:.3f} to {row['high']:.3f} | "
        f"{row['images_per_second']:.1f} |"
        for row in record["rows"]
    ]
    return "\n".join(lines)
