"""What a perturbation does, in words: its size beside the feature, what half precision leaves, how the loss rises."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..engine.size_sweep import TARGET_RISE

NOTHING = 0.001  # of the feature's rms: clean and adversarial loss cannot be told apart
TOO_MUCH = 9.0  # rise of the loss; settings that gained most raise it by 1 to 8 times itself
FIRST_TRY = 0.02  # the share that gained most at most blocks tried, see results/finetune-choosing
ENOUGH = 0.5  # of delta survives half precision


def describe_effects(metrics: Mapping[str, float], blocks: Sequence[str], half: torch.dtype | None = None) -> str:
    """``layer3: delta 2% of the feature, 93% of it survives bfloat16, loss +31%; layer4: ...``.

    Args:
        metrics: As an epoch's, with ``delta_ratio_<block>``, ``loss_rise_<block>`` and, in half precision,
            ``delta_survives_<block>``.
        blocks: Their names; those that were not measured are left out.
        half: The half precision at work.
    """
    parts = []
    for block in blocks:
        ratio, rise, survives = _effects(metrics, block)
        if math.isnan(ratio):
            continue
        rounded = "" if math.isnan(survives) else f"{percent(survives)} of it survives {name_of(half)}, "
        parts.append(f"{block}: delta {percent(ratio)} of the feature, {rounded}loss {percent(rise, sign=True)}")
    return "; ".join(parts)


def advise(
    metrics: Mapping[str, float],
    blocks: Sequence[str],
    flag: str,
    *,
    steps: int = 1,
    first: bool = True,
    half: torch.dtype | None = None,
) -> dict[str, str]:
    """For blocks whose perturbation does next to nothing or too much, or is mostly rounded away: a value to try.

    Args:
        metrics: As an epoch's.
        blocks: Their names.
        flag: What sets the size, such as ``--alfa-alpha``.
        steps: Of the attack.
        first: Whether the metrics are a run's first. Later a clean loss near 0 can rise that far at no harm.
        half: The half precision at work.
    """
    lines = {}
    for block in blocks:
        ratio, rise, survives = _effects(metrics, block)
        lost = survives < ENOUGH
        rounded = f", of which {percent(survives)} survives {name_of(half)}," if lost else ""
        effect = (
            f"{block}: delta is {percent(ratio)} of the feature{rounded} and changes the loss by "
            f"{percent(rise, sign=True)}"
        )
        if ratio < NOTHING:
            lines[block] = f"{effect}, which is next to nothing; try {flag} {percent(FIRST_TRY)}"
        elif first and rise > TOO_MUCH:
            smaller = max(NOTHING, ratio / steps * TARGET_RISE / rise)  # the loss rises about as delta does
            lines[block] = f"{effect}, more than tenfold; try {flag} {percent(smaller)}"
        elif lost:
            larger = min(max(FIRST_TRY, 2 * ratio / steps), 1.0)
            lines[block] = f"{effect}; try {flag} {percent(larger)}, or float32 (without --amp and --model-dtype)"
    return lines


def name_of(half: torch.dtype | None) -> str:
    """``bfloat16``."""
    return str(half).removeprefix("torch.") if half is not None else "half precision"


def _effects(metrics: Mapping[str, float], block: str) -> tuple[float, float, float]:
    """Ratio, rise and share that survives, NaN where it was not measured, as in float32."""
    survives = metrics.get(f"delta_survives_{block}", math.nan)
    return metrics[f"delta_ratio_{block}"], metrics[f"loss_rise_{block}"], survives


def percent(share: float, *, sign: bool = False) -> str:
    """Two digits: ``0.079%``, ``2%``, ``+31%``."""
    return f"{100 * share:{'+' if sign else ''}.2g}%" if abs(share) < 0.995 else f"{share:{'+' if sign else ''}.0%}"
