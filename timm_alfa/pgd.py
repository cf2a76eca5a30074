"""Signed-gradient ascent and projections: pure tensor functions for features and pixels alike (Eq. 2 and 4).

A perturbation is a sequence of tensors, [B, ...] each, because a block may return several; its l2 norm is taken per
sample over all of them. Some may have several rows per sample, [B * N, ...], such as TNT's inner tokens. Step sizes and
radii are numbers, tensors that broadcast against [B, ...] (AdvProp's per-channel scales), or :class:`PerSample` sizes,
which follow from the feature (:mod:`timm_alfa.sizes`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from .sizes import Relative, Size, l2_norm, rms

Norm = Literal["linf", "l2"]
Init = Literal["zero", "uniform"]


@dataclass(frozen=True)
class PerSample:
    """A size of its own for every sample.

    Args:
        parts: For each tensor of the perturbation, what broadcasts against it: the size in ``linf``.
        norms: [B], the size in ``l2``.
    """

    parts: list[Tensor]
    norms: Tensor


Scale: TypeAlias = float | Tensor | PerSample

NORMS: tuple[Norm, ...] = ("linf", "l2")
INITS: tuple[Init, ...] = ("zero", "uniform")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a perturbation: at least float32, because in bfloat16 a step of 0.5/255 vanishes."""
    return torch.promote_types(dtype, torch.float32)


def absolute(size: Size, features: Sequence[Tensor]) -> Scale:
    """A size in units of the feature: a share becomes a number for every sample.

    Args:
        size: A number, or a share of the feature.
        features: [B, ...] each, the clean ones.
    """
    if not isinstance(size, Relative):
        return size
    return PerSample([size.share * part for part in rms(features)], size.share * l2_norm(features))


def zeros(features: Sequence[Tensor]) -> list[Tensor]:
    """The perturbation that every attack starts from by default."""
    return [torch.zeros_like(feature, dtype=working_dtype(feature.dtype)) for feature in features]


def uniform(features: Sequence[Tensor], eps: Scale, generator: torch.Generator | None = None) -> list[Tensor]:
    """A random start, each entry uniform in [-eps, eps]."""
    return scaled([part.uniform_(-1, 1, generator=generator) for part in zeros(features)], eps)


def scaled(parts: Sequence[Tensor], size: Scale) -> list[Tensor]:
    """Each tensor times the size."""
    return [part * own for part, own in zip(parts, _by_part(size, parts), strict=True)]


def direction(gradients: Sequence[Tensor], norm: Norm) -> list[Tensor]:
    """sgn(g) for ``linf``, g / ||g||_2 per sample for ``l2``; a zero gradient has the zero direction.

    The direction is finite whatever the gradient: where that is not a number (in ``l2``: anywhere in the sample, or
    infinite) it is zero.
    """
    gradients = [gradient.to(working_dtype(gradient.dtype)) for gradient in gradients]
    if norm == "linf":
        return [torch.sign(gradient) for gradient in gradients]
    # Scaled by the largest entry first, so that squares of tiny gradients do not underflow.
    largest = _per_sample([gradient.abs() for gradient in gradients], lambda values: values.amax(dim=1))
    scaled = [_divide(gradient, largest) for gradient in gradients]
    return [_divide(gradient, _l2(scaled)) for gradient in scaled]


def project(delta: Sequence[Tensor], eps: Scale | None, norm: Norm) -> list[Tensor]:
    """The nearest point of the ball of radius ``eps`` around 0; ``None`` means no bound."""
    if eps is None:
        return list(delta)
    if norm == "linf":
        sizes = _by_part(eps, delta)
        return [
            part.minimum(size).maximum(-size) if isinstance(size, Tensor) else part.clamp(-size, size)
            for part, size in zip(delta, sizes, strict=True)
        ]
    norms = _l2(delta)
    radius = eps.norms if isinstance(eps, PerSample) else eps
    factor = torch.clamp(radius / norms.clamp(min=torch.finfo(norms.dtype).tiny), max=1.0)
    return [part * _column(factor, part) for part in delta]


