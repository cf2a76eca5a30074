"""``python -m timm_alfa.bench step``: what one training step costs, method by method.

Times are taken in turns in one process, as ratios to plain training, with a second plain training (A/A) that shows the
noise. Peak memory is taken in a fresh process per method. The floor is what counted FLOPs give.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from .. import __version__
from ..blocks import resolve_blocks
from ..environment import hardware
from ..errors import BlockError
from .memory import fresh_process_environment, peak_memory
from .picture import draw_bars
from .timing import Ratio, compare
from .variants import Variant, alfa, plain, released, tail_shares, training_step


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(prog="python -m timm_alfa.bench step", description="Cost of a training step.")
    parser.add_argument("--model", default="resnet50", help="timm model (default: resnet50)")
    parser.add_argument("--blocks", nargs="+", default=["@last"], metavar="NAME",
                        help="blocks: one at a time for ALFA, together for L-ALFA (default: @last)")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 5], metavar="K", help="PGD steps (default: 1 5)")
    parser.add_argument("--l-alfa", action="store_true", help="also L-ALFA over all blocks, all or one per step")
    parser.add_argument("--released", action="store_true", help="also the structure of the authors' released code")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B")
    parser.add_argument("--img-size", type=int, default=None, metavar="N", help="default: the model's own")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each method (default: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), default=None, help="autocast to this dtype")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a fresh process per method)")
    parser.add_argument("--output", default=None, metavar="PATH", help="write PATH.json, PATH.md and PATH.png")
    parser.add_argument("--measure-memory-of", default=None, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see :func:`build_parser`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(arguments)
    if min(args.steps) < 1:
        parser.error(f"--steps {' '.join(map(str, args.steps))}: expected whole numbers of at least 1")
    for name in ("rounds", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a whole number of at least 1")
    if not timm.is_model(args.model):
        parser.error(f"--model {args.model}: timm has no such model")
    if args.threads:
        torch.set_num_threads(args.threads)
    model, images, target = _prepare(args)
    try:
        blocks = list(resolve_blocks(model, args.blocks))
    except BlockError as error:
        parser.error(f"--blocks {' '.join(args.blocks)}: {error}")
    if args.l_alfa and len(blocks) < 2:
        parser.error(f"--l-alfa: needs several blocks to weigh against each other, found --blocks {blocks[0]}")
    variants = select(args, blocks)
    if args.measure_memory_of is not None:
        step = _step(args, next(v for v in variants if v.name == args.measure_memory_of), model, images, target)
        print(peak_memory(step, torch.device(args.device)))
        return
    rows = measure(args, variants, model, images, target)
    if not args.no_memory:
        for row in rows:
            row["memory_mib"] = memory_in_fresh_process(arguments, row["name"])
        for row in rows:
            row["memory_ratio"] = row["memory_mib"] / rows[0]["memory_mib"]
    record = {
        "command": "python -m timm_alfa.bench step " + " ".join(arguments),
        "machine": machine(torch.device(args.device)),
        "input": [*images.shape],
        "rows": rows,
    }
    table = render(record)
    print(table)
    if args.output:
        path = Path(args.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".md").write_text(table + "\n")
        draw_bars(path.with_suffix(".png"), f"{args.model}: one training step", rows)


def select(args: argparse.Namespace, blocks: list[str]) -> list[Variant]:
    """The methods that the flags ask for; plain training first, its double second."""
    variants = [plain(), plain("plain again (A/A)")]
    for steps in args.steps:
        variants += [alfa([block], steps=steps) for block in blocks]
        if args.released:
            variants += [released([block], steps=steps) for block in blocks]
        if args.l_alfa:
            variants.append(alfa(blocks, steps=steps, learnable=True))
            variants.append(alfa(blocks, steps=steps, learnable=True, sample_blocks=1))
            if args.released:
                variants.append(released(blocks, steps=steps))
    return variants


def measure(
        args: argparse.Namespace,
        variants: Sequence[Variant],
        model: nn.Module,
        images: torch.Tensor,
        target: torch.Tensor,
) -> list[dict[str, Any]]:
    """Times and floors, one row per method."""
    ratios: dict[str, Ratio] = compare(
        {variant.name: _step(args, variant, model, images, target) for variant in variants},
        rounds=args.rounds,
        warmup=3,
        device=torch.device(args.device),
    )
    rows = []
    for variant in variants:
        tails = tail_shares(model, variant.blocks, images[:1])
        rows.append({"name": variant.name, "floor": variant.floor(tails), **asdict(ratios[variant.name]),
                     "images_per_second": len(images) / ratios[variant.name].seconds})
    return rows


def render(record: dict[str, Any]) -> str:
    """A Markdown table of a record."""
    lines = [
        f"`{record['command']}`", "",
        f"{record['machine']}; input {'x'.join(map(str, record['input']))}.", "",
        "| step | time / plain | 95% interval | floor | images/s | peak memory / plain |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in record["rows"]:
        memory = f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        cells = [row["name"], f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", f"{row['floor']:.3f}",
                 f"{row['images_per_second']:.1f}", memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """Hardware and versions, for a record."""
    return f"{hardware(device)}, torch {torch.__version__}, timm {timm.__version__}, timm-alfa {__version__}"


def _prepare(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model: Any = timm.create_model(args.model).to(args.device).train()
    size: int = args.img_size or model.pretrained_cfg["input_size"][-1]
    images = torch.randn(args.batch_size, 3, size, size, device=args.device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    return model, images, torch.arange(args.batch_size, device=args.device) % 10


def _step(
        args: argparse.Namespace,
        variant: Variant,
        model: nn.Module,
        images: torch.Tensor,
        target: torch.Tensor,
) -> Callable[[], None]:
    autocast = partial(torch.autocast, args.device.partition(":")[0], dtype=getattr(torch, args.amp or "bfloat16"),
                       enabled=args.amp is not None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    loss_of = variant.build(model, nn.CrossEntropyLoss(), images)
    return partial(training_step(loss_of, optimizer, autocast), images, target)


def memory_in_fresh_process(arguments: Sequence[str], name: str) -> float:
    """MiB that a step of the method called ``name`` needs at its peak, under the command's ``arguments``."""
    command = [sys.executable, "-m", "timm_alfa.bench", "step", *arguments, "--measure-memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=fresh_process_environment())
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name!r} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])
