"""The learning rate, the optimizer and the schedule that flags describe."""

from __future__ import annotations

import argparse
import difflib
import logging
import math
from fractions import Fraction
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

from ..errors import UsageError
from ..utils.text import one_line

_logger = logging.getLogger(__name__)


def resolve_learning_rate(args: argparse.Namespace, batch_size: float) -> None:
    """Set ``args.lr`` from ``--lr-base`` where ``--lr`` was left out (or 0).

    Args:
        args: Flags.
        batch_size: Images per process and batch, on average.
    """
    if args.lr:
        return
    global_batch_size = batch_size * args.world_size * args.grad_accum_steps
    if not args.lr_base_scale:
        adaptive = any(part in args.opt.lower() for part in ("ada", "lamb"))
        args.lr_base_scale = "sqrt" if adaptive else "linear"
    ratio = global_batch_size / args.lr_base_size
    args.lr = args.lr_base * (ratio**0.5 if args.lr_base_scale == "sqrt" else ratio)
    _logger.info(
        f"Learning rate {args.lr} from --lr-base {args.lr_base} and the global batch size {global_batch_size:g} "
        f"({args.lr_base_scale} scaling)."
    )


def create_optimizer(args: argparse.Namespace, module: nn.Module) -> torch.optim.Optimizer:
    """Create ``--opt`` for what ``module`` trains.

    Raises:
        UsageError: timm has no such optimizer, or it does not take these values.
    """
    try:
        optimizer = create_optimizer_v2(module, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        near = difflib.get_close_matches(args.opt, list_optimizers(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near and args.opt not in near else ""
        raise UsageError(f"--opt {args.opt}: cannot be created: {one_line(error)}{hint}") from error
    defaults = {**optimizer.defaults, "weight_decay": args.weight_decay}  # timm moves the decay into the groups
    settings = ", ".join(f"{key}: {value}" for key, value in defaults.items())
    _logger.info(f"Created {type(optimizer).__name__} ({args.opt}) optimizer: {settings}")
    return optimizer


def create_schedule(
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer,
    *,
    updates_per_epoch: int,
    start_epoch: int,
    decreasing_metric: bool,
) -> tuple[Any, int]:
    """Create ``--sched`` and move it to ``start_epoch``; return it (None for ``none``) and the number of epochs.

    Raises:
        UsageError: timm has no such schedule, or it does not take these values.
    """
    settings = scheduler_kwargs(args, decreasing_metric=decreasing_metric)
    if args.warmup_updates is not None:
        settings["warmup_epochs"] = Fraction(args.warmup_updates, updates_per_epoch)  # timm multiplies, exactly
    try:
        scheduler, num_epochs = create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates_per_epoch)
        num_epochs = math.ceil(num_epochs)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--sched {args.sched}: cannot be created: {one_line(error)}") from error
    if scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            scheduler.step(start_epoch)
        if args.sched == "plateau":
            _logger.warning("--sched plateau: learning rate and patience start anew, checkpoints do not hold them.")
    unit = "update" if args.sched_on_updates else "epoch"
    _logger.info(f"{num_epochs} epochs of {updates_per_epoch} updates; the learning rate changes per {unit}.")
    return scheduler, num_epochs
