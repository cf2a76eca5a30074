"""Fast AdvProp (Mei et al. 2022): AdvProp without pairs, at about the price of plain training.

Taken from the paper: most images of a batch are trained on clean, through the model's batch norms, and the others are
attacked, through auxiliary ones ("decoupled training"); the attack is one step from a random start; its pass trains
too ("gradient reuse"), so an attacked image counts half for the start and half for the end of the step ("re-balancing
training samples"). Not taken: fewer epochs for exactly equal cost, which ``--epochs`` decides, and separate gradient
scales for the two sets of affine parameters, both here those of the mean over the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.float16 import attack_gradients
from ..loss import scalar_loss
from .advprop import AuxTask
from .flags import Flag, above_zero, at_least_zero, number, settings
from .pixels import PixelAttack

FLAGS = (
    Flag(
        "fast_advprop_share",
        0.2,
        "share of each batch that is attacked",
        number,
        expected="a share between 0 and 1",
        valid=lambda value: 0 < value < 1,
        argument="share",
    ),
    Flag(
        "fast_advprop_eps",
        1.0,
        "largest change of a pixel, in 1/255",
        number,
        expected="at least 0",
        valid=at_least_zero,
        argument="eps",
    ),
    Flag(
        "fast_advprop_alpha",
        1.0,
        "step size, in 1/255",
        number,
        expected="a finite step above 0",
        valid=above_zero,
        argument="alpha",
    ),
)


class FastAdvPropTask(AuxTask):
    """The mean over a batch of the losses of clean images and, for the others, of attacked ones.

    A clean image has crit(model(x), y). Another has the mean of crit(model_aux(x + start), y) and
    crit(model_aux(x_adv), y), where x_adv is one step from x + start.

    With a share p of attacked images a step costs 1 + (4/3) p plain ones: the attack's graph is walked for the images'
    gradients, and once more for the weights'.

    ``model``, ``criterion``, ``criterion_kwargs``, ``device``, ``dtype`` and ``verbose`` are as for
    :class:`~timm_alfa.tasks.base.PixelTask`.

    Args:
        attack: Of one step, untargeted, usually from a uniform start.
        share: Of each batch that is attacked, between 0 and 1; rounded to at least one image and not all of them.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None,
        attack: PixelAttack,
        *,
        share: float = 0.2,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        if not 0 < share < 1:
            raise ValueError(f"share: expected a share between 0 and 1, found {share}")
        if attack.steps != 1 or attack.targeted:
            raise ValueError(f"attack: expected one step and no targets, found {attack.describe()}")
        super().__init__(
            model, criterion, attack, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose
        )
        self.share = share

    def compute(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """A clean pass of the first images, the attack's pass and an adversarial pass of the last.

        Raises:
            ValueError: The batch has fewer than two images.
        """
        model = self.models.called
        attacked = min(max(1, round(self.share * len(input))), len(input) - 1)
        if attacked < 1:
            raise ValueError(f"input: expected a batch of at least 2 images, found {len(input)}")
        images, labels = input[-attacked:], target[-attacked:]
        with self.statistics.observed():
            output = model(input[:-attacked])
        clean = scalar_loss(self.criterion, output, target[:-attacked])
        delta = self.attack.start(images.detach(), self.generator(images.device))
        leaf = (images + delta).to(images.dtype).requires_grad_()
        with self.adversarial():
            started = model(leaf)
            start = scalar_loss(self.criterion, started, labels)
            (gradient,) = attack_gradients(start, [leaf], started, retain_graph=True)
            assert gradient is not None  # every output depends on its image
            perturbed = (images + self.attack.step(images.detach(), delta, gradient)).to(images.dtype)
            end = scalar_loss(self.criterion, model(perturbed), labels)
        share = attacked / len(input)
        adversarial = (start + end) / 2
        return {
            "loss": (1 - share) * clean + share * adversarial,
            "output": output,
            "loss_clean": clean.detach(),
            "loss_adv": adversarial.detach(),
        }

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """The attack, the share of images and the number of auxiliary batch norms."""
        return [
            f"Fast AdvProp: {self.attack.describe()}, {self.share:.0%} of each batch, "
            f"{len(self.aux)} auxiliary batch norms"
        ]


def build(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    input_size: tuple[int, int, int] | None,
    **common: Any,
) -> FastAdvPropTask:
    """The task that checked arguments ask for; ``common`` holds device, dtype and verbose."""
    given = settings(args, FLAGS)
    share = given.pop("share")
    attack = PixelAttack.for_model(args, model, **given, steps=1, init="uniform")
    return FastAdvPropTask(model, criterion, attack, share=share, **common)
