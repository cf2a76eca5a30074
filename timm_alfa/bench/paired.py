"""Means over seeds, and the paired t-test, without scipy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """Differences of pairs, such as accuracies of two methods with the same seed.

    Args:
        count: Pairs.
        mean: Of the differences.
        low: Lower end of the 95 % confidence interval of the mean; nan for a single pair.
        high: Its upper end.
        p: Two-sided probability of so large a mean if there were no difference; nan for a single pair.
    """

    count: int
    mean: float
    low: float
    high: float
    p: float


def compare_pairs(differences: Sequence[float]) -> Paired:
    """Paired t-test of ``differences``, of which there is at least one."""
    count, mean = len(differences), statistics.fmean(differences)
    if count < 2:
        return Paired(count, mean, math.nan, math.nan, math.nan)
    error = statistics.stdev(differences) / math.sqrt(count)
    half = t_quantile(0.975, count - 1) * error
    if error == 0:
        p = 1.0 if mean == 0 else 0.0
    else:
        p = 1 - t_within(abs(mean) / error, count - 1)
    return Paired(count, mean, mean - half, mean + half, p)


def t_within(t: float, degrees: int) -> float:
    """Probability that Student's t with ``degrees`` of freedom lies in -t..t (the finite sums for whole degrees)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if degrees % 2 else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(3 if degrees % 2 else 2, degrees - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return (2 / math.pi) * (angle + sine * total) if degrees % 2 else sine * total


def t_quantile(probability: float, degrees: int) -> float:
    """Value below which Student's t lies with ``probability``, in 0.5..1, by bisection."""
    low, high = 0.0, 1.0
    while t_within(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if t_within(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return high
