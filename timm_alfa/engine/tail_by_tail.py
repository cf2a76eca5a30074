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
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..loss import AlfaLoss, scalar_loss
from ..pgd import total
from .core import Engine, add_to
from .gradients import Gradients, weighted
from .half_precision import Rounding
from .hand_over import LossScale, refusing_gradients
from .nested import detached, map_tensors
from .recording import Cut, Feature, Recording
from .tail import Change

NO_GRADIENT = torch.empty(0)
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
        eta_gradient: Of the objective with respect to eta, [r]; [0] unless it is learned.
        others: Leaves that the loss depends on besides the model's parameters and what was given to the step.
        survives: Block name -> the share of its perturbation that half precision leaves, []; only of blocks that were
            observed, only in half precision, and of blocks that are perturbed together only of the first.
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
        result = StepResult(clean, detached(recording.output), clean.detach(), {}, {}, NO_GRADIENT, {})
        result.loss = weighted(result.clean, clean_weight)
        if engine.eta.learnable:
            result.eta_gradient = torch.zeros_like(engine.eta.values)
        gradients.backward_clean(clean, clean_weight)
        del clean
        attack = _Attack(self, recording, target, gradients, result, observe)
        attacked = [cut for cut in recording.cuts if cut.block is not None]
        for cut in reversed(recording.cuts):
            if cut.block is not None and engine.joint:
                attack.prepare(cut)
                attacked.pop()
                if not attacked:  # this is the first block: the tails of the others are part of its own
                    recording.forget(after=cut.order)
                    attack.run(cut, next(iter(weights.values())))
            elif cut.block is not None:
                recording.forget(after=cut.order)
                attack.prepare(cut)
                attack.run(cut, weights[cut.block])
                attacked.pop()
            if cut is not recording.cuts[0]:
                gradients.backward_piece(cut, attacks_left=bool(attacked) and engine.starts_from_clean)
        if engine.eta.learnable and self.objective.gamma:
            penalty = self.objective.penalty(engine.eta.values)
            result.eta_gradient += torch.autograd.grad(penalty, engine.eta.values)[0]
            result.loss = result.loss + penalty.detach().to(result.loss)
        if len(weights) == len(engine.blocks):
            gradients.forget_idle_cuts()
        result.finite = attack.finite()
        result.loss = gradients.hand_over(result.loss)
        result.others = gradients.others
        if result.loss.requires_grad:
            result.output = map_tensors(lambda tensor: refusing_gradients(result.loss, tensor), result.output)
        return result


class _Attack:
    """Perturbs blocks, one after another or all together, and adds adversarial losses' values and gradients."""

    def __init__(
        self,
        step: TailByTailStep,
        recording: Recording,
        target: Any,
        gradients: Gradients,
        result: StepResult,
        observe: Observer | None,
    ):
        self.engine, self.objective, self.rounding = step.engine, step.objective, step.rounding
        self.recording, self.target = recording, target
        self.gradients, self.result, self.observe = gradients, result, observe
        self.features: dict[str, Feature] = {}  # of the blocks that are perturbed next
        self.first: dict[str, list[Tensor]] = {}  # their gradients at delta = 0
        self.totals: dict[str, Tensor] = {}  # what has to be finite

    def prepare(self, cut: Cut) -> None:
        """Take in a block, before the graph in front of it is walked."""
        block = cut.block
        assert block is not None
        feature = self.recording.features[block]
        # Of several, later ones are not walked on to: without their graphs, which can be freed.
        self.features = {block: feature, **{name: other.detached() for name, other in self.features.items()}}
        if self.engine.starts_from_clean:
            self.first[block] = self.gradients.clean_at(cut)

    def run(self, cut: Cut, weight: float) -> None:
        """Perturb the blocks that were taken in, in one adversarial pass from the first of them on.

        Args:
            cut: At the first block.
            weight: Factor of the adversarial loss.
        """
        with self.engine.adversarial_pass(self.recording):
            self._run(cut, weight)
        self.features, self.first = {}, {}

    def _run(self, cut: Cut, weight: float) -> None:
        engine, recording, result, features = self.engine, self.recording, self.result, self.features
        start = next(iter(features))
        found: list[Tensor] = []  # a sum of every gradient that a delta follows

        def note(gradients: Sequence[Tensor]) -> None:
            found.append(total(gradients))

        if engine.joint:
            deltas = engine.find_deltas(recording, features, self.target, self.first, note)
        else:
            deltas = {start: engine.find_delta(recording, start, self.target, self.first.get(start), note)}
        leaves: list[Tensor] = []
        later: dict[str, Change] = {}
        perturbed: list[Tensor] = []
        for block, feature in features.items():
            delta = deltas[block]
            if self.observe is not None:
                result.observed[block] = self.observe(delta, feature.tensors)
            self.totals[f"feature of {block}"] = total(feature.tensors)
            if block == start:
                parts = engine.perturbed(block, feature, feature.tensors, delta)
                perturbed = [part.detach().requires_grad_() for part in parts]
                leaves += perturbed
            else:
                parts = [part.detach().requires_grad_() for part in engine.scaled(block, delta)]
                later[block] = partial(add_to, feature, delta=parts)
                leaves += parts
        output = engine.replay(recording, start, features[start].rebuild(perturbed), later)
        loss = self.objective.adversarial_term(output, result.output, self.target)
        del output
        value = loss.detach()
        result.loss = result.loss + weighted(value, weight)
        for block in features:
            result.adversarial[block] = value
        name = " + ".join(features)
        self.totals[f"adversarial loss of {name}"] = value
        if found and not self.gradients.float16:  # scaled gradients overflow now and then
            self.totals[f"perturbation of {name}"] = total(found)
        at_leaves = self.gradients.backward_adversarial(loss, leaves, cut, weight, count=len(perturbed))
        if engine.eta.learnable:
            wide = result.eta_gradient.dtype  # float64 where the device has it
            remaining = iter(at_leaves)
            for block, delta in deltas.items():
                slopes = [(next(remaining).to(wide) * part.to(wide)).sum() for part in delta]
                slope = torch.stack(slopes).sum()
                result.eta_gradient[engine.blocks.index(block)] += weight * slope / self.gradients.scale
        if self.observe is not None and (share := self.rounding.survival(recording, start, deltas[start])) is not None:
            result.survives[start] = share

    def finite(self) -> dict[str, Tensor]:
        """What has to be finite -> whether it is, by one operation for all."""
        if not self.totals:
            return {}
        device = self.result.loss.device
        totals = [value.to(device, torch.float32, non_blocking=True) for value in self.totals.values()]
        return dict(zip(self.totals, torch.stack(totals).isfinite().unbind(), strict=True))


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

    return map_tensors(alias, input), map_tensors(alias, target), aliases
