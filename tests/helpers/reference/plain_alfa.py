"""ALFA by the book: one full forward per attack step and per term, a forward hook that adds the perturbation, and
``autograd.grad``. Slow, and nothing about it is clever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rng import rng_state, set_rng_state
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass
class PlainResult:
    """Everything a step yields; ``deltas`` are lists because a block may return several tensors."""

    loss: Tensor
    clean: Tensor
    output: Any
    adversarial: dict[str, Tensor]
    deltas: dict[str, list[Tensor]]
    gradients: dict[str, Tensor]


def plain_alfa(
    model: nn.Module,
    criterion: Callable[[Any, Any], Tensor],
    input: Any,
    target: Any,
    blocks: Sequence[str],
    *,
    alpha: float,
    steps: int,
    eps: float | None = None,
    norm: str = "linf",
    start: Mapping[str, Sequence[Tensor]] | None = None,
    grad: str = "full",
    lam: float = 1.0,
    reduction: str = "sum",
    strengths: Mapping[str, float] | None = None,
    others: Mapping[str, Tensor] | None = None,
    relative: bool = False,
) -> PlainResult:
    """One training step's loss, perturbations and gradients (``Parameter.grad`` is not used).

    ``others`` are leaves outside of the model whose gradients are asked for too. ``relative``: alpha and eps are shares
    of each sample's feature.

    Every pass starts from the random state of the clean one; buffers move with the clean pass only.
    """
    device = next(model.parameters()).device
    state = rng_state(device)
    output = model(input)
    end = rng_state(device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    clean = criterion(output, target)

    deltas, adversarial = {}, {}
    for block in blocks:
        delta = list(start[block]) if start else [torch.zeros_like(part) for part in feature_of(model, input, block)]
        for _ in range(steps):
            leaves = [part.detach().requires_grad_() for part in delta]
            set_rng_state(state, device)
            loss = criterion(forward_with(model, input, block, leaves, detach=True), target)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            ways = direction(gradients, norm)
            if relative:
                set_rng_state(state, device)
                sizes = sizes_of(feature_of(model, input, block), norm)
                delta = [part + alpha * size * way for part, size, way in zip(delta, sizes, ways, strict=True)]
                if eps is not None:
                    delta = into_relative_ball(delta, eps, sizes, norm)
                continue
            delta = [part + alpha * way for part, way in zip(delta, ways, strict=True)]
            if eps is not None:
                delta = into_ball(delta, eps, norm)
        deltas[block] = delta
        strength = strengths[block] if strengths else 1.0
        set_rng_state(state, device)
        perturbed = forward_with(model, input, block, [strength * part for part in delta], detach=grad == "tail")
        adversarial[block] = criterion(perturbed, target)

    if reduction == "sum":
        loss = clean + lam * sum(adversarial.values())
    else:
        loss = (clean + lam * sum(adversarial.values()) / len(adversarial)) / (1 + lam)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named |= others or {}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    set_rng_state(end, device)
    return PlainResult(loss, clean, output, adversarial, deltas, dict(zip(named, found, strict=True)))


def forward_with(model: nn.Module, input: Any, block: str, delta: Sequence[Tensor], *, detach: bool) -> Any:
    """A full forward in which ``block`` returns its output plus ``delta``."""

    def add(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        leaves, spec = tree_flatten(output)
        remaining = iter(delta)
        return tree_unflatten(
            [(leaf.detach() if detach else leaf) + next(remaining) if is_feature(leaf) else leaf for leaf in leaves],
            spec,
        )

    handle = model.get_submodule(block).register_forward_hook(add)
    try:
        return model(input)
    finally:
        handle.remove()


def feature_of(model: nn.Module, input: Any, block: str) -> list[Tensor]:
    """Copies of the floating-point tensors that ``block`` returns."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.extend(leaf.detach().clone() for leaf in tree_flatten(output)[0] if is_feature(leaf))

    handle = model.get_submodule(block).register_forward_hook(keep)
    try:
        model(input)
    finally:
        handle.remove()
    return found


def is_feature(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def direction(gradients: Sequence[Tensor], norm: str) -> list[Tensor]:
    """sgn(g), or g over its l2 norm, sample by sample over all tensors."""
    if norm == "linf":
        return [gradient.sign() for gradient in gradients]
    results = [torch.zeros_like(gradient) for gradient in gradients]
    for sample in range(len(gradients[0])):
        length = sum(float(gradient[sample].square().sum()) for gradient in gradients) ** 0.5
        for result, gradient in zip(results, gradients, strict=True):
            if length > 0:  # stochastic depth may leave a sample without a gradient
                result[sample] = gradient[sample] / length
    return results


def into_ball(delta: Sequence[Tensor], eps: float, norm: str) -> list[Tensor]:
    """The nearest point of the ball of radius ``eps``."""
    if norm == "linf":
        return [torch.clamp(part, -eps, eps) for part in delta]
    results = [part.clone() for part in delta]
    for sample in range(len(delta[0])):
        length = sum(float(part[sample].square().sum()) for part in delta) ** 0.5
        for result in results:
            if length > eps:
                result[sample] *= eps / length
    return results


def sizes_of(feature: Sequence[Tensor], norm: str) -> list[Tensor]:
    """Per tensor, what broadcasts against it: rms of each sample, or the l2 norm of each sample over all tensors."""
    sizes = [part.new_zeros(len(part), *[1] * (part.dim() - 1)) for part in feature]
    for sample in range(len(feature[0])):
        length = sum(float(part[sample].square().sum()) for part in feature) ** 0.5
        for size, part in zip(sizes, feature, strict=True):
            size[sample] = float(part[sample].square().mean()) ** 0.5 if norm == "linf" else length
    return sizes


def into_relative_ball(delta: list[Tensor], eps: float, sizes: Sequence[Tensor], norm: str) -> list[Tensor]:
    """The nearest point of a ball of its own for each sample."""
    if norm == "linf":
        return [torch.clamp(part, -eps * size, eps * size) for part, size in zip(delta, sizes, strict=True)]
    results = [part.clone() for part in delta]
    for sample in range(len(delta[0])):
        length = sum(float(part[sample].square().sum()) for part in delta) ** 0.5
        radius = eps * float(sizes[0][sample].flatten()[0])
        for result in results:
            if length > radius:
                result[sample] *= radius / length
    return results
