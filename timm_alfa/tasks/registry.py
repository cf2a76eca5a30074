"""``--method`` and every method's flags: add them to any parser, check what came, build the task.

To add a method, write a file like its neighbours (``FLAGS``, a :class:`~timm_alfa.tasks.base.MethodTask`, ``build``)
and a line in :data:`METHODS`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.task import ClassificationTask, MultiLabelClassificationTask, TrainingTask
from torch import nn

from ..blocks.resolve import format_blocks, list_blocks, resolve_blocks
from ..errors import BlockError, UsageError
from . import advprop, alfa, distillation, fast_advprop, moex, noise, pgd_at
from .base import MethodTask
from .distillation import DistillationTask
from .flags import Flag, add_flags, fill_flags, flag_text, refuse_flags
from .plain import PlainTask


class Method(NamedTuple):
    """A value of ``--method``.

    Attributes:
        title: Of its group of flags.
        flags: Its flags.
        build: (args, model, criterion, input_size=, device=, dtype=, verbose=) -> task.
        switch: What gives its flags an effect, besides ``--method``.
    """

    title: str
    flags: Sequence[Flag]
    build: Callable[..., MethodTask]
    switch: str = ""


METHODS: dict[str, Method] = {
    "alfa": Method("ALFA", alfa.FLAGS, alfa.build, "--alfa-blocks; name blocks, such as --alfa-blocks @last"),
    "advprop": Method("AdvProp: perturbed pixels, auxiliary batch norms", advprop.FLAGS, advprop.build),
    "fast-advprop": Method("Fast AdvProp: a part of the batch is attacked", fast_advprop.FLAGS, fast_advprop.build),
    "noise": Method("Random noise on features", noise.FLAGS, noise.build),
    "moex": Method("MoEx: exchanged moments", moex.FLAGS, moex.build, "--moex-block"),
    "pgd-at": Method("PGD adversarial training", pgd_at.FLAGS, pgd_at.build),
}


def add_arguments(parser: argparse.ArgumentParser, *, previews: bool = True) -> None:
    """Add the method and all methods' flags, in groups of their own.

    Args:
        parser: Any parser.
        previews: With ``--alfa-list-blocks`` and ``--alfa-dry-run``, for a program that acts on them.
    """
    group = parser.add_argument_group("Method")
    group.add_argument(
        "--method",
        default=None,
        choices=("standard", *METHODS),
        help="what to train with (default: standard, or alfa where --alfa-blocks is given)",
    )
    for method in METHODS.values():
        add_flags(parser, method.title, method.flags)
    if previews:
        group = parser.add_argument_group("ALFA: before training")
        group.add_argument(
            "--alfa-list-blocks",
            action="store_true",
            default=False,
            help="print what --alfa-blocks can name for --model, and exit",
        )
        group.add_argument(
            "--alfa-dry-run",
            action="store_true",
            default=False,
            help="resolve everything, run one step, print blocks, shapes and the cost, and exit",
        )


def defaults() -> dict[str, Any]:
    """Every flag's value where it is left out though its method is on."""
    return {flag.name: flag.default for method in METHODS.values() for flag in method.flags}


def check_arguments(args: argparse.Namespace) -> None:
    """Check values and combinations, then fill in the method and its defaults.

    Raises:
        UsageError: Naming the flag, its value, and what would be right.
    """
    if args.method is None:
        args.method = "alfa" if args.alfa_blocks is not None else "moex" if args.moex_block is not None else "standard"
    if args.alfa_blocks is not None and args.method != "alfa":
        raise UsageError(
            f"{flag_text('alfa_blocks', args.alfa_blocks)}: has no effect with --method {args.method}; "
            "use --method alfa"
        )
    for name, method in METHODS.items():
        with_alfa = name == "moex" and args.method == "alfa" and args.moex_block is not None
        if name == args.method or with_alfa:
            fill_flags(args, method.flags)
        else:
            refuse_flags(args, method.flags, method.switch or f"--method {name}")
    if args.method == "alfa":
        alfa.check_arguments(args)
    if args.method == "moex" and args.moex_block is None:
        raise UsageError("--method moex: needs --moex-block, the block whose output exchanges moments, such as maxpool")
    _check_teacher(args)
    if getattr(args, "task", None) == "multilabel" and args.advprop_targeted:
        raise UsageError(
            "--advprop-targeted: draws another class, and with --task multilabel an image has no one class"
        )


