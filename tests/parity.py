"""How far gradients are from those of an independent implementation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def relative(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """||found - expected|| / ||expected||, the latter at least ``floor``."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).detach().norm()) / max(float(expected.detach().norm()), floor, 1e-300)


def gradient_errors(model: nn.Module, expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Error of each parameter's ``grad``, relative to its own norm.

    Or to a millionth of the whole gradient's norm where its own is smaller than that: the bias before a batch norm has
    a gradient of exactly zero and nothing to be relative to.

    Args:
        model: After ``backward``.
        expected: By name, for each parameter that requires a gradient.
    """
    floor = 1e-6 * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    assert floor > 0
    errors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            errors[name] = relative(found, expected[name], floor)
        else:
            assert parameter.grad is None, name
    return errors
