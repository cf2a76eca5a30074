"""Gradients of attacks in float16, whose small entries underflow unless the loss is scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..pgd import is_finite

# A positive factor leaves a gradient's direction alone. GradScaler starts with the first of these, at which a loss that
# is a float16 number itself overflows.
SCALES = (2.0**16, 2.0**8, 1.0)


def is_float16(output: Any) -> bool:
    """Whether losses on these outputs and features need scaling for their gradients not to underflow."""
    return any(leaf.dtype == torch.float16 for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def attack_gradients(
    loss: Tensor, inputs: Sequence[Tensor], output: Any, *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """d loss / d inputs, outside of autocast; in float16 times the largest of some factors that does not overflow.

    Args:
        loss: Scalar.
        inputs: What the perturbation was added to, or is going to be.
        output: What the model returned, on which the loss is, and features on the way.
        retain_graph: Whether the graph is needed afterwards.

    Returns:
        One gradient per input, ``None`` where the loss does not depend on it.
    """
    with torch.autocast(loss.device.type, enabled=False):
        if not is_float16(output):
            return torch.autograd.grad(loss, inputs, retain_graph=retain_graph, allow_unused=True)
        for scale in SCALES:
            found = torch.autograd.grad(
                loss.float() * scale, inputs, retain_graph=retain_graph or scale != SCALES[-1], allow_unused=True
            )
            reached = [gradient for gradient in found if gradient is not None]
            if not reached or is_finite(reached):
                break
        return found
