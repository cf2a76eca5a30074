"""A stand-in with the order of work of the authors' released code, to compare costs with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.interception import watch_outputs
from ..engine.replay import Replay
from ..errors import UsageError
from .variants import CRITERION, Loss, Mode, Variant, label


def released(blocks: Sequence[str], *, steps: int = 1) -> Variant:
    """Per block a forward up to it and K + 1 tails from its detached output, then a clean forward; the mean loss."""

    def build(model: nn.Module, example: Tensor, mode: Mode) -> Loss:
        if mode != "eager":
            raise UsageError("runs eagerly, as its original does")
        replay = Replay(model, {name: model.get_submodule(name) for name in blocks})
        recording = replay.record((example,))  # tells replays what to leave out; its features are not used

        def loss(x: Tensor, y: Tensor) -> Tensor:
            perturbed = []
            for name in blocks:
                feature = _forward_to(model, name, x).detach()
                moved = feature.clone().requires_grad_()
                for _ in range(steps):
                    (gradient,) = torch.autograd.grad(CRITERION(replay.replay(recording, name, moved), y), moved)
                    moved = (moved.detach() + 0.5 / 255 * gradient.sign()).requires_grad_()
                perturbed.append((name, moved.detach()))
            outputs = [replay.replay(recording, name, value) for name, value in perturbed]
            adversarial = torch.stack([CRITERION(output, y) for output in outputs]).mean()
            return (CRITERION(model(x), y) + adversarial) / 2

        return loss

    return Variant(f"released structure PGD-{steps}, {label(blocks)}", build)


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
