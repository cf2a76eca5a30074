"""Losses of a batch whose last images have no label: [labelled, unlabelled], with a target for the first alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class LabelledLoss(nn.Module):
    """The criterion on the images that have a target.

    Args:
        criterion: (output, target) -> scalar.
    """

    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar.

        Args:
            output: Logits [B + U, num_classes].
            target: [B] or [B, num_classes], of the first B.
        """
        return self.criterion(output[: len(target)], target)


class VirtualLoss(LabelledLoss):
    """What an attack raises: the criterion, and for images without a target the cross-entropy with the likeliest class.

    VAT (Miyato et al. 2018) raises the divergence from the model's own prediction, whose gradient is zero at delta = 0.
    The likeliest class has one from the first step on, but the clean pass has none of it: the attack starts at random.
    """

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar.

        Args:
            output: Logits [B + U, num_classes].
            target: [B] or [B, num_classes], of the first B.
        """
        loss, others = super().forward(output, target), output[len(target) :]
        if not len(others):
            return loss
        wide = others.to(torch.promote_types(others.dtype, torch.float32))
        return loss + functional.cross_entropy(wide, others.argmax(1))
