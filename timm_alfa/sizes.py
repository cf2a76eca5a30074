"""Sizes of perturbations: in units of the feature, or as a share of it (``2%``).

The same alpha means something else in every model, block and epoch: 0.5/255 at the last block of a trained ResNet-20s
is 0.08 % of the feature's rms. A share means the same everywhere, and a network cannot shrink it by scaling the feature
up. With N entries ||f||_2 = sqrt(N) rms(f), so a share moves delta's rms by the same part of f in either norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

_SHARE = re.compile(r"(\d+(\.\d*)?|\.\d+)%")


@dataclass(frozen=True)
class Relative:
    """A share of the feature's size, per sample.

    Args:
        share: 0 to 1; 0.02 is 2 %.

    Raises:
        ValueError: It is not in this range.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"expected a share of 0% to 100%, found {100 * self.share:g}%")

    def __str__(self) -> str:
        return f"{100 * self.share:.6g}%"


Size: TypeAlias = float | Relative


def parse_size(value: float | str | Relative) -> Size:
    """A number, or a share such as ``"2%"``.

    Raises:
        ValueError: Text that is no share of 0% to 100%. TypeError: Neither a number nor text.
    """
    if isinstance(value, Relative):
        return value
    if isinstance(value, str):
        if not _SHARE.fullmatch(value):
            raise ValueError(f"expected a number, or a share such as '2%', found {value!r}")
        return Relative(float(value[:-1]) / 100)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, or a share such as '2%', found {value!r}")
    return float(value)


def checked_size(name: str, value: float | str | Relative, expected: str, *, positive: bool = False) -> Size:
    """A size that is finite and not negative.

    Args:
        name: Of the argument, for the message.
        value: What was given.
        expected: What numbers are right, for the message.
        positive: Whether 0 is too small.

    Raises:
        ValueError, TypeError: It is not.
    """
    try:
        size = parse_size(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from None
    number = size.share if isinstance(size, Relative) else size
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name}: expected {expected}, found {value}")
    return size


def describe_size(size: Size) -> str:
    """For logs: ``2%``, or in 1/255 as the paper writes it."""
    return str(size) if isinstance(size, Relative) else f"{size * 255:.4g}/255"


def rms(features: Sequence[Tensor]) -> list[Tensor]:
    """The root mean square of each sample of each tensor, detached, [B, 1, ...]; one per row where rows share a sample.

    In token sequences [B, N, C] a token whose entries are all 0 is padding and does not count; class token and patches
    share one scale. Elsewhere zeros, those of a ReLU for one, are values like others.

    Args:
        features: [B, ...] each, or [B * M, ...] where a sample has several rows.
    """
    samples = min(len(part) for part in features)
    return [_column(_mean_square(part, samples).sqrt(), part) for part in features]


def l2_norm(features: Sequence[Tensor]) -> Tensor:
    """||f||_2 of each sample over all tensors, detached, [B]."""
    samples = min(len(part) for part in features)
    squares = [_wide(part).reshape(samples, -1).square().sum(dim=1) for part in features]
    return torch.stack(squares).sum(dim=0).sqrt()


def _mean_square(part: Tensor, samples: int) -> Tensor:
    values = _wide(part)
    total = values.reshape(samples, -1).square().sum(dim=1)
    if part.dim() != 3:
        return total / (values.numel() / samples)
    tokens = (values != 0).any(dim=2).reshape(samples, -1).sum(dim=1)  # all of a sample's rows
    return total / (tokens * part.shape[2]).clamp(min=1)


def _wide(part: Tensor) -> Tensor:
    """At least float32: squares of float16 overflow."""
    return part.detach().to(torch.promote_types(part.dtype, torch.float32))


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.repeat_interleave(len(like) // len(values)).view(-1, *[1] * (like.dim() - 1))
