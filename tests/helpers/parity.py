"""How far gradients are from those of an independent implementation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def relative(found: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    """||found - expected|| / ||expected||, the latter at least ``floor``; no gradient counts as zero."""
    expected = torch.zeros(()) if expected is None else expected.detach()
    found = torch.zeros_like(expected) if found is None else found.detach()
    return float((found - expected).norm()) / max(float(expected.norm()), floor, 1e-300)


def lively(model: nn.Module) -> nn.Module:
    """In place: batch norms that do not start at zero, where wrong gradients would go unseen."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            drawn = nn.init.uniform_(torch.empty_like(module.weight, device="cpu"), 0.5, 1.5)
            module.weight.data.copy_(drawn)  # the same on every device
    return model


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
