"""eta, the strengths of L-ALFA: one number per block, its projections, and the SGD that learns it (Eq. 5, Algorithm 1).

P = {eta : sum(eta) = 1} as Eq. 5 writes it is a hyperplane, and the released code projects onto that. "The bisection
method" that Algorithm 1 names is for the probability simplex, which also asks for eta >= 0. Both are here.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from .utils.distributed import mean_over_ranks

EtaSet = Literal["hyperplane", "simplex"]
ETA_SETS: tuple[EtaSet, ...] = ("hyperplane", "simplex")


def project_hyperplane(eta: Tensor) -> Tensor:
    """The nearest point with sum 1: eta - (sum(eta) - 1) / r. Entries may be negative.

    Args:
        eta: [r], r at least 1.
    """
    _check_vector(eta)
    projected = eta - (eta.sum() - 1) / eta.numel()
    # A second pass takes off what rounding left of the first, which matters for entries far above 1.
    return projected - (projected.sum() - 1) / eta.numel()


def project_simplex(eta: Tensor) -> Tensor:
    """The nearest point with sum 1 and no negative entry, max(eta - tau, 0), with tau found by bisection.

    The sum of max(eta - tau, 0) falls as tau rises, from at least 1 at max(eta) - 1 to 0 at max(eta).

    Args:
        eta: [r], r at least 1.
    """
    _check_vector(eta)
    values = eta.to(torch.float64) if eta.device.type != "mps" else eta
    shifted = values - values.max()  # tau lies in [-1, 0]; a shift by a constant changes no projection
    low, high = shifted.new_tensor(-1.0), shifted.new_tensor(0.0)
    for _ in range(80):
        middle = (low + high) / 2
        above = (shifted - middle).clamp(min=0).sum() >= 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    support = shifted > low
    tau = (shifted[support].sum() - 1) / support.sum()  # exact, once the support is known
    projected = (shifted - tau).clamp(min=0)
    return (projected / projected.sum()).to(eta.dtype)


PROJECTIONS = {"hyperplane": project_hyperplane, "simplex": project_simplex}


class Eta:
    """The strengths eta in R^r, of ALFA (all ones) or L-ALFA (learned, from 1/r).

    Learned values have their own SGD with momentum and a constant learning rate, outside the weights' optimizer, and
    are projected onto P after every step. They are kept in float64.

    Args:
        blocks: The r blocks' names.
        learnable: Whether to learn them.
        eta_set: P, ``"hyperplane"`` or ``"simplex"``.
        lr: Learning rate, positive.
        momentum: In [0, 1).

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        *,
        learnable: bool = False,
        eta_set: EtaSet = "hyperplane",
        lr: float = 0.01,
        momentum: float = 0.9,
    ):
        if eta_set not in ETA_SETS:
            raise ValueError(f"eta_set: expected one of {', '.join(ETA_SETS)}, found {eta_set!r}")
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"eta_lr: expected a finite learning rate above 0, found {lr}")
        self.blocks = list(blocks)
        self.learnable = learnable
        self.eta_set = eta_set
        self.lr = lr
        self.momentum = momentum
        start = 1 / len(self.blocks) if learnable else 1.0
        self.values = torch.full((len(self.blocks),), start, dtype=torch.float64, requires_grad=learnable)
        self.velocity = torch.zeros_like(self.values, requires_grad=False)

    def to(self, device: torch.device) -> Eta:
        """Move to a device, in place."""
        if self.values.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.values = self.values.detach().to(device, dtype).requires_grad_(self.learnable)
            self.velocity = self.velocity.to(device, dtype)
        return self

    def step(self, gradient: Tensor) -> None:
        """One SGD step with momentum, then the projection onto P. A gradient that is not finite moves nothing.

        Args:
            gradient: Of the objective with respect to eta, [r].
        """
        with torch.no_grad():
            velocity = self.momentum * self.velocity + gradient.to(self.velocity)
            moved = PROJECTIONS[self.eta_set](self.values - self.lr * velocity)
            finite = moved.isfinite().all()  # not asked for by the host, which would have to wait for the device
            self.velocity.copy_(torch.where(finite, velocity, self.velocity))
            self.values.copy_(torch.where(finite, moved, self.values))

    def state_dict(self) -> dict[str, Any]:
        """Names, values and momentum, safe for ``torch.load(weights_only=True)``."""
        return {
            "blocks": list(self.blocks),
            "eta": self.values.detach().cpu().clone(),
            "velocity": self.velocity.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: It belongs to another list of blocks.
        """
        if list(state["blocks"]) != self.blocks:
            raise ValueError(
                f"eta was learned for the blocks {', '.join(state['blocks'])} "
                f"but this run perturbs {', '.join(self.blocks)}; name the same blocks in the same order"
            )
        with torch.no_grad():
            self.values.copy_(state["eta"])
            self.velocity.copy_(state["velocity"])


class EtaStepper:
    """Collects eta's gradient over the batches of an update and steps eta exactly when the weights have stepped.

    An optimizer calls its post-step hooks after each step that it makes, and does not when ``GradScaler`` skips one.
    timm's training loop never shows its optimizer to the task, so the task listens to all optimizers and picks the one
    that holds the model's weights.

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


def l1_norm(eta: Tensor) -> Tensor:
    """||eta||_1 with the subgradient +1 at 0, so that on the simplex, where it is constantly 1, it moves nothing."""
    return torch.where(eta >= 0, eta, -eta).sum()


def _check_vector(eta: Tensor) -> None:
    if eta.dim() != 1 or eta.numel() == 0:
        raise ValueError(f"eta: expected a vector with at least one entry, found shape {tuple(eta.shape)}")
