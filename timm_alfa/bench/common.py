"""What the benchmarks have in common: flags for model, batch and device, and what a record says about the machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import __version__
from ..errors import UsageError, end_without_reader
from ..run_folder.environment import hardware
from ..tasks.flags import flag_name
from ..train.device import check_device

Autocast = Callable[[], AbstractContextManager[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, batch, device and precision, and how many rounds."""
    parser.add_argument("--model", default="resnet50", help="timm model (default: resnet50)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="images per step (default: 16)")
    parser.add_argument("--img-size", type=int, default=None, metavar="N", help="default: the model's own")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="measurements of each (default: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), default=None, help="autocast to this dtype")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="with torch.compile (inductor)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="CPU threads")


def check_arguments(args: argparse.Namespace, *, positive: Sequence[str] = ()) -> None:
    """Check the common flags, fill in the image size and set the number of threads.

    Args:
        args: Parsed.
        positive: Names of further flags that are whole numbers, or lists of them, of at least 1.

    Raises:
        UsageError: Naming the flag.
    """
    for name in ("batch_size", "img_size", "rounds", "threads", *positive):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(number < 1 for number in values):
            raise UsageError(f"{flag_name(name)} {' '.join(map(str, values))}: expected whole numbers of at least 1")
    check_device(args.device, given=True)
    if not timm.is_model(args.model):
        raise UsageError(f"--model {args.model}: timm has no such model")
    if args.img_size is None:
        size: Any = timm.models.get_pretrained_cfg_value(args.model, "input_size")
        args.img_size = size[-1]
    if args.threads:
        torch.set_num_threads(args.threads)


def create_model(args: argparse.Namespace, **options: Any) -> nn.Module:
    """``--model`` with seeded weights in training mode, on its device; ``options`` are timm's."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(args.model, **options).to(args.device).train()
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def autocast_for(args: argparse.Namespace) -> Autocast:
    """What ``--amp`` makes a forward run in."""
    if args.amp is None:
        return contextlib.nullcontext
    return partial(torch.autocast, torch.device(args.device).type, dtype=getattr(torch, args.amp))


def write(record: dict[str, Any], table: str, output: str | None) -> None:
    """Print the table and, if ``output`` is a path, write it with suffix ``.md`` and the record as ``.json``."""
    print(table)
    if output:
        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".md").write_text(table + "\n")


def machine(device: torch.device) -> str:
    """Hardware and versions, for a record."""
    return f"{hardware(device)}, torch {torch.__version__}, timm {timm.__version__}, timm-alfa {__version__}"


def run(name: str, command: Callable[[Sequence[str]], None], argv: Sequence[str]) -> None:
    """Run a command; a user's mistake ends it with one line.

    Raises:
        SystemExit: 2 after a user's mistake, 1 when nobody reads the output any more.
    """
    try:
        command(argv)
    except UsageError as error:
        print(f"timm_alfa.bench {name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:
        end_without_reader()