def _check_teacher(args: argparse.Namespace) -> None:
    """Check that the method goes with timm's distillation, whose flags a parser may have or not.

    Raises:
        UsageError: Naming the flag that does not.
    """
    teacher = getattr(args, "kd_model_name", None)
    if not teacher or args.method == "standard":
        return
    flag = flag_text("kd_model_name", teacher)
    if args.method not in distillation.METHODS:
        names = " or ".join(distillation.METHODS)
        raise UsageError(f"{flag}: does not go with --method {args.method}; expected standard, {names}")
    if args.moex_block is not None:
        raise UsageError(f"{flag_text('moex_block', args.moex_block)}: does not go with {flag}")
    name = f"{args.method}_objective"
    if getattr(args, name) == "kl" and args.kd_distill_type != "logit":
        raise UsageError(
            f"{flag_text(name, 'kl')}: compares logits alone; expected ce with --kd-distill-type {args.kd_distill_type}"
        )


def is_enabled(args: argparse.Namespace) -> bool:
    """Whether these arguments, checked before, train with ALFA."""
    return args.method == "alfa"


def create_task(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    verbose: bool,
    input_size: tuple[int, int, int] | None = None,
    threshold: float | None = None,
    teaching: DistillationTask | None = None,
) -> TrainingTask:
    """timm's own task for ``--method standard``, else the method's.

    Args:
        args: After :func:`check_arguments`.
        model: The model, on its device.
        criterion: The training loss.
        device: Of the task.
        dtype: Of the task.
        verbose: Whether this rank logs.
        input_size: [C, H, W] of what the model will see; with it every block is also tried out, before training starts.
        threshold: For independent labels, the probability from which on F1 scores count one; None for one class.
        teaching: timm's distillation task of this model, device, dtype and criterion, just created; None without one.

    Raises:
        UsageError: The method does not go with the model, a block does not resolve or cannot be perturbed.
    """
    graph = getattr(args, "cuda_graph", False)
    if graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph: needs a CUDA device, found {device}")
    if graph and (args.method not in ("standard", "alfa") or teaching is not None):
        found = "a teacher" if teaching is not None else f"--method {args.method}"
        raise UsageError(f"--cuda-graph: captures plain training and ALFA, found {found}")
    if teaching is not None:
        return teaching if args.method == "standard" else distillation.build(args, teaching, input_size=input_size)
    if args.method == "standard" and graph:
        plain = PlainTask(model, criterion, cuda_graph=True, device=device, dtype=dtype, verbose=verbose)
        if threshold is not None:
            plain.set_multilabel(threshold)
        return plain
    if args.method == "standard":
        if threshold is None:
            return ClassificationTask(model, criterion, device=device, dtype=dtype, verbose=verbose)
        return MultiLabelClassificationTask(
            model, criterion, threshold=threshold, device=device, dtype=dtype, verbose=verbose
        )
    build = METHODS[args.method].build
    if args.method == "alfa" and args.moex_block is not None:
        build = moex.build_with_alfa
    task = build(args, model, criterion, input_size=input_size, device=device, dtype=dtype, verbose=verbose)
    if threshold is not None:
        task.set_multilabel(threshold)
    return task


def describe_blocks(
    args: argparse.Namespace, model: nn.Module, input_size: tuple[int, int, int], device: torch.device
) -> str:
    """The table of ``--alfa-list-blocks``, with the blocks that ``--alfa-blocks`` picks marked.

    Raises:
        UsageError: ``--alfa-blocks`` does not resolve.
    """
    try:
        marked = list(resolve_blocks(model.to(device), args.alfa_blocks)) if args.alfa_blocks else []
    except BlockError as error:
        raise UsageError(f"--alfa-blocks {' '.join(args.alfa_blocks)}: {error}") from None
    infos = [
        info for info in list_blocks(model, input_size, depth=None) if info.name.count(".") < 2 or info.name in marked
    ]
    legend = "* a stage of the backbone: @stages, the last of them @last. Modules deeper inside can be named too."
    return f"{format_blocks(infos, marked)}\n{legend}"
