"""Gradients of attacks in float16, whose small entries underflow unless the loss is scaled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..pgd import is_finite

# A positive factor leaves a gradient's direction alone. GradScaler starts with the first of these, at which a loss that
# is a float16 number itself overflows.
SCALES = (2.0**16, 2.0**8, 1.0)


def is_float16(tensors: Iterable[Tensor]) -> bool:
    """Whether losses on these outputs and features need scaling for their gradients not to underflow."""
    return torch.float16 in {tensor.dtype for tensor in tensors}


def gradients_of(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    at_outputs: Sequence[Tensor | None] | None = None,
    *,
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, outside of autocast; ``None`` where no output depends on an input.

    Args:
        outputs: Where to start.
        inputs: Of what.
        at_outputs: Gradients at the outputs; ``None`` is 1.
        retain_graph: Whether the graph is needed afterwards.
    """
    kind = outputs[0].device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return torch.autograd.grad(outputs, inputs, at_outputs, retain_graph=retain_graph, allow_unused=True)
    return torch.autograd.grad(outputs, inputs, at_outputs, retain_graph=retain_graph, allow_unused=True)


def attack_gradients(
    loss: Tensor, inputs: Sequence[Tensor], tensors: Iterable[Tensor], *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """d loss / d inputs, outside of autocast; in float16 times the largest of some factors that does not overflow.

    Args:
        loss: Scalar.
        inputs: What the perturbation was added to, or is going to be.
        tensors: What the model returned, on which the loss is, and features on the way.
        retain_graph: Whether the graph is needed afterwards.

    Returns:
        One gradient per input, ``None`` where the loss does not depend on it.
    """
    if not is_float16(tensors):
        return gradients_of([loss], inputs, retain_graph=retain_graph)
    for scale in SCALES:
        with torch.autocast(loss.device.type, enabled=False):
            scaled = loss.float() * scale
        found = gradients_of([scaled], inputs, retain_graph=retain_graph or scale != SCALES[-1])
        reached = [gradient for gradient in found if gradient is not None]
        if not reached or is_finite(reached):
            break
    return found
