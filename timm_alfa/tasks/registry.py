"""``--method`` and the ``--alfa-*`` flags: add them to any parser, check what came, build the task."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import nn

from ..blocks.resolve import format_blocks, list_blocks, resolve_blocks
from ..engine.batchnorm import BATCH_NORM_MODES
from ..errors import BlockError, UsageError
from ..eta import ETA_SETS
from ..loss import REDUCTIONS
from ..pgd import INITS, NORMS
from ..wrapper import GRADIENTS
from . import methods as peers
from . import moex
from .alfa import AlfaTask
from .flags import flag_name, is_size_above_zero, is_size_of_at_least_zero, number, size

METHODS = ("standard", "alfa", *peers.METHODS)

# What a flag means when it is left out. The parser's own defaults are None, so that a flag without effect is noticed.
DEFAULTS: dict[str, Any] = {
    "alfa_alpha": 0.5 / 255,
    "alfa_steps": 1,
    "alfa_eps": None,
    "alfa_norm": "linf",
    "alfa_init": "zero",
    "alfa_lambda": 1.0,
    "alfa_reduction": "sum",
    "alfa_grad": "full",
    "alfa_bn": "clean",
    "alfa_sample_blocks": None,
    "alfa_gamma": 0.0,
    "alfa_eta_lr": 0.01,
    "alfa_eta_set": "hyperplane",
}
LEARNING = ("alfa_gamma", "alfa_eta_lr", "alfa_eta_set")  # without effect unless eta is learned


def add_arguments(parser: argparse.ArgumentParser, *, previews: bool = True) -> None:
    """Add the method and its flags, in groups of their own.

    Args:
        parser: Any parser.
        previews: With ``--alfa-list-blocks`` and ``--alfa-dry-run``, for a program that acts on them.
    """
    group = parser.add_argument_group("Method")
    group.add_argument(
        "--method",
        default=None,
        choices=METHODS,
        help="what to train with (default: standard, or alfa where --alfa-blocks is given)",
    )
    group = parser.add_argument_group("ALFA: which features")
    group.add_argument(
        "--alfa-blocks",
        nargs="+",
        default=None,
        metavar="NAME",
        help="blocks whose outputs are perturbed; switches ALFA on. Names, globs such as 'blocks.*', @last or @stages",
    )
    if previews:
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
    group = parser.add_argument_group("ALFA: the attack")
    group.add_argument(
        "--alfa-alpha",
        type=size,
        default=None,
        metavar="A",
        help="step size in feature units, such as 0.002 or 0.5/255, or as a share of the feature's rms, "
        "such as 2%% (default: 0.5/255)",
    )
    group.add_argument(
        "--alfa-steps",
        type=int,
        default=None,
        metavar="K",
        help="steps of the attack; the first is nearly free (default: 1)",
    )
    group.add_argument(
        "--alfa-eps",
        type=size,
        default=None,
        metavar="E",
        help="bound on the perturbation's norm, a number or a share as above (default: none)",
    )
    group.add_argument(
        "--alfa-norm",
        default=None,
        choices=NORMS,
        help="sign of the gradient, or the gradient over its l2 norm (default: linf)",
    )
    group.add_argument(
        "--alfa-init",
        default=None,
        choices=INITS,
        help="where the perturbation starts; uniform needs --alfa-eps (default: zero)",
    )
    group = parser.add_argument_group("ALFA: the objective")
    group.add_argument(
        "--alfa-lambda", type=number, default=None, metavar="L", help="weight of the adversarial losses (default: 1)"
    )
    group.add_argument(
        "--alfa-reduction",
        default=None,
        choices=REDUCTIONS,
        help="add the adversarial losses, or average them with the clean one (default: sum)",
    )
    group.add_argument(
        "--alfa-grad",
        default=None,
        choices=GRADIENTS,
        help="whether adversarial losses also train the layers before their block (default: full)",
    )
    group.add_argument(
        "--alfa-bn",
        default=None,
        choices=BATCH_NORM_MODES,
        help="whether adversarial passes move the running statistics too (shared), or have batch norms "
        "of their own (aux; default: clean, neither)",
    )
    group = parser.add_argument_group("L-ALFA: learned strengths")
    group.add_argument(
        "--alfa-learnable", action="store_true", default=False, help="learn how strongly each block is perturbed (eta)"
    )
    group.add_argument(
        "--alfa-gamma",
        type=number,
        default=None,
        metavar="G",
        help="weight of the l1 norm of eta; the paper tunes it in 0.5, 1, 2 (default: 0)",
    )
    group.add_argument(
        "--alfa-eta-lr", type=number, default=None, metavar="LR", help="learning rate of eta, constant (default: 0.01)"
    )
    group.add_argument(
        "--alfa-eta-set",
        default=None,
        choices=ETA_SETS,
        help="where eta lives: sum 1, or sum 1 and no negative entry (default: hyperplane)",
    )
    group.add_argument(
        "--alfa-sample-blocks",
        type=int,
        default=None,
        metavar="N",
        help="perturb N of the blocks per step, drawn at random and weighted accordingly (default: all)",
    )
    peers.add_arguments(parser)


def is_enabled(args: argparse.Namespace) -> bool:
    """Whether these arguments, checked before, train with ALFA."""
    return args.method == "alfa"


def check_arguments(args: argparse.Namespace) -> None:
    """Check values and combinations, then fill in the method and its defaults.

    Raises:
        UsageError: Naming the flag, its value, and what would be right.
    """
    given = [name for name in DEFAULTS if getattr(args, name) is not None]
    if args.method is None:
        implied = "standard" if args.moex_block is None else "moex"
        args.method = implied if args.alfa_blocks is None else "alfa"
    peers.check_arguments(args)
    if args.method != "alfa":
        if args.alfa_learnable:
            raise UsageError("--alfa-learnable: has no effect without --alfa-blocks; name blocks, such as @stages")
        if args.alfa_blocks is not None:
            raise UsageError(
                f"--alfa-blocks {' '.join(args.alfa_blocks)}: has no effect with --method {args.method}; "
                "use --method alfa"
            )
        if given:
            raise UsageError(
                f"{flag_name(given[0])} {getattr(args, given[0])}: has no effect without --alfa-blocks; "
                "name blocks, such as --alfa-blocks @last"
            )
        return
    # a default that is spelled out, as in the args.yaml of an earlier run, does no harm
    useless = [name for name in LEARNING if name in given and getattr(args, name) != DEFAULTS[name]]
    if useless and not args.alfa_learnable:
        raise UsageError(f"{flag_name(useless[0])} {getattr(args, useless[0])}: has no effect without --alfa-learnable")
    if args.alfa_blocks is None:
        args.alfa_blocks = ["@last"]
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    _expect(args, "alfa_alpha", "a finite step size above 0, such as 0.5/255 or 2%", is_size_above_zero)
    _expect(args, "alfa_steps", "a whole number of at least 1", lambda v: v >= 1)
    _expect(
        args,
        "alfa_eps",
        "a finite bound of at least 0, or a share such as 8%",
        lambda v: v is None or is_size_of_at_least_zero(v),
    )
    _expect(args, "alfa_lambda", "a finite weight of at least 0", lambda v: math.isfinite(v) and v >= 0)
    _expect(args, "alfa_gamma", "a finite weight of at least 0", lambda v: math.isfinite(v) and v >= 0)
    _expect(args, "alfa_eta_lr", "a finite learning rate above 0", lambda v: math.isfinite(v) and v > 0)
    _expect(args, "alfa_sample_blocks", "a whole number of at least 1", lambda v: v is None or v >= 1)
    if args.alfa_init == "uniform" and args.alfa_eps is None:
        raise UsageError("--alfa-init uniform: starts within a bound; give one with --alfa-eps")


def create_task(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    verbose: bool,
    input_size: tuple[int, int, int] | None = None,
) -> ClassificationTask:
    """timm's own task for ``--method standard``, else the method's.

    Args:
        args: After :func:`check_arguments`.
        model: The model, on its device.
        criterion: The training loss.
        device: Of the task.
        dtype: Of the task.
        verbose: Whether this rank logs.
        input_size: [C, H, W] of what the model will see; with it every block is also tried out, before training starts.

    Raises:
        UsageError: A block does not resolve or cannot be perturbed.
    """
    if args.method in peers.METHODS:
        return peers.create_task(
            args, model, criterion, device=device, dtype=dtype, verbose=verbose, input_size=input_size
        )
    if not is_enabled(args):
        return ClassificationTask(model, criterion, device=device, dtype=dtype, verbose=verbose)
    try:
        blocks = list(resolve_blocks(model, args.alfa_blocks))
        if args.alfa_sample_blocks is not None and args.alfa_sample_blocks > len(blocks):
            raise UsageError(
                f"--alfa-sample-blocks {args.alfa_sample_blocks}: expected at most the number of blocks, "
                f"{len(blocks)} ({', '.join(blocks)})"
            )
        task_type = AlfaTask if args.moex_block is None else moex.MoexAlfaTask
        task = task_type(
            model,
            criterion if args.moex_block is None else moex.MoexCriterion(criterion),
            blocks,
            alpha=args.alfa_alpha,
            steps=args.alfa_steps,
            eps=args.alfa_eps,
            norm=args.alfa_norm,
            init=args.alfa_init,
            grad=args.alfa_grad,
            bn=args.alfa_bn,
            lam=args.alfa_lambda,
            reduction=args.alfa_reduction,
            gamma=args.alfa_gamma,
            learnable=args.alfa_learnable,
            eta_set=args.alfa_eta_set,
            eta_lr=args.alfa_eta_lr,
            sample_blocks=args.alfa_sample_blocks,
            seed=getattr(args, "seed", 0),
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        if input_size is not None:
            task.alfa.check_blocks(input_size)
    except BlockError as error:
        raise UsageError(f"--alfa-blocks {' '.join(args.alfa_blocks)}: {error}") from None
    if isinstance(task, moex.MoexAlfaTask):
        task.moex = moex.create(args, model, input_size)
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


def _expect(args: argparse.Namespace, name: str, expected: str, holds: Any) -> None:
    value = getattr(args, name)
    if not holds(value):
        raise UsageError(f"{flag_name(name)} {value}: expected {expected}")
