"""The gradients that a step tail by tail has found so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pgd import working_dtype
from .core import Engine, gradients_or_zeros
from .float16 import gradients_of, is_float16
from .hand_over import HandOver, LossScale
from .nested import tensors_of
from .recording import Cut, Recording

WIDE = (torch.float32, torch.float64)  # gradients that are accumulated as they are


class Gradients:
    """Gradients found so far: of the weights, and at the cuts of the clean graph, in multiples of ``scale``.

    The weights are the model's parameters, what was given to the step with a graph of its own (``outer``), and whatever
    other leaves a walk comes upon, such as the criterion's parameters.
    """

    def __init__(self, engine: Engine, recording: Recording, loss_scale: LossScale, outer: list[Tensor]):
        self.engine = engine
        tensors = tensors_of(recording.output)
        for feature in recording.features.values():
            tensors += feature.tensors
        self.float16 = is_float16(tensors)  # a model may return float32 from float16 features
        # float16 gradients underflow unless the loss is scaled as the training loop scales it
        self.scale = loss_scale.value if self.float16 else 1.0
        self.loss_scale = loss_scale
        self.cuts = recording.cuts
        self.weights: list[Tensor] = [*engine.trainable(), *outer]
        self.index = {id(weight): index for index, weight in enumerate(self.weights)}
        self.others: list[Tensor] = []
        self.bypassing: set[int] = set()  # cuts, by order, through which adversarial losses go
        self.of_weights: list[Tensor | None] = [None] * len(self.weights)
        self.cut_ids = {id(leaf) for cut in self.cuts for leaf in cut.leaves}
        first_outer = len(self.weights) - len(outer)
        self.outer = {(tensor.grad_fn, tensor.output_nr): first_outer + index for index, tensor in enumerate(outer)}
        # At each cut, by order: of the clean loss alone (where an attack starts) and of the whole objective.
        self.clean: dict[int, list[Tensor | None]] = {cut.order: [None] * len(cut.leaves) for cut in self.cuts}
        self.total: dict[int, list[Tensor | None]] = {}
        self.clean_weight = 1.0
        self.mixed = False  # until an adversarial loss has contributed, `total` is `clean_weight` times `clean`

    def backward_clean(self, loss: Tensor, weight: float) -> None:
        """From the clean loss down to the cuts and to the weights behind the last one."""
        self.clean_weight = weight
        self._backward_both([self._scaled(loss)], [None], len(self.cuts))

    def backward_adversarial(
        self, loss: Tensor, leaves: list[Tensor], cut: Cut, weight: float, *, count: int
    ) -> list[Tensor]:
        """From an adversarial loss down its tail.

        Args:
            loss: Scalar.
            leaves: The perturbed feature at the cut, then what was added to later ones.
            cut: Where the tail begins.
            weight: Factor of the loss.
            count: How many leaves are the perturbed feature.

        Returns:
            The loss's gradients at the leaves.
        """
        before = self.cuts.index(cut)
        at_leaves, at_cuts, at_weights = self._backward([self._scaled(loss)], [None], leaves, before)
        _accumulate(self.of_weights, at_weights, weight)
        gradients = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(leaves, at_leaves, strict=True)
        ]
        full = self.engine.grad == "full"
        if full or any(gradient is not None for gradient in at_cuts):
            self._mix()
        if full:
            _accumulate(self.total[cut.order], gradients[:count], weight)
        if self.mixed:
            self._accumulate_cuts(self.total, at_cuts, weight)
        self._note_bypasses(at_cuts)
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

    def hand_over(self, loss: Tensor) -> Tensor:
        """The loss, with a ``backward`` that delivers what was found to the weights and to what came before."""
        found: list[tuple[Tensor, Tensor | None]] = list(zip(self.weights, self.of_weights, strict=True))
        found += zip(self.cuts[0].tensors, self._total_at(self.cuts[0]), strict=True)
        known = [(tensor, gradient) for tensor, gradient in found if gradient is not None]
        tensors, gradients = [tensor for tensor, _ in known], [gradient for _, gradient in known]
        handed: Tensor = HandOver.apply(loss, self.loss_scale, self.scale, gradients, False, *tensors)
        return handed

    def _backward_both(self, outputs: list[Tensor], gradients: Sequence[Tensor | None], before: int) -> None:
        """As long as nothing adversarial is in it, the objective's gradient is a multiple of the clean loss's."""
        _, at_cuts, at_weights = self._backward(outputs, gradients, [], before)
        _accumulate(self.of_weights, at_weights, self.clean_weight)
        self._accumulate_cuts(self.clean, at_cuts, 1.0)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss * self.scale if self.float16 else loss

    def _mix(self) -> None:
        if not self.mixed:
            self.total = {cut.order: self._total_at(cut) for cut in self.cuts}
            self.mixed = True

    def _total_at(self, cut: Cut) -> list[Tensor | None]:
        if self.mixed:
            return self.total[cut.order]
        return [None if clean is None else weighted(clean, self.clean_weight) for clean in self.clean[cut.order]]

    def _backward(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        leaves: list[Tensor],
        before: int,
        with_weights: bool = True,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """Gradients at ``leaves``, at the cuts before ``before``, and of the weights."""
        starts: list[Tensor] = []
        at_starts: list[Tensor | None] = []
        for output, gradient in zip(outputs, gradients, strict=True):
            if gradient is not None or output.dim() == 0:
                starts.append(output)
                at_starts.append(None if gradient is None else gradient.to(output.dtype))
        at_cuts: list[Tensor] = []
        for cut in self.cuts[:before]:
            at_cuts += cut.leaves
        reached = self._weights_behind(starts, leaves) if with_weights else []
        weights = [self.weights[index] for index in reached]
        inputs = [*leaves, *at_cuts, *weights]
        at_weights: list[Tensor | None] = [None] * len(self.weights)
        if not starts or not inputs:
            return [None] * len(leaves), [None] * len(at_cuts), at_weights
        hidden = _take_hooks(weights)
        try:
            # Another walk may share some of the graph; it is freed with the last reference to its end.
            found = gradients_of(starts, inputs, at_starts, retain_graph=True)
        finally:
            for hooks, kept in hidden:
                hooks.update(kept)
        split = len(leaves) + len(at_cuts)
        for index, gradient in zip(reached, found[split:], strict=True):
            at_weights[index] = gradient
        return list(found[: len(leaves)]), list(found[len(leaves) : split]), at_weights

    def _weights_behind(self, outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[int]:
        """Indices of the weights in this piece of the graph; leaves that are not known yet are taken in."""
        others = self.cut_ids.union(map(id, leaves))
        reached: set[int] = set()
        index, nodes = self.index, []
        for output in outputs:
            if output.grad_fn is None:
                self._reach(output, others, reached)
            elif (output.grad_fn, output.output_nr) in self.outer:
                reached.add(self.outer[output.grad_fn, output.output_nr])
            else:
                nodes.append(output.grad_fn)
        seen = set(nodes)
        while nodes:
            for node, number in nodes.pop().next_functions:
                if node is None or node in seen:
                    continue
                if (node, number) in self.outer:
                    reached.add(self.outer[node, number])
                    continue
                seen.add(node)
                nodes.append(node)
                leaf = getattr(node, "variable", None)  # only nodes that accumulate into a leaf have one
                if leaf is None:
                    continue
                known = index.get(id(leaf))
                if known is None:
                    self._reach(leaf, others, reached)
                else:
                    reached.add(known)
        return sorted(reached)

    def _reach(self, leaf: Tensor, others: set[int], reached: set[int]) -> None:
        index = self.index.get(id(leaf))
        if index is None:
            if id(leaf) in others or not leaf.requires_grad:
                return
            index = self.index[id(leaf)] = len(self.weights)
            self.others.append(leaf)
            self.weights.append(leaf)
            self.of_weights.append(None)
        reached.add(index)

    def _note_bypasses(self, at_cuts: Sequence[Tensor | None]) -> None:
        """Which cuts an adversarial loss depends on; the others need not be made again."""
        for cut, part in self._by_cut(at_cuts):
            if any(gradient is not None for gradient in part):
                self.bypassing.add(cut.order)

    def forget_idle_cuts(self) -> None:
        """After all blocks were attacked: outputs that lead around none of them."""
        for cut in self.cuts:
            if cut.use is not None and cut.order not in self.bypassing:
                cut.use.idle = True

    def _accumulate_cuts(
        self, totals: dict[int, list[Tensor | None]], found: Sequence[Tensor | None], weight: float
    ) -> None:
        for cut, part in self._by_cut(found):
            _accumulate(totals[cut.order], part, weight)

    def _by_cut(self, found: Sequence[Tensor | None]) -> Iterator[tuple[Cut, Sequence[Tensor | None]]]:
        """Gradients at the leaves of the first cuts, cut by cut."""
        start = 0
        for cut in self.cuts:
            end = start + len(cut.leaves)
            if end > len(found):
                return
            yield cut, found[start:end]
            start = end


def weighted(value: Tensor, weight: float) -> Tensor:
    """weight * value; for weight 1 the value itself."""
    return value if weight == 1 else value * weight


def _accumulate(totals: list[Tensor | None], found: Sequence[Tensor | None], weight: float) -> None:
    """totals += weight * found, in at least float32."""
    # Out of place: autograd may hand out one and the same tensor as the gradient of both terms of a sum.
    indices, old, new = [], [], []
    for index, gradient in enumerate(found):
        if gradient is None:
            continue
        if gradient.dtype not in WIDE:
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


def _take_hooks(tensors: Sequence[Tensor]) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """Hooks on parameters are for the whole gradient, once a step: a walk that finds a part of it is not their call.

    Returns:
        Their dicts, now empty, and what was in them.
    """
    taken = []
    for tensor in tensors:
        hooks = tensor._backward_hooks
        if hooks:
            taken.append((hooks, dict(hooks)))
            hooks.clear()
    return taken
