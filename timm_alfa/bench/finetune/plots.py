"""Fine-tuning runs as pictures: gains of arms, gain against alpha, accuracy against images, reliability."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...sizes import Relative, parse_size
from ..paired import compare_pairs
from .run import Arm

SHOWN = 6  # arms in the pictures that show some of them


def draw(folder: Path, runs: Sequence[dict[str, Any]], against: str) -> list[Path]:
    """Whatever the runs have enough of.

    Args:
        folder: Where to.
        runs: As ``runs.jsonl`` has them.
        against: The arm that gains are counted from.

    Returns:
        The pictures; none without matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return []
    pictures = [
        _gains(folder, runs, against),
        _gain_against_alpha(folder, runs, against),
        _accuracy(folder, runs),
        _reliability(folder, runs, against),
    ]
    return [picture for picture in pictures if picture is not None]


def _gains(folder: Path, runs: Sequence[dict[str, Any]], against: str) -> Path | None:
    """Every arm's gain with its 95 % interval, a panel per number of images; of arms with at least three pairs."""
    panels: dict[int, list[tuple[str, Any]]] = {}
    for asked in sorted({run["asked"] for run in runs}):
        chosen = [run for run in runs if run["asked"] == asked]
        base = {run["seed"]: run["top1"] for run in chosen if run["arm"] == against}
        for name in dict.fromkeys(run["arm"] for run in chosen if run["arm"] != against):
            pairs = [run["top1"] - base[run["seed"]] for run in chosen if run["arm"] == name and run["seed"] in base]
            if len(pairs) > 2:
                panels.setdefault(asked, []).append((f"{name} ({len(pairs)})", compare_pairs(pairs)))
    if not panels:
        return None
    from matplotlib.figure import Figure

    rows = [len(arms) for arms in panels.values()]
    height = 0.32 * sum(rows) + 0.8 * len(rows)
    figure = Figure(figsize=(7, height), layout="constrained", dpi=120)
    grid = figure.subplots(len(rows), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": rows})
    for axes, (asked, arms) in zip(grid[:, 0], panels.items(), strict=True):
        arms.sort(key=lambda arm: arm[1].mean)
        for place, (name, paired) in enumerate(arms):
            spread = [[paired.mean - paired.low], [paired.high - paired.mean]]
            color = "C0" if name.startswith("alfa") else "0.45"
            axes.errorbar(paired.mean, place, xerr=spread, fmt="o", color=color, capsize=3, markersize=4, linewidth=1.2)
        axes.set_yticks(range(len(arms)), [name for name, _ in arms], fontsize=8)
        axes.set_ylim(-0.6, len(arms) - 0.4)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.set_title(f"n = {asked}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1, 0].set_xlabel(f"gain in top-1 over {against}, 95 % interval (pairs)")
    return _save(figure, folder / "gains.png")


def _gain_against_alpha(folder: Path, runs: Sequence[dict[str, Any]], against: str) -> Path | None:
    """A line per block, for the number of images that has most runs."""
    asked = statistics.mode(run["asked"] for run in runs)
    chosen = [run for run in runs if run["asked"] == asked]
    base = {run["seed"]: run for run in chosen if run["arm"] == against}
    lines: dict[tuple[str, str], list[tuple[float, Any]]] = {}
    for name in sorted({run["arm"] for run in chosen}):
        arm = Arm.parse(name)
        plain = Arm(name, arm.method, arm.block, arm.alpha)
        size = parse_size(arm.alpha)
        if arm.method not in ("alfa", "noise") or arm != plain or not isinstance(size, Relative) or not size.share:
            continue
        gains = [
            run["top1"] - base[run["seed"]]["top1"] for run in chosen if run["arm"] == name and run["seed"] in base
        ]
        if gains:
            lines.setdefault((arm.block, arm.method), []).append((100 * size.share, compare_pairs(gains)))
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure, axes = _figure()
    blocks = sorted({block for block, _ in lines})
    for index, ((block, method), points) in enumerate(sorted(lines.items())):
        points.sort(key=lambda point: point[0])
        x = [share * (1 + 0.03 * index) for share, _ in points]  # beside each other
        y = [paired.mean for _, paired in points]
        spread = [[p.mean - p.low for _, p in points], [p.high - p.mean for _, p in points]]
        style = {"linestyle": "-", "marker": "o"} if method == "alfa" else {"linestyle": ":", "marker": "x"}
        style |= {"color": f"C{blocks.index(block)}", "label": f"{method} {block}"}
        axes.errorbar(x, y, yerr=spread, capsize=2, linewidth=1.2, markersize=4, **style)
    axes.axhline(0, color="0.6", linewidth=0.8)
    shares = sorted({share for points in lines.values() for share, _ in points})
    axes.set(xscale="log", xlabel="alpha (% of the feature's rms)", ylabel="gain in top-1", title=f"n = {asked}")
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, folder / "gain-against-alpha.png")


def _accuracy(folder: Path, runs: Sequence[dict[str, Any]]) -> Path | None:
    """A line per arm over numbers of images."""
    counts = sorted({run["asked"] for run in runs})
    means = {
        name: [_mean(runs, name, count, "top1") for count in counts]
        for name in dict.fromkeys(run["arm"] for run in runs)
    }
    shown = [name for name, values in means.items() if sum(value is not None for value in values) > 1][:SHOWN]
    if len(counts) < 2 or not shown:
        return None
    figure, axes = _figure()
    for name in shown:
        points = [(count, value) for count, value in zip(counts, means[name], strict=True) if value is not None]
        axes.plot(*zip(*points, strict=True), ".-", label=name)
    axes.set(xscale="log", xlabel="training images", ylabel="top-1 (%)")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, folder / "accuracy-against-n.png")


def _reliability(folder: Path, runs: Sequence[dict[str, Any]], against: str) -> Path | None:
    """Accuracy against confidence, in bins, of the compared arm and the ones with the lowest NLL."""
    asked = statistics.mode(run["asked"] for run in runs)
    names = dict.fromkeys(run["arm"] for run in runs if run["asked"] == asked)
    nll = {name: _mean(runs, name, asked, "nll") for name in names}
    best = sorted((name for name in names if name != against), key=lambda name: nll[name] or 0)[: SHOWN // 2]
    figure, axes = _figure()
    for name in ([against] if against in names else []) + best:
        bins = [run["bins"] for run in runs if run["arm"] == name and run["asked"] == asked]
        totals = [[sum(row[place][part] for row in bins) for part in range(3)] for place in range(len(bins[0]))]
        points = [(sure / count, hits / count) for count, sure, hits in totals if count >= 20]
        axes.plot(*zip(*points, strict=True), ".-", label=name)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    axes.set(xlabel="confidence", ylabel="share that is right", title=f"n = {asked}")
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, folder / "reliability.png")


def _mean(runs: Sequence[dict[str, Any]], arm: str, asked: int, key: str) -> float | None:
    values = [run[key] for run in runs if run["arm"] == arm and run["asked"] == asked]
    return statistics.fmean(values) if values else None


def _figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path
