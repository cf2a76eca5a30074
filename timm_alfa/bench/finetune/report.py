"""Fine-tuning runs as a table: means over seeds, and differences in pairs of the same seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..paired import compare_pairs


def render(runs: Sequence[dict[str, Any]], against: str) -> str:
    """One table per number of images and kind of evaluation.

    Args:
        runs: As ``runs.jsonl`` has them.
        against: The arm that differences are counted from.
    """
    found: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for run in runs:
        found.setdefault((run["evaluated_on"], run["asked"]), {}).setdefault(run["arm"], {})[run["seed"]] = run
    tables = []
    for (evaluated_on, count), arms in sorted(found.items()):
        lines = [
            f"n = {count}, {evaluated_on} images, differences to `{against}` in pairs of a seed, 95 % intervals",
            "",
            "| arm | seeds | top-1 | gain | NLL | change | ECE | seconds |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        base = arms.get(against, {})
        for name, by_seed in sorted(arms.items(), key=lambda item: -_mean(item[1], "top1")):
            pairs = [(run, base[seed]) for seed, run in by_seed.items() if seed in base]
            lines.append(
                f"| `{name}` | {len(by_seed)} | {_mean(by_seed, 'top1'):.2f} ± {_deviation(by_seed):.2f} "
                f"| {_difference(pairs, 'top1', 2, name == against)} | {_mean(by_seed, 'nll'):.3f} "
                f"| {_difference(pairs, 'nll', 3, name == against)} | {_mean(by_seed, 'ece'):.1f} "
                f"| {_mean(by_seed, 'seconds'):.1f} |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _mean(runs: dict[int, dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs.values())


def _deviation(runs: dict[int, dict[str, Any]]) -> float:
    values = [run["top1"] for run in runs.values()]
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], key: str, digits: int, itself: bool) -> str:
    if itself or not pairs:
        return ""
    paired = compare_pairs([one[key] - other[key] for one, other in pairs])
    return f"{paired.mean:+.{digits}f} ({paired.low:+.{digits}f} to {paired.high:+.{digits}f})"
