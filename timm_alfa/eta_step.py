"""When eta steps: exactly when the weights do.

An optimizer calls its post-step hooks after each step that it makes, and does not when ``GradScaler`` skips one. timm's
training loop never shows its optimizer to the task, so the task listens to all optimizers and picks the one that holds
the model's weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .eta import Eta
from .utils.distributed import mean_over_ranks


class EtaStepper:
    """Collects eta's gradient over the batches of an update and steps eta when the weights have stepped.

    Args:
        eta: Learnable strengths.
        weights: The model's parameters. An optimizer that holds one of them is the weights' optimizer; while their
            ``.grad`` is ``None`` a new update begins, whatever became of the last one.
    """

    def __init__(self, eta: Eta, weights: Iterable[nn.Parameter]):
        self.eta = eta
        self._weights = [weight for weight in weights if weight.requires_grad]
        self._ids = {id(weight) for weight in self._weights}
        self._sum: Tensor | None = None
        self._batches = 0

    def listen(self) -> None:
        """Step after every step of the weights' optimizer, whoever owns it, for as long as this object lives."""
        reference = weakref.ref(self)

        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            stepper = reference()
            if stepper is not None and stepper.steps_with(optimizer):
                stepper.step(optimizer)

        weakref.finalize(self, register_optimizer_step_post_hook(after_step).remove)

    def steps_with(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer holds the model's weights."""
        return any(id(parameter) in self._ids for group in optimizer.param_groups for parameter in group["params"])

    def begin_batch(self) -> None:
        """Before each forward: gradients of an update that was skipped go with the weights' own."""
        if all(weight.grad is None for weight in self._weights):
            self._sum, self._batches = None, 0

    def add(self, gradient: Tensor) -> None:
        """One batch's gradient of the objective with respect to eta, [r], not scaled. Batches are averaged."""
        self._sum = gradient.clone() if self._sum is None else self._sum + gradient
        self._batches += 1

    def step(self, optimizer: Optimizer | None = None) -> None:
        """Step eta and project it, alike on all ranks; without a gradient since the last step, do nothing."""
        if self._sum is None:
            return
        gradient = mean_over_ranks(self._sum / self._batches)
        self._sum, self._batches = None, 0
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers are stepped even if they then do nothing
        if overflow is not None and bool(torch.as_tensor(overflow).any()):
            return
        self.eta.step(gradient)
