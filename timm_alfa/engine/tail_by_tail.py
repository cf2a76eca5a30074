"""One training step in which every tail is differentiated once and freed at once.

The clean pass is cut at the blocks, so that its graph falls into pieces. From the last block to the first: the piece
behind the block is differentiated, which yields the gradient of the attack's first step and the weights' gradients in
one walk; the block's tail is replayed with the perturbation, differentiated and freed; both gradients together go on
into the piece before. What is left is the graph before the first block. The loss that comes out carries the gradients
found so far and hands them to the one ``backward`` of the training loop, so that gradient scaling, accumulation,
clipping, hooks on parameters and DistributedDataParallel see nothing unusual. Whatever the loss depends on gets its
gradient: the model's weights, those of a criterion, a stem or a prompt in front of the step.

For one block whose tail holds a share t of the FLOPs a PGD-1 step costs 1 + t plain steps, and whatever the number of
blocks, no more than about one graph of the whole network is alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..loss import AlfaLoss, scalar_loss
from ..pgd import is_finite
from .core import Engine
from .gradients import Gradients
from .half_precision import Rounding
from .hand_over import LossScale, refusing_gradients
from .recording import Cut, Recording

Observer: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]


@dataclass
class StepResult:
    """What a step found.

    Args:
        loss: The objective; its ``backward`` hands over the gradients.
        output: The clean output. Its graph is gone: a ``backward`` from it raises ``RuntimeError``.
        clean: The clean loss, detached.
        adversarial: Block name -> adversarial loss, detached.
        observed: Block name -> what ``observe`` returned for its perturbation and feature.
        finite: What has to be finite -> whether it is, [] on the device: per block its feature, its adversarial loss
            and, unless gradients are scaled (float16), those that its perturbation follows.
        eta_gradient: Of the objective with respect to eta, [r]; zeros unless it is learned.
        others: Leaves that the loss depends on besides the model's parameters and what was given to the step.
        survives: Block name -> the share of its perturbation that half precision leaves, []; only of blocks that were
            observed, and only in half precision.
    """

    loss: Tensor
    output: Any
    clean: Tensor
    adversarial: dict[str, Tensor]
    observed: dict[str, Any]
    eta_gradient: Tensor
    finite: dict[str, Tensor]
    others: list[Tensor] = field(default_factory=list)
    survives: dict[str, Tensor] = field(default_factory=dict)


class TailByTailStep:
    """Computes the objective and its gradients with bounded memory: Algorithm 1's lines 4 to 10 in another order.

    The gradients are those of ``AlfaLoss(criterion)(alfa(input, target), target)``.

    Args:
        engine: Of the model.
        objective: Its criterion and gamma; the weights are given step by step.
    """

    def __init__(self, engine: Engine, objective: AlfaLoss):
        self.engine = engine
        self.objective = objective
        self.rounding = Rounding(engine)
        self._loss_scale = LossScale()

    def __call__(
        self,
        input: Any,
        target: Any,
        clean_weight: float,
        weights: Mapping[str, float],
        observe: Observer | None = None,
    ) -> StepResult:
        """One forward, all attacks, and all gradients up to the first block.

        Args:
            input: [B, ...].
            target: What the criterion takes.
            clean_weight: Factor of the clean loss.
            weights: Block name -> factor of its adversarial loss; blocks that are left out are not perturbed.
            observe: Called with each perturbation and the feature that it is for.
        """
        engine = self.engine
        input, target, outer = _aliased(input, target)
        recording = engine.record(input, cut=weights.keys())
        clean = scalar_loss(self.objective.criterion, recording.output, target)
        gradients = Gradients(engine, recording, self._loss_scale, outer)
        result = StepResult(
            clean, _detached(recording.output), clean.detach(), {}, {}, torch.zeros_like(engine.eta.values), {}
        )
        result.loss = clean_weight * result.clean
        gradients.backward_clean(clean, clean_weight)
        del clean
        attacks_left = len(weights)
        for cut in reversed(recording.cuts):
            if cut.block is not None:
                recording.forget(after=cut.order)
                with engine.adversarial_pass(recording):
                    self._attack(recording, cut, target, weights[cut.block], gradients, result, observe)
                attacks_left -= 1
            if cut is not recording.cuts[0]:
                gradients.backward_piece(cut, attacks_left=attacks_left > 0 and engine.starts_from_clean)
        if engine.eta.learnable and self.objective.gamma:
            penalty = self.objective.penalty(engine.eta.values)
            result.eta_gradient += torch.autograd.grad(penalty, engine.eta.values)[0]
            result.loss = result.loss + penalty.detach().to(result.loss)
        if len(weights) == len(engine.blocks):
            gradients.forget_idle_cuts()
        result.loss = gradients.hand_over(result.loss)
        result.others = gradients.others
        if result.loss.requires_grad:
            result.output = tree_map_only(Tensor, lambda tensor: refusing_gradients(result.loss, tensor), result.output)
        return result

    def _attack(
        self,
        recording: Recording,
        cut: Cut,
        target: Any,
        weight: float,
        gradients: Gradients,
        result: StepResult,
        observe: Observer | None,
    ) -> None:
        """Perturb one block, and add its adversarial loss's value and gradients."""
        engine, block = self.engine, cut.block
        assert block is not None
        feature = recording.features[block]
        first = gradients.clean_at(cut) if engine.starts_from_clean else None
        found: list[Tensor] = []
        delta = engine.find_delta(recording, block, target, first, note=lambda step: found.append(is_finite(step)))
        if observe is not None:
            result.observed[block] = observe(delta, feature.tensors)
        perturbed = [
            part.detach().requires_grad_() for part in engine.perturbed(block, feature, feature.tensors, delta)
        ]
        output = engine.replay(recording, block, feature.rebuild(perturbed))
        loss = self.objective.adversarial_term(output, result.output, target)
        del output
        result.adversarial[block] = loss.detach()
        result.loss = result.loss + weight * result.adversarial[block]
        result.finite[f"feature of {block}"] = is_finite(feature.tensors)
        if found and not gradients.float16:  # scaled gradients overflow now and then
            result.finite[f"perturbation of {block}"] = torch.stack(found).all()
        result.finite[f"adversarial loss of {block}"] = loss.detach().isfinite()
        at_feature = gradients.backward_adversarial(loss, perturbed, cut, weight)
        if engine.eta.learnable:
            wide = result.eta_gradient.dtype  # float64 where the device has it
            slope = torch.stack([(g.to(wide) * d.to(wide)).sum() for g, d in zip(at_feature, delta, strict=True)]).sum()
            result.eta_gradient[engine.blocks.index(block)] += weight * slope / gradients.scale
        if observe is not None and (share := self.rounding.survival(recording, block, delta)) is not None:
            result.survives[block] = share


def _aliased(input: Any, target: Any) -> tuple[Any, Any, list[Tensor]]:
    """Input and target, and aliases in place of the tensors in them that require gradients.

    What is found at an alias goes on to the tensor itself with the training loop's ``backward``, in one sum.
    """
    aliases: list[Tensor] = []

    def alias(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        aliases.append(tensor.view_as(tensor))
        return aliases[-1]

    input, target = tree_map_only(Tensor, alias, (input, target))
    return input, target, aliases


def _detached(output: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, output)
