"""The objective: Eq. 3 for ALFA, Eq. 5 for L-ALFA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from .eta import l1_norm

if TYPE_CHECKING:
    from .wrapper import AlfaOutput

Reduction = Literal["sum", "mean"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean")
Objective = Literal["ce", "kl"]
OBJECTIVES: tuple[Objective, ...] = ("ce", "kl")


@dataclass
class AlfaLossOutput:
    """The objective and its parts, all scalars.

    Args:
        loss: What to call ``backward`` on.
        clean: The criterion on the clean output, detached.
        adversarial: Block name -> the criterion on its adversarial output, detached.
        l1: ||eta||_1, detached; 0 if eta is not learned.
    """

    loss: Tensor
    clean: Tensor
    adversarial: dict[str, Tensor]
    l1: Tensor


class AlfaLoss:
    """crit(model(x), y) + lam * sum_i crit(T_i(f_i + eta_i * delta_i), y) + gamma * ||eta||_1.

    Args:
        criterion: (output, target) -> scalar.
        lam: Weight of the adversarial terms, at least 0.
        gamma: Weight of ||eta||_1, at least 0; without effect unless eta is learned.
        reduction: ``"sum"`` is the paper's Eq. 3 and 5. ``"mean"`` is (clean + lam * mean of the adversarial terms)
            / (1 + lam), which for lam = 1 is the released code's (clean + adversarial) / 2.
        objective: What an adversarial term is: ``"ce"``, the criterion on the perturbed output (Eq. 3), or ``"kl"``,
            KL(p(clean) || p(perturbed)) with the clean prediction detached, as in VAT and SMART. The attack raises the
            criterion in both cases.
        multi_label: Whether the outputs are logits of independent labels, so that ``"kl"`` is the divergence of their
            Bernoulli distributions, averaged over the labels as binary cross-entropy is.

    Raises:
        ValueError: A weight is negative or not finite, or the reduction or the objective is unknown.
    """

    def __init__(
        self,
        criterion: Callable[[Any, Any], Tensor],
        lam: float = 1.0,
        gamma: float = 0.0,
        reduction: Reduction = "sum",
        objective: Objective = "ce",
        multi_label: bool = False,
    ):
        for name, value in (("lam", lam), ("gamma", gamma)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a finite number of at least 0, found {value}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, found {reduction!r}")
        if objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, found {objective!r}")
        self.criterion = criterion
        self.objective = objective
        self.multi_label = multi_label
        self.lam = lam
        self.gamma = gamma
        self.reduction = reduction

    def __call__(self, alfa_output: AlfaOutput, target: Any) -> AlfaLossOutput:
        """The objective for what an ``AlfaWrapper`` returned.

        Args:
            alfa_output: Of ``alfa(input, target)``; without adversarial outputs (evaluation) the loss is the clean one.
            target: Whatever the criterion takes.
        """
        clean = scalar_loss(self.criterion, alfa_output.output, target)
        adversarial = {
            block: self.adversarial_term(output, alfa_output.output, target)
            for block, output in alfa_output.adv_outputs.items()
        }
        loss = self.combine(clean, list(adversarial.values()))
        eta = alfa_output.eta
        l1 = l1_norm(eta.detach()).to(loss) if eta.requires_grad else torch.zeros_like(clean)
        if eta.requires_grad and self.gamma:
            loss = loss + self.penalty(eta).to(loss)
        return AlfaLossOutput(loss, clean.detach(), {name: value.detach() for name, value in adversarial.items()}, l1)

    def adversarial_term(self, output: Any, clean_output: Any, target: Any) -> Tensor:
        """One block's adversarial loss, a scalar.

        Args:
            output: Of the model, with the block's feature perturbed.
            clean_output: Of the clean pass; ``"kl"`` compares with it.
            target: Whatever the criterion takes.
        """
        if self.objective == "kl":
            return (bernoulli_divergence if self.multi_label else divergence)(clean_output, output)
        return scalar_loss(self.criterion, output, target)

    def combine(self, clean: Tensor, adversarial: list[Tensor]) -> Tensor:
        """The clean and adversarial terms together; never the same tensor as ``clean``.

        Args:
            clean: The clean loss, a scalar.
            adversarial: One scalar per block.
        """
        if not adversarial:
            return clean.clone()
        of_clean, of_adversarial = self.weights(len(adversarial))
        total = torch.stack(adversarial).sum() if len(adversarial) > 1 else adversarial[0]
        return of_clean * clean + of_adversarial * total

    def penalty(self, eta: Tensor) -> Tensor:
        """gamma * ||eta||_1, the last term of Eq. 5.

        Args:
            eta: [r].
        """
        return self.gamma * l1_norm(eta)

    def weights(self, count: int) -> tuple[float, float]:
        """Factors of the clean loss and of each of ``count`` adversarial losses, ``count`` at least 1."""
        if self.reduction == "sum":
            return 1.0, self.lam
        return 1 / (1 + self.lam), self.lam / (count * (1 + self.lam))


def divergence(clean: Any, perturbed: Any) -> Tensor:
    """KL(p(clean) || p(perturbed)), averaged over the batch; no gradient flows into the clean prediction.

    Args:
        clean: Logits [B, num_classes].
        perturbed: The same with a feature perturbed.

    Raises:
        TypeError: The outputs are no logits.
    """
    clean, perturbed = _wide_logits(clean, perturbed)
    log_p, log_q = clean.detach().log_softmax(dim=1), perturbed.log_softmax(dim=1)
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def bernoulli_divergence(clean: Any, perturbed: Any) -> Tensor:
    """KL(p(clean) || p(perturbed)) of independent labels, averaged over batch and labels, as binary cross-entropy is.

    p log(p/q) + (1 - p) log((1 - p)/(1 - q)) for every label; no gradient flows into the clean prediction.

    Args:
        clean: Logits [B, num_classes], each of a label of its own.
        perturbed: The same with a feature perturbed.

    Raises:
        TypeError: The outputs are no logits.
    """
    clean, perturbed = _wide_logits(clean, perturbed)
    clean = clean.detach()
    present = clean.sigmoid() * (functional.logsigmoid(clean) - functional.logsigmoid(perturbed))
    absent = (-clean).sigmoid() * (functional.logsigmoid(-clean) - functional.logsigmoid(-perturbed))
    return (present + absent).mean()


def _wide_logits(*outputs: Any) -> tuple[Tensor, ...]:
    """Logits in at least float32."""
    for output in outputs:
        if not (isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point()):
            raise TypeError(
                f"objective 'kl': expected a model that returns logits [B, num_classes], found {_described(output)}; "
                "use 'ce'"
            )
    return tuple(output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs)


def scalar_loss(criterion: Callable[[Any, Any], Tensor], output: Any, target: Any) -> Tensor:
    """crit(output, target), of shape []; a criterion that returns one number in another shape, such as [1], will do.

    Args:
        criterion: (output, target) -> a tensor of one number.
        output: What the model returned.
        target: What the criterion takes.

    Raises:
        TypeError: The criterion returned something other than a floating-point tensor.
        ValueError: It returned several numbers.
    """
    loss = criterion(output, target)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"criterion: expected it to return the loss, a tensor of shape [], found {_described(loss)}; "
            "pass a function that picks the loss, such as lambda output, target: criterion(output, target)[0]"
        )
    if not loss.is_floating_point():
        raise TypeError(f"criterion: expected it to return a floating-point tensor, found {_described(loss)}")
    if loss.dim() == 0:
        return loss
    if loss.numel() != 1:
        raise ValueError(
            f"criterion: expected it to return one number, a tensor of shape [], found {_described(loss)}; "
            "average it, with reduction='mean' for instance"
        )
    return loss.reshape(())


def _described(value: Any) -> str:
    """What a criterion returned, in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} ({', '.join(type(item).__name__ for item in value)})"
    return f"{value!r} ({type(value).__name__})"
