"""From ``--methods`` to what is measured."""

from __future__ import annotations

import argparse

from torch import nn

from ..blocks.resolve import resolve_blocks
from ..errors import BlockError, UsageError
from . import variants
from .released import released
from .variants import Variant

ONE_BY_ONE = {"alfa": variants.alfa, "alfa-wrapper": variants.alfa_wrapper, "released": released}
JOINT = {"l-alfa": variants.l_alfa, "l-alfa-drawn": variants.l_alfa_drawn}
PIXELS = {"advprop": variants.advprop, "pgd-at": variants.pgd_at}
METHODS = (
    "alfa",
    "alfa-wrapper",
    "l-alfa",
    "l-alfa-drawn",
    "released",
    "advprop",
    "fast-advprop",
    "noise",
    "moex",
    "pgd-at",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which methods, at which blocks, with how many steps of attack."""
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["alfa"],
        metavar="NAME",
        help=f"beside plain training: {', '.join(METHODS)} (default: alfa)",
    )
    parser.add_argument(
        "--blocks",
        nargs="+",
        default=["@last"],
        metavar="NAME",
        help="blocks, one at a time; together for l-alfa, one drawn per step for l-alfa-drawn (default: @last)",
    )
    parser.add_argument("--together", action="store_true", help="all blocks together for the other methods too")
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[1, 5], metavar="K", help="steps of every attack (default: 1 5)"
    )
    parser.add_argument("--moex-block", default=None, metavar="NAME", help="for moex (default: the first stage)")


def select(args: argparse.Namespace, model: nn.Module) -> list[Variant]:
    """What the flags ask for; plain training first, its double second.

    Raises:
        UsageError: A block does not resolve, or a flag has no effect.
    """
    blocks = _resolve("--blocks", args.blocks, model)
    _check(args, blocks)
    groups = [blocks] if args.together else [[block] for block in blocks]
    found = [variants.plain(), variants.plain("plain again (A/A)")]
    for method in dict.fromkeys(args.methods):
        if method in ONE_BY_ONE:
            found += [ONE_BY_ONE[method](group, steps=steps) for steps in args.steps for group in groups]
        elif method in PIXELS:
            found += [PIXELS[method](steps) for steps in args.steps]
        elif method in JOINT:
            found += [JOINT[method](blocks, steps=steps) for steps in args.steps]
        elif method == "noise":
            found += [variants.noise(group) for group in groups]
        elif method == "moex":
            found.append(variants.moex(args.moex_block or _resolve("--methods moex", ["@stages"], model)[0]))
        else:
            found.append(variants.fast_advprop())
    return found


def _resolve(flag: str, names: list[str], model: nn.Module) -> list[str]:
    try:
        return list(resolve_blocks(model, names))
    except BlockError as error:
        raise UsageError(f"{flag} {' '.join(names)}: {error}") from None


def _check(args: argparse.Namespace, blocks: list[str]) -> None:
    joint = [f"--methods {method}" for method in args.methods if method in JOINT] + ["--together"] * args.together
    if len(blocks) < 2 and joint:
        raise UsageError(f"{joint[0]}: needs several blocks, found --blocks {blocks[0]}; name more, such as @stages")
    if args.moex_block is not None and "moex" not in args.methods:
        raise UsageError(f"--moex-block {args.moex_block}: has no effect without --methods moex")
