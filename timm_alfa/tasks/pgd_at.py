"""Adversarial training (Madry et al. 2018): train on perturbed images only. Robust, at a loss of clean accuracy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..loss import scalar_loss
from ..pgd import INITS
from .base import PixelTask
from .flags import Flag, above_zero, at_least_one, at_least_zero, number, settings
from .pixels import PixelAttack

# The settings of the paper's section 4.3, PGD-10 with eps 8/255 and steps of 2/255.
FLAGS = (
    Flag(
        "pgd_at_eps",
        8.0,
        "largest change of a pixel, in 1/255",
        number,
        expected="at least 0",
        valid=at_least_zero,
        argument="eps",
    ),
    Flag(
        "pgd_at_alpha",
        2.0,
        "step size, in 1/255",
        number,
        expected="a finite step above 0",
        valid=above_zero,
        argument="alpha",
    ),
    Flag(
        "pgd_at_steps",
        10,
        "steps of the attack",
        int,
        expected="a whole number of at least 1",
        valid=at_least_one,
        argument="steps",
    ),
    Flag(
        "pgd_at_init",
        "uniform",
        "where the attack starts: at the image, or uniformly within eps",
        choices=INITS,
        argument="init",
    ),
)


class PgdTask(PixelTask):
    """crit(model(x_adv), y), where x_adv maximises it within eps of x.

    The attack runs in training mode, with the batch's statistics and the dropout masks of the pass that trains; running
    statistics and the random state move with that pass alone.

    ``model``, ``criterion``, ``criterion_kwargs``, ``device``, ``dtype`` and ``verbose`` are as for :class:`PixelTask`.

    Args:
        attack: Of the images.
    """

    reported = ("loss_adv",)

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None,
        attack: PixelAttack,
        *,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose
        )
        self.attack = attack

    def compute(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Attack, then one pass; ``output`` is that of the perturbed images, there is no clean pass."""
        model = self.models.called
        start = self.random_state(input)
        with start.left_as_is(), self.statistics.kept():
            perturbed = self.attack(model, self.criterion, input, target, self.generator(input.device), start)
        with self.statistics.observed():
            output = model(perturbed)
        loss = scalar_loss(self.criterion, output, target)
        return {"loss": loss, "output": output, "loss_adv": loss.detach().clone()}

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """The attack."""
        return [f"PGD adversarial training: {self.attack.describe()}"]


def build(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    input_size: tuple[int, int, int] | None,
    **common: Any,
) -> PgdTask:
    """The task that checked arguments ask for; ``common`` holds device, dtype and verbose."""
    return PgdTask(model, criterion, PixelAttack.for_model(args, model, **settings(args, FLAGS)), **common)
