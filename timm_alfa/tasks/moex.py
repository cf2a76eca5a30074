"""MoEx (Li et al. 2020): an image's feature gets the moments of another's, and the loss both labels.

It replaces one loss by another, as Mixup and CutMix do, so it also combines with ALFA: then the clean and every
adversarial loss are of the same exchange.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.loss import create_classification_loss
from torch import Tensor, nn

from ..blocks.resolve import blank_input, resolve_blocks
from ..engine.interception import changed_output
from ..engine.randomness import step_generator
from ..engine.trace import trace
from ..errors import BlockError, UsageError
from ..loss import scalar_loss
from ..pgd import working_dtype
from . import alfa
from .alfa import AlfaTask
from .base import MethodTask
from .flags import Flag, number, settings

_logger = logging.getLogger(__name__)


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


FLAGS = (
    Flag(
        "moex_block",
        None,
        "block whose output exchanges moments, such as maxpool (the paper's choice for ImageNet's "
        "ResNet-50) or bn1 (for CIFAR); with --alfa-blocks, MoEx is combined with ALFA",
        argument="block",
    ),
    Flag(
        "moex_lambda", 0.9, "weight of an image's own label", number, expected="0 to 1", valid=_is_share, argument="lam"
    ),
    Flag(
        "moex_prob",
        1.0,
        "share of batches that exchange; the paper: 1 on ImageNet, 0.25 on CIFAR",
        number,
        expected="0 to 1",
        valid=_is_share,
        argument="prob",
    ),
)


def exchange_moments(feature: Tensor, order: Tensor, eps: float = 1e-5) -> Tensor:
    """Each image's feature, normalised by its own moments, with the moments of image ``order[i]``.

    Moments are mean and standard deviation over the channels, at every position (PONO), computed in float32 at least.

    Args:
        feature: [B, C, H, W], at least two channels.
        order: [B], a permutation.
        eps: Added to the (unbiased) variance.
    """
    x = feature.to(working_dtype(feature.dtype))
    mean, std = x.mean(dim=1, keepdim=True), (x.var(dim=1, keepdim=True) + eps).sqrt()
    return ((x - mean) / std * std[order] + mean[order]).to(feature.dtype)


@dataclass
class Exchanged:
    """Labels of a batch whose images have another image's moments.

    Args:
        own: Labels of the images, [B] or [B, num_classes].
        other: Labels of those whose moments they have.
        lam: Weight of ``own``.
    """

    own: Tensor
    other: Tensor
    lam: float


class MoexCriterion(nn.Module):
    """lam * crit(output, own) + (1 - lam) * crit(output, other); for other targets, the criterion itself.

    Args:
        criterion: (output, target) -> scalar; None is timm's default.
    """

    def __init__(self, criterion: Callable[[Any, Any], Tensor] | None = None):
        super().__init__()
        self.criterion = create_classification_loss() if criterion is None else criterion

    def forward(self, output: Any, target: Any) -> Tensor:
        """The loss, a scalar."""
        if not isinstance(target, Exchanged):
            return scalar_loss(self.criterion, output, target)
        own, other = (scalar_loss(self.criterion, output, labels) for labels in (target.own, target.other))
        return target.lam * own + (1 - target.lam) * other


class Moex:
    """Draws exchanges and makes them, at one block of a model.

    Args:
        model: Has the block; not compiled.
        block: Name of a submodule that runs once per forward and returns [B, C, H, W].
        lam: Weight of an image's own label, 0 to 1.
        prob: Share of the batches that exchange, 0 to 1.

    Raises:
        ValueError: A share is out of its range. BlockError: The name is not that of one block.
    """

    def __init__(self, model: nn.Module, block: str, lam: float = 0.9, prob: float = 1.0):
        for name, value in (("lam", lam), ("prob", prob)):
            if not _is_share(value):
                raise ValueError(f"{name}: expected 0 to 1, found {value}")
        modules = resolve_blocks(model, [block])
        if len(modules) > 1:
            raise BlockError(f"{block!r} matches {len(modules)} blocks; name one")
        ((self.block, self.module),) = modules.items()
        self.lam = lam
        self.prob = prob
        self.steps = 0  # batches drawn for

    def draw(self, batch_size: int, device: torch.device) -> Tensor | None:
        """A permutation [B] of a batch, or None if it is left as it is; the global random state stays as it is.

        Args:
            batch_size: B.
            device: Of the permutation.
        """
        self.steps += 1
        generator = step_generator(self.steps)
        if torch.rand((), generator=generator).item() >= self.prob:
            return None
        return torch.randperm(batch_size, generator=generator).to(device)

    @contextmanager
    def exchanging(self, order: Tensor) -> Iterator[None]:
        """Forwards inside exchange moments at the block.

        Args:
            order: Whose moments each image gets, a permutation [B].

        Raises:
            BlockError: The block's output is no feature map, or none of the forwards came by.
        """
        calls = 0

        def change(output: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if not (isinstance(output, Tensor) and output.dim() == 4 and output.shape[1] > 1):
                raise BlockError(
                    f"block {self.block!r} does not return a feature map [B, C, H, W] of two or more channels"
                )
            return exchange_moments(output, order)

        with changed_output(self.module, change):
            yield
        if not calls:
            raise BlockError(f"block {self.block!r} did not run in the model's forward; choose one that does")

    def describe(self) -> str:
        """Where and how often, for the log."""
        return f"MoEx at {self.block}, lambda {self.lam:g}, in {self.prob:.0%} of the batches"

    def check(self, model: nn.Module, input_size: tuple[int, ...]) -> None:
        """Try it on blank images, before training starts.

        Args:
            model: The one that holds the block.
            input_size: Shape of one image, [C, H, W].

        Raises:
            BlockError: The block does not run, runs several times, or returns no feature map.
        """
        visits = {visit.name: visit for visit in trace(model, blank_input(model, input_size))}
        visit = visits.get(self.block)
        if visit is None or visit.calls != 1:
            times = 0 if visit is None else visit.calls
            raise BlockError(f"block {self.block!r} runs {times} times per forward; choose one that runs once")
        if [len(shape) for shape in visit.shapes] != [3] or visit.shapes[0][0] < 2:
            raise BlockError(f"block {self.block!r} does not return a feature map [B, C, H, W] of two or more channels")


class _Exchanging:
    """Lets the task behind it see exchanged features and labels in training."""

    moex: Moex

    def forward(self, input: Tensor, target: Tensor) -> Any:
        task: Any = super()
        training = self.get_eval_model().training and torch.is_grad_enabled()  # type: ignore[attr-defined]
        order = self.moex.draw(len(input), input.device) if training else None
        if order is None:
            return task.forward(input, target)
        with self.moex.exchanging(order):
            return task.forward(input, Exchanged(target, target[order], self.moex.lam))

    def compile(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Not possible: compiled code would not see the exchange.

        Raises:
            UsageError: Always.
        """
        raise UsageError("does not go with MoEx, whose exchange compiled code would leave out; use one of the two")

    def method_state(self) -> dict[str, Any]:
        """The state of the task behind it, and how many batches were drawn for."""
        state: dict[str, Any] = super().method_state()  # type: ignore[misc]
        return {**state, "moex_steps": self.moex.steps}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`method_state`."""
        super().load_method_state(state)  # type: ignore[misc]
        self.moex.steps = int(state.get("moex_steps", 0))


class MoexTask(_Exchanging, MethodTask):  # type: ignore[misc]  # compile is a task's, not a module's
    """Plain training with MoEx.

    ``device``, ``dtype`` and ``verbose`` are as for timm's task.

    Args:
        model: The model to train.
        criterion: (output, target) -> scalar.
        moex: Of the model.
    """

    reported = ()
    second_derivatives = True

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None,
        moex: Moex,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(model, MoexCriterion(criterion), device=device, dtype=dtype, verbose=verbose)
        self.moex = moex
        if verbose:
            _logger.info(moex.describe())

    def compute(self, input: Any, target: Any) -> dict[str, Any]:
        """One pass."""
        output = self.models.called(input)
        return {"loss": scalar_loss(self.criterion, output, target), "output": output}


class MoexAlfaTask(_Exchanging, AlfaTask):  # type: ignore[misc]  # as above
    """ALFA with MoEx: build it as an :class:`~timm_alfa.AlfaTask` with a :class:`MoexCriterion`, then set ``moex``."""

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """ALFA's, and MoEx."""
        return [*super().summary_lines(input_size), self.moex.describe()]


def create(args: argparse.Namespace, model: nn.Module, input_size: tuple[int, int, int] | None) -> Moex:
    """What checked arguments ask for.

    Raises:
        UsageError: The block does not resolve or cannot exchange moments.
    """
    try:
        moex = Moex(model, **settings(args, FLAGS))
        if input_size is not None:
            moex.check(model, input_size)
    except BlockError as error:
        raise UsageError(f"--moex-block {args.moex_block}: {error}") from None
    return moex


def build(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    input_size: tuple[int, int, int] | None,
    **common: Any,
) -> MoexTask:
    """The task that checked arguments ask for; ``common`` holds device, dtype and verbose."""
    return MoexTask(model, criterion, create(args, model, input_size), **common)


def build_with_alfa(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    input_size: tuple[int, int, int] | None,
    **common: Any,
) -> MoexAlfaTask:
    """ALFA's task with MoEx, for ``--alfa-blocks`` and ``--moex-block`` together."""
    task = alfa.build(args, model, MoexCriterion(criterion), input_size=input_size, task_type=MoexAlfaTask, **common)
    assert isinstance(task, MoexAlfaTask)
    task.moex = create(args, model, input_size)
    return task
