"""Run a model once to learn which modules run, in which order, with which outputs and at which cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .flop_count import FlopCounter
from .interception import watch_outputs
from .random_sources import random_sources
from .randomness import RandomState, random_devices


@dataclass
class Visit:
    """What one module did in a forward.

    Args:
        name: Its name in the model.
        type: Its class.
        calls: How often it ran.
        shapes: Shapes of the floating-point tensors that it returned, without the batch dimension.
        tail_share: Share of the forward's FLOPs that came after it had finished, in [0, 1].
    """

    name: str
    type: str
    calls: int
    shapes: tuple[tuple[int, ...], ...]
    tail_share: float


def trace(model: nn.Module, input: Tensor) -> list[Visit]:
    """Every module that runs, ordered by when it finished, from one forward in evaluation mode.

    The model's mode, buffers and random state are left as they were.

    Args:
        model: Any module.
        input: One batch, [B, ...].
    """
    visits: dict[str, Visit] = {}
    finished: dict[str, int] = {}
    counter = FlopCounter()
    state = RandomState(random_devices(model, (input,)), random_sources(model))

    def note(name: str, module: nn.Module, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
        calls = visits.pop(name).calls + 1 if name in visits else 1  # popped: ordered by the last time it finished
        visits[name] = Visit(name, type(module).__name__, calls, shapes, 0.0)
        finished[name] = counter.total

    with state.left_as_is(), evaluating(model), watch_outputs(model, note), torch.no_grad(), counter:
        model(input)
    total = counter.total
    for name, visit in visits.items():
        visit.tail_share = 1 - finished[name] / total if total else 0.0
    return list(visits.values())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def blank_batch(model: nn.Module, input_size: tuple[int, ...], batch_size: int = 1) -> torch.Tensor:
    """Zeros [batch_size, *input_size], on the model's device and in its dtype."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(batch_size, *input_size, device=parameter.device, dtype=parameter.dtype)
