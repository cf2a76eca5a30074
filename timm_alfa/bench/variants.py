"""What can be measured: plain training and the methods, each as the loss of one training step on a given model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from ..errors import BlockError, UsageError
from ..loss import AlfaLoss
from ..peers import AdvPropTask, FastAdvPropTask, Moex, MoexTask, NoiseTask, PgdTask, PixelAttack
from ..tasks.alfa import AlfaTask
from ..tasks.plain import PlainTask
from ..wrapper import AlfaWrapper
from .common import Autocast

Loss = Callable[[Tensor, Tensor], Tensor]
Mode = Literal["eager", "compiled", "graph"]  # torch.compile; steps as CUDA graphs
CRITERION = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Variant:
    """A method to measure.

    Args:
        name: As in the table.
        build: (model, example images, mode) -> a function from images and targets to the loss of one step. It may add
            parameters to the model; raises UsageError where the method does not run in the mode.
        draws_from: Where a step is one of several, drawn: those, whose mean cost is the floor.
    """

    name: str
    build: Callable[[nn.Module, Tensor, Mode], Loss]
    draws_from: tuple[Variant, ...] = ()


def plain(name: str = "plain") -> Variant:
    """The model and the criterion."""

    def build(model: nn.Module, _: Tensor, mode: Mode) -> Loss:
        if mode == "graph":
            task = PlainTask(model, CRITERION, cuda_graph=True, device=device_of(model), verbose=False)
            return lambda x, y: task(x, y)["loss"]
        called = torch.compile(model) if mode == "compiled" else model
        return lambda x, y: CRITERION(called(x), y)

    return Variant(name, build)


def alfa(blocks: Sequence[str], *, steps: int = 1) -> Variant:
    """``AlfaTask``, all blocks together."""
    return _task(
        f"ALFA PGD-{steps}, {label(blocks)}",
        lambda model, _: AlfaTask(model, CRITERION, blocks, steps=steps, device=device_of(model), verbose=False),
    )


def l_alfa(blocks: Sequence[str], *, steps: int = 1) -> Variant:
    """``AlfaTask`` with learned strengths, all blocks together."""
    return _task(
        f"L-ALFA PGD-{steps}, {label(blocks)}",
        lambda model, _: AlfaTask(
            model, CRITERION, blocks, steps=steps, learnable=True, gamma=1.0, device=device_of(model), verbose=False
        ),
    )


def l_alfa_drawn(blocks: Sequence[str], *, steps: int = 1) -> Variant:
    """The same with one block drawn per step."""
    return _task(
        f"L-ALFA PGD-{steps}, 1 drawn of {label(blocks)}",
        lambda model, _: AlfaTask(
            model, CRITERION, blocks, steps=steps, learnable=True, gamma=1.0, sample_blocks=1, verbose=False
        ),
        draws_from=tuple(alfa([block], steps=steps) for block in blocks),
    )


def alfa_wrapper(blocks: Sequence[str], *, steps: int = 1) -> Variant:
    """``AlfaWrapper`` and ``AlfaLoss``, for loops of one's own, all blocks together."""

    def build(model: nn.Module, _: Tensor, mode: Mode) -> Loss:
        wrapper, loss = AlfaWrapper(model, CRITERION, blocks, steps=steps), AlfaLoss(CRITERION)
        if mode == "graph":
            raise UsageError("AlfaWrapper leaves its graph to the training loop, which captures nothing")
        if mode == "compiled":
            wrapper.compile()
        return lambda x, y: loss(wrapper(x, y), y).loss

    return Variant(f"ALFA (AlfaWrapper) PGD-{steps}, {label(blocks)}", build)


def noise(blocks: Sequence[str]) -> Variant:
    """``--method noise``."""
    return _task(f"noise, {label(blocks)}", lambda model, _: NoiseTask(model, CRITERION, blocks, verbose=False))


def moex(block: str) -> Variant:
    """``--method moex``."""

    def build(model: nn.Module, images: Tensor) -> MoexTask:
        try:
            exchange = Moex(model, block)
            exchange.check(model, tuple(images.shape[1:]))
        except BlockError as error:
            raise UsageError(f"--moex-block {block}: {error}") from None
        return MoexTask(model, CRITERION, exchange, verbose=False)

    return _task(f"MoEx, {block}", build)


def advprop(steps: int) -> Variant:
    """``--method advprop`` with the paper's sizes: eps 1 for one step, else one less than there are steps."""
    eps = max(1, steps - 1)
    return _task(
        f"AdvProp PGD-{steps}",
        lambda model, _: AdvPropTask(model, CRITERION, _attack(model, eps, 1, steps), verbose=False),
    )


def fast_advprop() -> Variant:
    """``--method fast-advprop``."""
    return _task(
        "Fast AdvProp", lambda model, _: FastAdvPropTask(model, CRITERION, _attack(model, 1, 1, 1), verbose=False)
    )


def pgd_at(steps: int) -> Variant:
    """``--method pgd-at``."""
    return _task(
        f"adversarial training PGD-{steps}",
        lambda model, _: PgdTask(model, CRITERION, _attack(model, 8, 2, steps), verbose=False),
    )


def training_step(loss_of: Loss, optimizer: torch.optim.Optimizer, autocast: Autocast) -> Callable[..., None]:
    """Forward, backward, optimizer step."""

    def step(images: Tensor, target: Tensor) -> None:
        with autocast():
            loss = loss_of(images, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def device_of(model: nn.Module) -> torch.device:
    """Of its first parameter."""
    return next(model.parameters()).device


def label(blocks: Sequence[str]) -> str:
    """For the name of a variant."""
    return blocks[0] if len(blocks) == 1 else f"{len(blocks)} blocks"


def _task(
    name: str, create: Callable[[nn.Module, Tensor], ClassificationTask], draws_from: tuple[Variant, ...] = ()
) -> Variant:
    def build(model: nn.Module, images: Tensor, mode: Mode) -> Loss:
        task: Any = create(model, images)
        if mode == "graph":
            if not isinstance(task, AlfaTask) or isinstance(task, NoiseTask) or task.sample_blocks is not None:
                raise UsageError("draws something in every step, which a CUDA graph would repeat")
            task.use_cuda_graph()
        if mode == "compiled":
            task.compile()
        return lambda x, y: task(x, y)["loss"]

    return Variant(name, build, draws_from)


def _attack(model: nn.Module, eps: float, alpha: float, steps: int) -> PixelAttack:
    return PixelAttack.for_model(argparse.Namespace(), model, eps=eps, alpha=alpha, steps=steps, init="uniform")
