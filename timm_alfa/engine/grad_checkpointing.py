"""Gradient checkpointing, as timm does it, where parts of a model are run again by themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.utils.checkpoint
from torch import nn

from .inventory import Inventory


@contextmanager
def without_checkpointing(inventory: Inventory) -> Iterator[None]:
    """Replays keep what their tails compute: a recomputation in backward would not see the perturbation."""
    enabled = inventory.checkpointing()
    try:
        for module in enabled:
            module.grad_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in enabled:
            module.grad_checkpointing = True  # type: ignore[assignment]


def inside_checkpoint() -> bool:
    """Whether the code that runs now was called by ``torch.utils.checkpoint``; torch itself does not tell."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None


def last_of_sequence(model: nn.Module, block: nn.Module) -> nn.Module:
    """With gradient checkpointing timm calls the children of a ``Sequential``, not itself: its output is the last's."""
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        while type(block).forward is nn.Sequential.forward and len(block._modules):
            block = list(block.children())[-1]
    return block
