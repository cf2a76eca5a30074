"""The values of ``--method`` that are peers of ALFA, each with its flags and what builds its task."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from timm.task import ClassificationTask
from torch import nn

from ..errors import UsageError
from . import advprop, fast_advprop, moex, noise, pgd_at
from .flags import Flag, add_flags, fill_flags, refuse_flags


class Method(NamedTuple):
    """A value of ``--method``: title of its group of flags, the flags, and (args, model, criterion, ...) -> task."""

    title: str
    flags: Sequence[Flag]
    build: Callable[..., ClassificationTask]


METHODS: dict[str, Method] = {
    "advprop": Method("AdvProp: perturbed pixels, auxiliary batch norms", advprop.FLAGS, advprop.build),
    "fast-advprop": Method("Fast AdvProp: a part of the batch is attacked", fast_advprop.FLAGS, fast_advprop.build),
    "noise": Method("Random noise on features", noise.FLAGS, noise.build),
    "moex": Method("MoEx: exchanged moments", moex.FLAGS, moex.build),
    "pgd-at": Method("PGD adversarial training", pgd_at.FLAGS, pgd_at.build),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every method's group of flags."""
    for method in METHODS.values():
        add_flags(parser, method.title, method.flags)


def check_arguments(args: argparse.Namespace) -> None:
    """Check the flags of ``args.method``, and of MoEx beside ALFA, and fill in their defaults.

    Raises:
        UsageError: A value cannot be, or a flag was given whose method is off.
    """
    for name, method in METHODS.items():
        if name == args.method or (name == "moex" and args.method == "alfa" and args.moex_block is not None):
            fill_flags(args, method.flags)
        else:
            refuse_flags(args, method.flags, "--moex-block" if name == "moex" else f"--method {name}")
    if args.method == "moex" and args.moex_block is None:
        raise UsageError("--method moex: needs --moex-block, the block whose output exchanges moments, such as maxpool")


def create_task(
    args: argparse.Namespace, model: nn.Module, criterion: nn.Module | None, **common: Any
) -> ClassificationTask:
    """The task of ``args.method``; ``common`` holds device, dtype, verbose and input_size.

    Raises:
        UsageError: The method does not go with the model.
    """
    return METHODS[args.method].build(args, model, criterion, **common)
