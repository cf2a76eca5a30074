"""Times of several functions, taken in turns, as ratios to the first with confidence intervals."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Median time of one function and its ratio to the first.

    Args:
        seconds: Median.
        ratio: Median of the rounds' ratios.
        low, high: 95% bootstrap interval of that median.
        rounds: How many rounds were taken.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    rounds: int


def compare(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    device: torch.device | None = None,
    seed: int = 0,
) -> dict[str, Ratio]:
    """Call every function once per round, in a new random order each time.

    Args:
        functions: Name -> function; ratios are to the first.
        rounds: How many times to call each.
        warmup: Rounds before that, which do not count.
        device: An accelerator to wait for before the clock is read.
        seed: Of the orders and the bootstrap.
    """
    order = random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(warmup + rounds):
        for name in order.sample(list(functions), len(functions)):
            start = _now(device)
            functions[name]()
            if index >= warmup:
                times[name].append(_now(device) - start)
                continue
            _now(device)
    base = next(iter(times.values()))
    return {name: _ratio(values, base, order) for name, values in times.items()}


def _ratio(values: Sequence[float], base: Sequence[float], order: random.Random) -> Ratio:
    ratios = [value / other for value, other in zip(values, base, strict=True)]
    medians = sorted(statistics.median(order.choices(ratios, k=len(ratios))) for _ in range(1000))
    return Ratio(statistics.median(values), statistics.median(ratios), medians[25], medians[974], len(ratios))


def _now(device: torch.device | None) -> float:
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()
