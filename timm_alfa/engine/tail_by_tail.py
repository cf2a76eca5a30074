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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..loss import AlfaLoss, scalar_loss
from ..pgd import is_finite, working_dtype
from .core import Engine, gradients_or_zeros
from .float16 import is_float16
from .replay import Cut, Recording

FIRST_FLOAT16_SCALE = 2.0**8  # until a backward has told how the training loop scales its loss: rather too small

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
    """

    loss: Tensor
    output: Any
    clean: Tensor
    adversarial: dict[str, Tensor]
    observed: dict[str, Any]
    eta_gradient: Tensor
    finite: dict[str, Tensor]
    others: list[Tensor] = field(default_factory=list)


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
        self._loss_scale: Tensor | float = FIRST_FLOAT16_SCALE  # what the last backward multiplied the loss by

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
        gradients = _Gradients(engine, recording, self._loss_scale, outer)
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
        result.loss = gradients.hand_over(result.loss, self)
        result.others = gradients.others
        if result.loss.requires_grad:
            result.output = tree_map_only(
                Tensor, lambda tensor: _refusing_gradients(result.loss, tensor), result.output
            )
        return result

    def _attack(
        self,
        recording: Recording,
        cut: Cut,
        target: Any,
        weight: float,
        gradients: _Gradients,
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
        loss = scalar_loss(
            self.objective.criterion, engine.replay(recording, block, feature.rebuild(perturbed)), target
        )
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

    def note_loss_scale(self, scale: Tensor) -> None:
        """Remember the factor that the training loop put on the loss."""
        self._loss_scale = scale


class _Gradients:
    """Gradients found so far: of the weights, and at the cuts of the clean graph, in multiples of ``scale``.

    The weights are the model's parameters, what was given to the step with a graph of its own (``outer``), and whatever
    other leaves a walk comes upon, such as the criterion's parameters.
    """

    def __init__(self, engine: Engine, recording: Recording, loss_scale: Tensor | float, outer: list[Tensor]):
        self.engine = engine
        features = [feature.tensors for feature in recording.features.values()]
        self.float16 = is_float16((recording.output, features))  # a model may return float32 from float16 features
        # float16 gradients underflow unless the loss is scaled as the training loop scales it
        self.scale = loss_scale if self.float16 else 1.0
        self.cuts = recording.cuts
        self.weights = [parameter for parameter in engine.model.parameters() if parameter.requires_grad] + outer
        self.others: list[Tensor] = []
        self.of_weights: list[Tensor | None] = [None] * len(self.weights)
        self.ends = {id(tensor) for tensor in (*self.weights, *(leaf for cut in self.cuts for leaf in cut.leaves))}
        self.outer = {(tensor.grad_fn, tensor.output_nr) for tensor in outer}
        # At each cut, by order: of the clean loss alone (where an attack starts) and of the whole objective.
        self.clean: dict[int, list[Tensor | None]] = {cut.order: [None] * len(cut.leaves) for cut in self.cuts}
        self.total: dict[int, list[Tensor | None]] = {}
        self.clean_weight = 1.0
        self.mixed = False  # until an adversarial loss has contributed, `total` is `clean_weight` times `clean`

    def backward_clean(self, loss: Tensor, weight: float) -> None:
        """From the clean loss down to the cuts and to the weights behind the last one."""
        self.clean_weight = weight
        self._backward_both([loss * self.scale], [None], len(self.cuts))

    def backward_adversarial(self, loss: Tensor, perturbed: list[Tensor], cut: Cut, weight: float) -> list[Tensor]:
        """From an adversarial loss down its tail; returns its gradient at the perturbed feature."""
        before = self.cuts.index(cut)
        at_feature, at_cuts, at_weights = self._backward([loss * self.scale], [None], perturbed, before)
        _accumulate(self.of_weights, at_weights, weight)
        gradients = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(perturbed, at_feature, strict=True)
        ]
        full = self.engine.grad == "full"
        if full or any(gradient is not None for gradient in at_cuts):
            self._mix()
        if full:
            _accumulate(self.total[cut.order], gradients, weight)
        if self.mixed:
            self._accumulate_cuts(self.total, at_cuts, weight)
        return gradients

    def backward_piece(self, cut: Cut, attacks_left: bool) -> None:
        """From a cut down to the earlier ones; afterwards the piece of the graph in between is gone.

        Attacks that are still to come, and start from the clean pass, need the clean loss's gradient by itself.
        """
        before = self.cuts.index(cut)
        if self.mixed or not attacks_left:
            self._mix()
            if attacks_left:
                with self.engine.without_side_effects():
                    _, at_cuts, _ = self._backward(cut.tensors, self.clean[cut.order], [], before, with_weights=False)
                self._accumulate_cuts(self.clean, at_cuts, 1.0)
            _, at_cuts, at_weights = self._backward(cut.tensors, self.total[cut.order], [], before)
            _accumulate(self.of_weights, at_weights, 1.0)
            self._accumulate_cuts(self.total, at_cuts, 1.0)
        else:
            self._backward_both(cut.tensors, self.clean[cut.order], before)
        cut.tensors, cut.leaves = [], []

    def clean_at(self, cut: Cut) -> list[Tensor]:
        """d crit(model(x), y) / d f_i."""
        assert cut.block is not None
        return gradients_or_zeros(cut.block, self.clean[cut.order], cut.leaves)

    def hand_over(self, loss: Tensor, step: TailByTailStep) -> Tensor:
        """The loss, with a ``backward`` that delivers what was found to the weights and to what came before."""
        found: list[tuple[Tensor, Tensor | None]] = list(zip(self.weights, self.of_weights, strict=True))
        found += zip(self.cuts[0].tensors, self._total_at(self.cuts[0]), strict=True)
        known = [(tensor, gradient) for tensor, gradient in found if gradient is not None]
        gradients = [gradient for _, gradient in known]
        handed: Tensor = _HandOver.apply(loss, step, self.scale, gradients, *(tensor for tensor, _ in known))
        return handed

    def _backward_both(self, outputs: list[Tensor], gradients: Sequence[Tensor | None], before: int) -> None:
        """As long as nothing adversarial is in it, the objective's gradient is a multiple of the clean loss's."""
        _, at_cuts, at_weights = self._backward(outputs, gradients, [], before)
        _accumulate(self.of_weights, at_weights, self.clean_weight)
        self._accumulate_cuts(self.clean, at_cuts, 1.0)

    def _mix(self) -> None:
        if not self.mixed:
            self.total = {cut.order: self._total_at(cut) for cut in self.cuts}
            self.mixed = True

    def _total_at(self, cut: Cut) -> list[Tensor | None]:
        if self.mixed:
            return self.total[cut.order]
        return [None if clean is None else clean * self.clean_weight for clean in self.clean[cut.order]]

    def _backward(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        leaves: list[Tensor],
        before: int,
        with_weights: bool = True,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """Gradients at ``leaves``, at the cuts before ``before``, and of the weights."""
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None or output.dim() == 0
        ]
        at_cuts = [leaf for cut in self.cuts[:before] for leaf in cut.leaves]
        if with_weights:
            self._find_weights([output for output, _ in pairs], leaves)
        weights = self.weights if with_weights else []
        inputs = [*leaves, *at_cuts, *weights]
        if not pairs or not inputs:
            return [None] * len(leaves), [None] * len(at_cuts), [None] * len(weights)
        with torch.autocast(pairs[0][0].device.type, enabled=False), _without_hooks(weights):
            found = torch.autograd.grad(
                [output for output, _ in pairs],
                inputs,
                [gradient if gradient is None else gradient.to(output.dtype) for output, gradient in pairs],
                retain_graph=True,  # another walk may share some of it; it is freed with the last reference to its end
                allow_unused=True,
            )
        split = len(leaves) + len(at_cuts)
        return list(found[: len(leaves)]), list(found[len(leaves) : split]), list(found[split:])

    def _find_weights(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        """Take in the leaves of this piece of the graph that are not known yet."""
        ends = self.ends.union(map(id, leaves))
        nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
        seen = set(nodes)
        while nodes:
            for node, index in nodes.pop().next_functions:
                if node is None or node in seen or (node, index) in self.outer:
                    continue
                seen.add(node)
                nodes.append(node)
                leaf = getattr(node, "variable", None)  # only nodes that accumulate into a leaf have one
                if leaf is not None and id(leaf) not in ends:
                    self.others.append(leaf)
                    self.weights.append(leaf)
                    self.of_weights.append(None)
                    self.ends.add(id(leaf))

    def _accumulate_cuts(
        self, totals: dict[int, list[Tensor | None]], found: Sequence[Tensor | None], weight: float
    ) -> None:
        remaining = iter(found)
        for cut in self.cuts:
            part = [gradient for _, gradient in zip(cut.leaves, remaining, strict=False)]
            if len(part) < len(cut.leaves):
                return
            _accumulate(totals[cut.order], part, weight)


class _HandOver(torch.autograd.Function):
    """A scalar whose gradients with respect to some tensors are already known."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, step: TailByTailStep, scale: Tensor | float, gradients: list[Tensor], *tensors: Tensor
    ) -> Tensor:
        ctx.step, ctx.scale, ctx.gradients = step, scale, gradients
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("AlfaTask gives no second derivatives; use an optimizer without create_graph=True")
        ctx.step.note_loss_scale(factor.detach())
        if ctx.gradients is None:
            raise RuntimeError("the loss of an AlfaTask can be walked backward once; call the task again")
        scaled, ctx.gradients = ctx.gradients, None  # nobody else holds them: they become the weights' own
        ratio = factor / ctx.scale  # on an accelerator, looking at it would cost more than to multiply
        if scaled and (ratio.device.type != "cpu" or ratio.item() != 1):
            scaled = torch._foreach_mul(scaled, ratio)
        cast = [gradient.to(dtype) for gradient, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return None, None, None, None, *cast


class _RefuseGradients(torch.autograd.Function):
    """A tensor whose graph was freed; without this, a loss on it would train nothing and say nothing."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "the graph behind the output of an AlfaTask is freed in its step; put a loss on it into the criterion, "
            "or use AlfaWrapper and AlfaLoss"
        )


def _refusing_gradients(loss: Tensor, tensor: Tensor) -> Tensor:
    refusing: Tensor = _RefuseGradients.apply(loss, tensor) if tensor.is_floating_point() else tensor
    return refusing


def _accumulate(totals: list[Tensor | None], found: Sequence[Tensor | None], weight: float) -> None:
    """totals += weight * found, in at least float32."""
    # Out of place: autograd may hand out one and the same tensor as the gradient of both terms of a sum.
    indices, old, new = [], [], []
    for index, gradient in enumerate(found):
        if gradient is None:
            continue
        gradient = gradient.to(working_dtype(gradient.dtype))
        total = totals[index]
        if total is None:
            totals[index] = gradient if weight == 1 else gradient * weight
        else:
            indices.append(index)
            old.append(total)
            new.append(gradient)
    if old:
        for index, total in zip(indices, torch._foreach_add(old, new, alpha=weight), strict=True):
            totals[index] = total


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


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Hooks on parameters are for the whole gradient, once a step: a walk that finds a part of it is not their call."""
    hidden = [(hooks, dict(hooks)) for hooks in (tensor._backward_hooks for tensor in tensors) if hooks]
    try:
        for hooks, _ in hidden:
            hooks.clear()
        yield
    finally:
        for hooks, kept in hidden:
            hooks.update(kept)


def _detached(output: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, output)