def pgd_step(
    delta: Sequence[Tensor] | None,
    gradients: Sequence[Tensor],
    *,
    alpha: Scale,
    norm: Norm = "linf",
    eps: Scale | None = None,
) -> list[Tensor]:
    """One step of Eq. 4: Proj[delta + alpha * sgn(g)], or with g / ||g||_2 for ``l2``.

    Args:
        delta: Where the step starts; ``None`` is 0.
        gradients: Of the loss with respect to ``delta``, in any positive scale.
        alpha: Step size, in units of the perturbed tensor, or per sample.
        norm: Geometry of step and ball.
        eps: Radius of the ball, or ``None`` for no bound.
    """
    ways = direction(gradients, norm)
    if norm == "l2" and isinstance(alpha, PerSample):
        sizes: list[float | Tensor] = [_column(alpha.norms, way) for way in ways]
    else:
        sizes = _by_part(alpha, ways)
    steps = [way * size if isinstance(size, Tensor) else way.mul_(size) for way, size in zip(ways, sizes, strict=True)]
    moved = steps if delta is None else [part + step for part, step in zip(delta, steps, strict=True)]
    return project(moved, eps, norm)


Search: TypeAlias = Generator[list[Tensor], Sequence[Tensor], list[Tensor]]
"""Asks for gradients, ``gradient = yield delta``, and returns the delta that it found."""


def climb(
    delta: Sequence[Tensor],
    *,
    steps: int,
    alpha: Scale,
    norm: Norm = "linf",
    eps: Scale | None = None,
    valid: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> Search:
    """``steps`` times Eq. 4 from ``delta``, as a search.

    Args:
        delta: Where to start.
        steps: How many steps, at least 0.
        alpha: Step size.
        norm: Geometry of step and ball.
        eps: Radius of the ball, or ``None``.
        valid: Applied after each projection, for perturbations that have to stay within more than a ball (pixels).
    """
    current = list(delta)
    for _ in range(steps):
        gradients = yield current
        current = pgd_step(current, gradients, alpha=alpha, norm=norm, eps=eps)
        if valid is not None:
            current = valid(current)
    return current


def follow(search: Search, gradient_at: Callable[[list[Tensor]], Sequence[Tensor]]) -> list[Tensor]:
    """What a search finds.

    Args:
        search: Which.
        gradient_at: The loss's gradient with respect to the perturbation, at a given one.
    """
    gradients: Sequence[Tensor] | None = None
    while True:
        try:
            delta = next(search) if gradients is None else search.send(gradients)
        except StopIteration as found:
            result: list[Tensor] = found.value
            return result
        gradients = gradient_at(delta)


def total(parts: Sequence[Tensor]) -> Tensor:
    """[]: the sum of all entries, finite if they are; sums near the end of float32's range may count as infinite."""
    # A sum reads each entry once, whatever the memory layout: several times quicker than isfinite().all().
    sums = [part.detach().sum(dtype=working_dtype(part.dtype)) for part in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def is_finite(parts: Sequence[Tensor]) -> Tensor:
    """[]: whether every entry is finite, as far as :func:`total` tells."""
    return total(parts).isfinite()


def l2_norms(delta: Sequence[Tensor]) -> Tensor:
    """||delta||_2 per sample, [B]."""
    return _l2(delta)


def linf_norms(delta: Sequence[Tensor]) -> Tensor:
    """||delta||_inf per sample, [B]."""
    return _per_sample([part.abs() for part in delta], lambda values: values.amax(dim=1))


def _by_part(size: Scale, parts: Sequence[Tensor]) -> list[float | Tensor]:
    if not isinstance(size, PerSample):
        return [size] * len(parts)
    return [own.to(part.dtype) for own, part in zip(size.parts, parts, strict=True)]


def _l2(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return torch.linalg.vector_norm(parts[0].flatten(1), dim=1)
    return torch.stack([torch.linalg.vector_norm(rows, dim=1) for rows in _samples(parts)]).norm(dim=0)


def _per_sample(parts: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([reduce(rows) for rows in _samples(parts)]).amax(dim=0)


def _samples(parts: Sequence[Tensor]) -> list[Tensor]:
    """Each part as [B, everything of a sample]."""
    size = min(len(part) for part in parts)
    return [part.reshape(size, -1) for part in parts]


def _column(values: Tensor, like: Tensor) -> Tensor:
    rows = values.to(like.dtype).repeat_interleave(len(like) // len(values))
    return rows.view(-1, *[1] * (like.dim() - 1))


def _divide(part: Tensor, divisors: Tensor) -> Tensor:
    quotient = part / _column(divisors.masked_fill(divisors == 0, 1), part)
    return quotient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
