"""What a perturbation does, in words: how large it is beside the feature, and how far it raises the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..engine.size_sweep import TARGET_RISE

NOTHING = 0.001  # of the feature's rms: clean and adversarial loss cannot be told apart
TOO_MUCH = 9.0  # rise of the loss; settings that gained most raise it by 1 to 8 times itself
FIRST_TRY = "2%"  # the share that gained most at most blocks tried, see results/finetune-choosing


def describe_effects(metrics: Mapping[str, float], blocks: Sequence[str]) -> str:
    """``layer3: delta 2.0% of the feature, loss +31%; layer4: ...``.

    Args:
        metrics: As an epoch's, with ``delta_ratio_<block>`` and ``loss_rise_<block>``.
        blocks: Their names; those that were not measured are left out.
    """
    parts = [
        f"{block}: delta {percent(metrics[f'delta_ratio_{block}'])} of the feature, "
        f"loss {percent(metrics[f'loss_rise_{block}'], sign=True)}"
        for block in blocks
        if metrics[f"delta_ratio_{block}"] == metrics[f"delta_ratio_{block}"]  # not NaN
    ]
    return "; ".join(parts)


def advise(
    metrics: Mapping[str, float], blocks: Sequence[str], flag: str, *, steps: int = 1, first: bool = True
) -> dict[str, str]:
    """For blocks whose perturbation does next to nothing, or too much: a line that names a value to try.

    Args:
        metrics: As an epoch's.
        blocks: Their names.
        flag: What sets the size, such as ``--alfa-alpha``.
        steps: Of the attack.
        first: Whether the metrics are a run's first. Later a clean loss near 0 can rise that far at no harm.
    """
    lines = {}
    for block in blocks:
        ratio, rise = metrics[f"delta_ratio_{block}"], metrics[f"loss_rise_{block}"]
        effect = f"{block}: delta is {percent(ratio)} of the feature and changes the loss by {percent(rise, sign=True)}"
        if ratio < NOTHING:
            lines[block] = f"{effect}, which is next to nothing; try {flag} {FIRST_TRY}"
        elif first and rise > TOO_MUCH:
            smaller = max(NOTHING, ratio / steps * TARGET_RISE / rise)  # the loss rises about as delta does
            lines[block] = f"{effect}, more than tenfold; try {flag} {percent(smaller)}"
    return lines


def percent(share: float, *, sign: bool = False) -> str:
    """Two digits: ``0.079%``, ``2%``, ``+31%``."""
    return f"{100 * share:{'+' if sign else ''}.2g}%" if abs(share) < 1 else f"{share:{'+' if sign else ''}.0%}"
