"""The ``--eval-pgd`` flags, with the sizes of the paper's section 4.3, and the robust accuracy that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.data import create_loader
from torch import nn

from ..errors import UsageError
from ..pgd import INITS
from ..tasks.flags import Flag, above_zero, at_least_zero, fill_flags, number, refuse_flags
from ..tasks.pixels import PixelAttack
from .accuracy import robust_accuracy

FLAGS = (
    Flag(
        "eval_pgd",
        None,
        "attack the test or else the validation images with so many steps of l_inf PGD",
        int,
        expected="a whole number of at least 1",
        valid=lambda value: value >= 1,
    ),
    Flag(
        "eval_pgd_eps", 8.0, "largest change of a pixel, in 1/255", number, expected="at least 0", valid=at_least_zero
    ),
    Flag("eval_pgd_alpha", 2.0, "step size, in 1/255", number, expected="a finite step above 0", valid=above_zero),
    Flag("eval_pgd_init", "uniform", "where the attack starts: at the image, or uniformly within eps", choices=INITS),
)


def check_arguments(args: argparse.Namespace) -> None:
    """Check the flags of a training run, where only ``--eval-pgd`` asks for an attack, and fill in their defaults.

    Raises:
        UsageError: A value cannot be, a flag has no effect, or there is nothing to attack.
    """
    if args.eval_pgd is None:
        refuse_flags(args, FLAGS, "--eval-pgd")
        return
    fill_flags(args, FLAGS)
    if not (args.val_split or args.val_fraction or args.test_split):
        raise UsageError(f"--eval-pgd {args.eval_pgd}: attacks test or validation images; name some with --val-split")


def create_attack(args: argparse.Namespace, data_config: dict[str, Any]) -> PixelAttack:
    """The attack that this module's flags, filled in, ask for."""
    return PixelAttack(
        eps=args.eval_pgd_eps,
        alpha=args.eval_pgd_alpha,
        steps=args.eval_pgd,
        init=args.eval_pgd_init,
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
    )


def evaluate(
    args: argparse.Namespace,
    model: nn.Module,
    dataset: Any,
    data_config: dict[str, Any],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, Any]:
    """Attack all images of a dataset, in this process.

    Args:
        args: With this module's flags filled in, and the training command's batch size, workers and seed.
        model: On ``device``.
        dataset: Of timm's kind; its transforms are set.
        data_config: ``timm.data.resolve_data_config``'s result.
        device: Where batches go.
        dtype: Of the images; None is float32.
        autocast: Makes the context of a forward.

    Returns:
        What :func:`robust_accuracy` does, and ``attack``, in words.
    """
    loader: Any = create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        num_workers=args.workers,
        img_dtype=dtype or torch.float32,
        device=device,
        pin_memory=False,
        persistent_workers=False,
    )
    attack = create_attack(args, data_config)
    found = robust_accuracy(model, loader, attack, seed=args.seed, autocast=autocast)
    return {"attack": attack.describe(), **found}


def describe(result: dict[str, Any]) -> str:
    """One line about :func:`evaluate`'s result."""
    return (
        f"{result['attack']}: clean {result['top1']:.2f}, robust {result['robust_top1']:.2f} "
        f"(top-1 in percent, {result['images']} images)"
    )
