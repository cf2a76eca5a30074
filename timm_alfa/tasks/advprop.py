"""AdvProp (Xie et al. 2020): train on clean and on perturbed images, which go through batch norms of their own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.aux_batchnorm import AuxBatchNorms
from ..engine.grad_checkpointing import without_checkpointing
from ..engine.trace import evaluating
from ..loss import REDUCTIONS, AlfaLoss, Reduction, scalar_loss
from ..pgd import INITS
from .base import PixelTask, from_same_start
from .flags import Flag, above_zero, at_least_one, at_least_zero, number, settings
from .pixels import ATTACK_MODES, AttackMode, PixelAttack

FLAGS = (
    Flag(
        "advprop_eps",
        1.0,
        "largest change of a pixel, in 1/255",
        number,
        expected="at least 0",
        valid=at_least_zero,
        argument="eps",
    ),
    Flag(
        "advprop_alpha",
        1.0,
        "step size, in 1/255",
        number,
        expected="a finite step above 0",
        valid=above_zero,
        argument="alpha",
    ),
    Flag(
        "advprop_steps",
        1,
        "steps of the attack",
        int,
        expected="a whole number of at least 1",
        valid=at_least_one,
        argument="steps",
    ),
    Flag(
        "advprop_init",
        "uniform",
        "where the attack starts: at the image, or uniformly within eps",
        choices=INITS,
        argument="init",
    ),
    Flag(
        "advprop_targeted",
        False,
        "attack towards a class drawn at random rather than away from the true one",
        bool,
        argument="targeted",
    ),
    Flag(
        "advprop_attack_bn",
        "train",
        "attack through the auxiliary batch norms with statistics of the batch (train), "
        "or the whole model in evaluation mode with their running statistics (eval)",
        choices=ATTACK_MODES,
        argument="attack_bn",
    ),
    Flag(
        "advprop_reduction",
        "sum",
        "add clean and adversarial loss, or average them",
        choices=REDUCTIONS,
        argument="reduction",
    ),
)


class AuxTask(PixelTask):
    """A task whose adversarial images see auxiliary batch norms, absent from every ``state_dict`` and at evaluation.

    Build the optimizer afterwards: it trains the auxiliary affine parameters too. A model without batch norms shares
    whatever norms it has.

    ``model``, ``criterion``, ``criterion_kwargs``, ``device``, ``dtype`` and ``verbose`` are as for :class:`PixelTask`.

    Args:
        attack: Of the images.
        attack_bn: ``"train"``: the attack normalises with the batch's statistics. ``"eval"``: the model attacked is in
            evaluation mode, on the auxiliary running statistics. Neither moves a statistic.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None,
        attack: PixelAttack,
        *,
        attack_bn: AttackMode = "train",
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        if attack_bn not in ATTACK_MODES:
            raise ValueError(f"attack_bn: expected one of {', '.join(ATTACK_MODES)}, found {attack_bn!r}")
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose
        )
        self.attack = attack
        self.attack_bn = attack_bn
        self.aux = AuxBatchNorms(model)

    @contextmanager
    def attacking(self) -> Iterator[None]:
        """Around an attack: the auxiliary branches compute, nothing moves."""
        mode = evaluating(self.models.bare) if self.attack_bn == "eval" else nullcontext()
        with mode, self.aux.active(), self.statistics.kept():
            yield

    @contextmanager
    def adversarial(self) -> Iterator[None]:
        """Around a pass that trains the auxiliary branches and moves their statistics, and no others."""
        with self.aux.active(), self.statistics.kept_outside_batch_norms(), without_checkpointing(self.inventory):
            yield

    def method_state(self) -> dict[str, Any]:
        """The step count and the auxiliary batch norms."""
        return {**super().method_state(), "aux": self.aux.state_dict()}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`method_state`.

        Raises:
            ValueError: The auxiliary batch norms are of another model.
        """
        super().load_method_state(state)
        if "aux" in state:
            self.aux.load_state_dict(state["aux"])


class AdvPropTask(AuxTask):
    """crit(model(x), y) + crit(model_aux(x_adv), y), where x_adv maximises the latter within eps (Eq. 3 of AdvProp).

    Clean images go through the model's batch norms, perturbed ones through auxiliary ones. Both passes of a step see
    the same dropout masks. The paper's settings: eps 1 with one step of 1, or eps e with e + 1 steps of 1; its random
    start is here always drawn, there in four of five batches.

    ``model``, ``criterion``, ``attack``, ``attack_bn``, ``criterion_kwargs``, ``device``, ``dtype`` and ``verbose`` are
    as for :class:`AuxTask`.

    Args:
        reduction: ``"sum"`` as the paper, or ``"mean"``, which is the loss of both halves as one batch.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None,
        attack: PixelAttack,
        *,
        reduction: Reduction = "sum",
        attack_bn: AttackMode = "train",
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(
            model,
            criterion,
            attack,
            attack_bn=attack_bn,
            criterion_kwargs=criterion_kwargs,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        self.objective = AlfaLoss(self.criterion, reduction=reduction)

    def compute(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Attack, a clean pass, an adversarial pass."""
        model = self.models.called
        start = self.random_state(input)
        with start.left_as_is(), self.attacking():
            perturbed = self.attack(model, self.criterion, input, target, self.generator(input.device), start)
        with self.statistics.observed():
            output = model(input)
        clean = scalar_loss(self.criterion, output, target)
        with from_same_start(start), self.adversarial():
            adversarial = scalar_loss(self.criterion, model(perturbed), target)
        return {
            "loss": self.objective.combine(clean, [adversarial]),
            "output": output,
            "loss_clean": clean.detach(),
            "loss_adv": adversarial.detach(),
        }

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """The attack and the number of auxiliary batch norms."""
        return [
            f"AdvProp: {self.attack.describe()}, attack in {self.attack_bn} mode, {self.objective.reduction}, "
            f"{len(self.aux)} auxiliary batch norms"
        ]


def build(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    input_size: tuple[int, int, int] | None,
    **common: Any,
) -> AdvPropTask:
    """The task that checked arguments ask for; ``common`` holds device, dtype and verbose."""
    given = settings(args, FLAGS)
    of_task = {name: given.pop(name) for name in ("reduction", "attack_bn")}
    return AdvPropTask(model, criterion, PixelAttack.for_model(args, model, **given), **of_task, **common)
