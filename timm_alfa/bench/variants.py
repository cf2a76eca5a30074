"""What can be measured: plain training and the methods, each as one training step on a given model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..replay import Replay, watch_outputs
from ..task import AlfaTask
from ..trace import trace

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Variant:
    """A method to measure.

    Args:
        name: As in the table.
        build: (model, criterion, example) -> a function from images and targets to the loss of one step.
        floor: Shares of FLOPs behind the blocks, in order of execution -> cost in plain steps. A forward counts 1/3,
            a backward 2/3, a backward for input gradients alone 1/3.
        blocks: Which blocks it perturbs.
    """

    name: str
    build: Callable[[nn.Module, Loss, Tensor], Loss]
    floor: Callable[[Sequence[float]], float]
    blocks: tuple[str, ...] = ()


def plain(name: str = "plain") -> Variant:
    """The model, the criterion, one backward."""
    return Variant(name, lambda model, criterion, _: lambda x, y: criterion(model(x), y), lambda tails: 1.0)


def alfa(
        blocks: Sequence[str],
        *,
        steps: int = 1,
        learnable: bool = False,
        sample_blocks: int | None = None,
        grad: Any = "full",
) -> Variant:
    """``AlfaTask``."""

    def build(model: nn.Module, criterion: Loss, _: Tensor) -> Loss:
        task = AlfaTask(
            model, criterion, list(blocks), steps=steps, learnable=learnable, gamma=1.0 if learnable else 0.0,
            grad=grad, sample_blocks=sample_blocks, verbose=False,
        )
        return lambda x, y: task(x, y)["loss"]

    def floor(tails: Sequence[float]) -> float:
        share = 1.0 if sample_blocks is None else sample_blocks / len(tails)
        again = (tails[0] - tails[-1]) / 3 if len(tails) > 1 and share == 1 else 0.0  # the clean gradient by itself
        return 1 + share * sum(tails) * (1 + (steps - 1) * 2 / 3) + again

    label = f"{'L-ALFA' if learnable else 'ALFA'} PGD-{steps}, {_label(blocks)}"
    label += "" if sample_blocks is None else f", {sample_blocks} drawn"
    return Variant(label, build, floor, tuple(blocks))


def released(blocks: Sequence[str], *, steps: int = 1) -> Variant:
    """The released code's order of work: per block a forward up to it and K + 1 tails, then a clean forward."""

    def build(model: nn.Module, criterion: Loss, example: Tensor) -> Loss:
        replay = Replay(model, {name: model.get_submodule(name) for name in blocks})
        recording = replay.record((example,))  # tells replays what to leave out; its features are not used

        def loss(x: Tensor, y: Tensor) -> Tensor:
            perturbed = []
            for name in blocks:
                feature = _forward_to(model, name, x).detach()
                moved = feature.clone().requires_grad_()
                for _ in range(steps):
                    (gradient,) = torch.autograd.grad(criterion(replay.replay(recording, name, moved), y), moved)
                    moved = (moved.detach() + 0.5 / 255 * gradient.sign()).requires_grad_()
                perturbed.append((name, moved.detach()))
            outputs = [replay.replay(recording, name, value) for name, value in perturbed]
            adversarial = torch.stack([criterion(output, y) for output in outputs]).mean()
            return (criterion(model(x), y) + adversarial) / 2

        return loss

    def floor(tails: Sequence[float]) -> float:
        return 1 + sum((1 - tail) / 3 + steps * tail * 2 / 3 + tail for tail in tails)

    return Variant(f"released structure PGD-{steps}, {_label(blocks)}", build, floor, tuple(blocks))


def tail_shares(model: nn.Module, blocks: Sequence[str], example: Tensor) -> list[float]:
    """Share of the forward's FLOPs behind each block, in order of execution."""
    shares = {visit.name: visit.tail_share for visit in trace(model, example)}
    return sorted((shares[name] for name in blocks), reverse=True)


def training_step(
        loss_of: Loss,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], AbstractContextManager[Any]],
) -> Callable[[Tensor, Tensor], None]:
    """Forward, backward, optimizer step."""

    def step(images: Tensor, target: Tensor) -> None:
        with autocast():
            loss = loss_of(images, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class _Reached(Exception):
    def __init__(self, output: Any):
        self.output = output


def _forward_to(model: nn.Module, block: str, images: Tensor) -> Tensor:
    def report(name: str, module: nn.Module, output: Any) -> None:
        if name == block:
            raise _Reached(output)

    try:
        with watch_outputs(model, report):
            model(images)
    except _Reached as reached:
        output: Tensor = reached.output
        return output
    raise ValueError(f"{block!r} did not run")


def _label(blocks: Sequence[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"{len(blocks)} blocks"
