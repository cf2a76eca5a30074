"""The projection onto the probability simplex by sorting, exact up to rounding; fractions make it exact altogether."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def project_simplex_by_sorting(values: Sequence[float]) -> list[float]:
    """max(v - tau, 0) with the one tau that makes the sum 1, in rational arithmetic."""
    exact = [Fraction(value) for value in values]
    total, tau = Fraction(0), Fraction(0)
    for count, value in enumerate(sorted(exact, reverse=True), start=1):
        total += value
        candidate = (total - 1) / count
        if value > candidate:
            tau = candidate
    return [float(max(value - tau, Fraction(0))) for value in exact]
