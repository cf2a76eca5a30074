"""What a step of every size would do: how far it raises the loss, and how many predictions it turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..loss import scalar_loss
from ..perturbation import Pgd
from ..sizes import Relative
from .core import Engine
from .half_precision import Rounding

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
TARGET_RISE = 1.5  # the best settings of results/finetune-choosing: 1.2 to 1.9 at blocks.2, more at later blocks


@dataclass
class Effect:
    """What steps of one size do at one block, on average over some batches.

    Attributes:
        share: alpha, of the feature.
        rise: By how much of itself the loss rises.
        flips: Share of predictions that change.
        survives: Share of delta that half precision leaves; NaN in float32.
    """

    share: float
    rise: float
    flips: float
    survives: float = math.nan


def sweep_sizes(
    engine: Engine,
    batches: Iterable[tuple[Any, Any]],
    *,
    shares: Sequence[float] = SHARES,
    pgd: Pgd,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, list[Effect]]:
    """Perturb every block by every size. The model's statistics and the random state stay as they are.

    Args:
        engine: Of a model in training mode.
        batches: Inputs and targets, on the model's device.
        shares: Sizes to try.
        pgd: The attack, whose size is tried.
        autocast: Makes the context of forwards.

    Returns:
        Block name -> one effect per size.
    """
    sums = {block: torch.zeros(len(shares), 3, dtype=torch.float64) for block in engine.blocks}
    rounding = Rounding(engine)
    clean_sum, count, images = 0.0, 0, 0
    own = engine.perturbation, engine.passes
    try:
        for input, target in batches:
            with autocast(), engine.statistics_kept():
                recording = engine.record(input)
                with engine.adversarial_pass(recording):
                    clean = scalar_loss(engine.criterion, recording.output, target).item()
                    chosen = _chosen(recording.output)
                    for index, share in enumerate(shares):
                        engine.perturbation = replace(pgd, alpha=Relative(share), eps=None, init="zero")
                        gradients = engine.clean_gradients(recording, target)
                        for block in engine.blocks:
                            delta = engine.find_delta(recording, block, target, gradients.get(block))
                            with torch.no_grad():
                                output = engine.adversarial_output(recording, {block: delta})
                                loss = scalar_loss(engine.criterion, output, target).item()
                            flips = int((_chosen(output) != chosen).sum())
                            survives = rounding.survival(recording, block, delta)
                            found = [loss - clean, flips, math.nan if survives is None else survives.item()]
                            sums[block][index] += torch.tensor(found, dtype=torch.float64)
            clean_sum, count, images = clean_sum + clean, count + 1, images + len(chosen)
    finally:
        engine.perturbation, engine.passes = own
    return {
        block: [
            Effect(share, rise_of(clean_sum, float(rise)), float(flips) / images, float(survives) / count)
            for share, (rise, flips, survives) in zip(shares, rows, strict=True)
        ]
        for block, rows in sums.items()
    }


def rise_of(clean: float, added: float) -> float:
    """By how much of itself a loss rises; NaN where the clean loss is 0, of which nothing is a share.

    Args:
        clean: The clean loss.
        added: What comes on top of it.
    """
    return added / abs(clean) if clean else math.nan


def propose(effects: Sequence[Effect]) -> Effect | None:
    """The size whose rise is nearest to :data:`TARGET_RISE`, by ratio; None where no size raises the loss at all."""
    rising = [effect for effect in effects if effect.rise > 0]
    return min(rising, key=lambda effect: abs(math.log(effect.rise / TARGET_RISE)), default=None)


def _chosen(output: Any) -> Tensor:
    """The predicted class of every sample."""
    logits = output[0] if isinstance(output, (tuple, list)) else output
    chosen: Tensor = logits.detach().argmax(dim=-1)
    return chosen
