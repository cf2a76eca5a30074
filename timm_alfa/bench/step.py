"""``python -m timm_alfa.bench step``: what one training step costs, method by method.

Times are taken in turns in one process, as ratios to plain training, with a second plain training (A/A) that shows the
noise. The floor is what the FLOPs give that a step really executes. Peak memory is taken in a fresh process per method.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn

from ..engine.flop_count import count_flops
from ..errors import BlockError, UsageError
from ..train.arguments.parser import TrainParser
from . import common, methods
from .memory import fresh_process_environment, peak_memory
from .picture import draw_bars
from .timing import compare
from .variants import Mode, Variant, training_step

# named otherwise before torch 2.7
_RECOMPILE_LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = TrainParser(prog="python -m timm_alfa.bench step", description="Cost of a training step, by method.")
    methods.add_arguments(parser)
    common.add_arguments(parser)
    parser.add_argument("--cuda-graph", action="store_true", help="plain and ALFA's steps as CUDA graphs; no others")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a fresh process per method)")
    parser.add_argument("--output", default=None, metavar="PATH", help="write PATH.json, PATH.md and PATH.png")
    parser.add_argument("--measure-memory-of", default=None, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> None:
    """Measure and print; see :func:`build_parser`.

    Raises:
        UsageError: A flag's value cannot be.
    """
    args = build_parser().parse_args(argv)
    common.check_arguments(args, positive=("steps",))
    if args.cuda_graph and args.compile:
        raise UsageError("--cuda-graph: does not go with --compile; leave one of them out")
    if args.cuda_graph and torch.device(args.device).type != "cuda":
        raise UsageError(f"--cuda-graph: needs a CUDA device, found --device {args.device}")
    model = common.create_model(args)
    variants = methods.select(args, model)
    images, target = _batch(args)
    device = torch.device(args.device)
    try:
        # every method compiles parts of a model of its own, whose code they share
        with torch._dynamo.config.patch({_RECOMPILE_LIMIT: 64}):
            if args.measure_memory_of is not None:
                variant = next(variant for variant in variants if variant.name == args.measure_memory_of)
                print(peak_memory(_step(args, variant, model, images, target, _mode(args)), device))
                return
            rows, left_out = measure(args, variants, model, images, target)
    except BlockError as error:
        raise UsageError(f"--blocks {' '.join(args.blocks)}: {error}") from None
    if not args.no_memory:
        for row in rows:
            row["memory_mib"] = memory_in_fresh_process(argv, row["name"])
        for row in rows:
            row["memory_ratio"] = row["memory_mib"] / rows[0]["memory_mib"]
    record = {
        "command": "python -m timm_alfa.bench step " + " ".join(argv),
        "machine": common.machine(device),
        "input": [*images.shape],
        "rows": rows,
        "left_out": left_out,
    }
    common.write(record, render(record), args.output)
    if args.output:
        draw_bars(Path(args.output).with_suffix(".png"), f"{args.model}: one training step", rows)


def measure(
    args: argparse.Namespace, variants: Sequence[Variant], model: nn.Module, images: Tensor, target: Tensor
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Times and floors, one row per method, each on a copy of the model; and why others were left out."""
    steps: dict[str, Callable[[], None]] = {}
    left_out: dict[str, str] = {}
    for variant in variants:
        try:
            steps[variant.name] = _step(args, variant, copy.deepcopy(model), images, target, _mode(args))
        except UsageError as error:
            if _mode(args) == "eager":
                raise
            left_out[variant.name] = str(error)
    ratios = compare(steps, rounds=args.rounds, warmup=3, device=torch.device(args.device))
    steps.clear()  # with the copies of the model
    measured = [variant for variant in variants if variant.name in ratios]
    flops = {variant.name: _flops(args, variant, model, images, target) for variant in measured}
    plain = flops[variants[0].name]
    rows = [
        {"name": name, "floor": flops[name] / plain, **asdict(ratio), "images_per_second": len(images) / ratio.seconds}
        for name, ratio in ratios.items()
    ]
    return rows, left_out


def render(record: dict[str, Any]) -> str:
    """A Markdown table of a record."""
    lines = [
        f"`{record['command']}`",
        "",
        f"{record['machine']}; input {'x'.join(map(str, record['input']))}.",
        "",
        "| step | time / plain | 95% interval | floor | images/s | peak memory / plain |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in record["rows"]:
        memory = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        cells = [
            row["name"],
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['floor']:.3f}",
            f"{row['images_per_second']:.1f}",
            memory,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nLeft out: {name} ({reason})." for name, reason in record["left_out"].items()]
    return "\n".join(lines)


def _batch(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.arange(args.batch_size, device=args.device) % 10


def _step(
    args: argparse.Namespace, variant: Variant, model: nn.Module, images: Tensor, target: Tensor, mode: Mode = "eager"
) -> Callable[[], None]:
    loss_of = variant.build(model, images, mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)  # auxiliary norms are parameters now too
    return partial(training_step(loss_of, optimizer, common.autocast_for(args)), images, target)


def _mode(args: argparse.Namespace) -> Mode:
    return "graph" if args.cuda_graph else "compiled" if args.compile else "eager"


def _flops(args: argparse.Namespace, variant: Variant, model: nn.Module, images: Tensor, target: Tensor) -> float:
    """Of one step, run eagerly on a copy of the model."""
    if variant.draws_from:
        return statistics.mean(_flops(args, one, model, images, target) for one in variant.draws_from)
    step = _step(args, variant, copy.deepcopy(model), images, target)
    step()  # the first step of ALFA looks at how the model is called
    return count_flops(step)


def memory_in_fresh_process(arguments: Sequence[str], name: str) -> float:
    """MiB that a step of the method called ``name`` needs at its peak, under the command's ``arguments``."""
    command = [sys.executable, "-m", "timm_alfa.bench", "step", *arguments, "--measure-memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=fresh_process_environment())
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name!r} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])
