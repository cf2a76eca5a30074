"""Accuracy on images as they are and attacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.trace import evaluating
from ..tasks.pixels import PixelAttack


def robust_accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    attack: PixelAttack,
    *,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Accuracy in evaluation mode on images as they are and attacked, the attack raising the cross-entropy.

    Args:
        model: On the device of the batches; its mode, weights and gradients are left as they were.
        batches: Of normalised images [B, C, H, W] and class indices [B].
        attack: Of the images.
        seed: Of the attack's random starts.
        autocast: Makes the context of a forward.

    Returns:
        ``top1`` and ``robust_top1`` in percent, and the number of ``images``.

    Raises:
        ValueError: There are no images.
    """
    clean, robust, images = 0, 0, 0
    generator: torch.Generator | None = None
    with evaluating(model):
        for input, target in batches:
            if generator is None:
                generator = torch.Generator(input.device).manual_seed(seed)
            with torch.enable_grad(), autocast():
                perturbed = attack(model, nn.functional.cross_entropy, input, target, generator)
            with torch.no_grad(), autocast():
                clean += _correct(model(input), target)
                robust += _correct(model(perturbed), target)
            images += len(target)
    if not images:
        raise ValueError("batches: expected at least one image, found none")
    return {"top1": 100 * clean / images, "robust_top1": 100 * robust / images, "images": images}


def _correct(output: Any, target: Tensor) -> int:
    output = output[0] if isinstance(output, (tuple, list)) else output
    return int((output.argmax(dim=1) == target).sum())
