"""The parts of a training step: clean pass, first gradients, perturbations, adversarial outputs. Each is here once.

Two fronts put them together. :class:`~timm_alfa.AlfaWrapper` leaves everything in one autograd graph, for loops that
call ``loss.backward()`` themselves. :class:`~timm_alfa.AlfaTask` differentiates and frees tail by tail, see
:mod:`timm_alfa.engine.tail_by_tail`: less time and memory, but nothing is left to differentiate once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import BlockError
from ..eta import Eta
from ..loss import scalar_loss
from ..perturbation import Perturbation
from .aux_batchnorm import AuxBatchNorms, norms_behind
from .batchnorm import BATCH_NORM_MODES, BatchNormMode, Statistics
from .compiler import is_compiled
from .float16 import attack_gradients
from .inventory import Inventory
from .nested import tensors_of
from .random_sources import random_sources
from .randomness import RandomState, random_devices
from .recording import Feature, Recording
from .replay import Replay
from .tail import NOTHING, Change
from .trace import blank_batch, evaluating

Gradient = Literal["full", "tail"]
GRADIENTS: tuple[Gradient, ...] = ("full", "tail")


class Engine:
    """Records clean passes of a model, perturbs the features of some blocks, and replays their tails.

    Args:
        model: Any module; its parameters and structure stay as they are.
        criterion: (output, target) -> scalar, the loss that the perturbation raises.
        blocks: Name -> submodule whose output to perturb, of :func:`~timm_alfa.resolve_blocks`.
        perturbation: What finds delta.
        grad: ``"full"``: adversarial losses also train what comes before the block. ``"tail"``: they do not.
        bn: Which passes move running statistics, see :class:`~timm_alfa.AlfaWrapper`.
        joint: Whether all blocks are perturbed in one adversarial pass, see :class:`~timm_alfa.AlfaWrapper`.
        eta: Block names -> their strengths.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: The criterion cannot be called.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        blocks: Mapping[str, nn.Module],
        perturbation: Perturbation,
        *,
        grad: Gradient = "full",
        bn: BatchNormMode = "clean",
        joint: bool = False,
        eta: Callable[[list[str]], Eta] = Eta,
    ):
        if not callable(criterion):
            raise TypeError(f"criterion: expected something to call with (output, target), found {criterion!r}")
        for name, value, choices in (("grad", grad, GRADIENTS), ("bn", bn, BATCH_NORM_MODES)):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")
        if joint and not hasattr(perturbation, "search"):
            raise TypeError(f"perturbation: joint ones need a method search, as Pgd has, found {perturbation!r}")
        self.model = model
        self.criterion = criterion
        self.blocks = list(blocks)
        self.perturbation = perturbation
        self.grad: Gradient = grad
        self.bn: BatchNormMode = bn
        self.joint = joint
        self.eta = eta(self.blocks)
        self.passes = 0  # training steps made
        self.aux = AuxBatchNorms(model) if bn == "aux" else None
        self._aux_checked = False
        self._replay: Replay | None = Replay(model, blocks, joint=joint)
        self._inventory = self._replay.inventory
        self._statistics = Statistics(model, self._inventory)

    @property
    def starts_from_clean(self) -> bool:
        """Whether the first step of an attack takes its gradient from the clean pass: delta = 0 must be that pass."""
        return self.perturbation.starts_from_clean and self.aux is None

    @property
    def inventory(self) -> Inventory:
        """Modules and parameters of the model."""
        return self._inventory

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Around steps that read no random state: their model is known to draw nothing."""
        replay = self._active_replay()
        replay.frozen = True
        try:
            yield
        finally:
            replay.frozen = False

    def trainable(self) -> list[nn.Parameter]:
        """The model's parameters that require a gradient, as the last clean pass had them."""
        return self._inventory.trainable()

    def record(self, input: Any, *, cut: Collection[str] = ()) -> Recording:
        """The clean pass.

        Args:
            input: What the model takes, [B, ...].
            cut: Blocks at which the graph is cut.
        """
        replay = self._active_replay()
        if self.aux is not None and not self._aux_checked:
            norms_behind(self.model, self.blocks, input)
            self._aux_checked = True
        if self._statistics.known:
            recording = replay.record((input,), cut=cut)
        else:
            with self._statistics.observed():
                recording = replay.record((input,), cut=cut)
        self.eta.to(next(iter(recording.features.values())).tensors[0].device)
        self.passes += 1
        return recording

    def adversarial_pass(self, recording: Recording) -> AbstractContextManager[None]:
        """Around attacks and adversarial outputs: keeps the random state, and the statistics if ``bn`` says so.

        Args:
            recording: Of the clean pass.
        """
        if self.aux is not None:
            kept: AbstractContextManager[None] | None = self._in_branches(self.aux)
        else:
            kept = self._statistics.kept() if self.bn == "clean" else None
        return _AdversarialPass(recording, kept)

    @contextmanager
    def _in_branches(self, aux: AuxBatchNorms) -> Iterator[None]:
        with aux.active(), self._statistics.kept_outside_batch_norms():
            yield

    def statistics_kept(self) -> AbstractContextManager[None]:
        """Around passes that move no running statistic, clean ones too."""
        return self._statistics.kept()

    def without_side_effects(self) -> AbstractContextManager[None]:
        """Around a backward through the clean graph that a plain step does not make."""
        return self._statistics.kept_in_recomputation() if self.bn != "shared" else nullcontext()

    def clean_gradients(self, recording: Recording, target: Any) -> dict[str, list[Tensor]]:
        """d crit(model(x), y) / d f_i for every block at once: the gradient of the first step, as delta starts at 0.

        Args:
            recording: Of the clean pass.
            target: What the criterion takes.

        Returns:
            By block, one gradient per floating-point tensor of its feature; empty unless :attr:`starts_from_clean`.

        Raises:
            BlockError: A block has no influence on the loss.
        """
        if not self.starts_from_clean:
            return {}
        tensors = [tensor for feature in recording.features.values() for tensor in feature.tensors]
        gradients = iter(self._gradient(recording.output, target, tensors, tensors, retain_graph=True))
        return {
            block: gradients_or_zeros(block, [next(gradients) for _ in feature.tensors], feature.tensors)
            for block, feature in recording.features.items()
        }

    def find_delta(
        self,
        recording: Recording,
        block: str,
        target: Any,
        first_gradient: Sequence[Tensor] | None = None,
        note: Callable[[Sequence[Tensor]], object] | None = None,
    ) -> list[Tensor]:
        """The perturbation of one block.

        Args:
            recording: Of the clean pass.
            block: Its name.
            target: What the criterion takes.
            first_gradient: The gradient at delta = 0, if it is known; else every step is a tail replay.
            note: Called with every gradient that delta follows.

        Returns:
            One tensor per floating-point tensor of the feature, detached, at least float32.
        """
        feature = recording.features[block]
        clean = [tensor.detach() for tensor in feature.tensors]

        def gradient_at(delta: list[Tensor]) -> list[Tensor]:
            leaves = [part.detach().requires_grad_() for part in delta]
            value = feature.rebuild(add_to(feature, clean, leaves))
            output = self._active_replay().replay(recording, block, value, detach=True)
            found = gradients_or_zeros(block, self._gradient(output, target, leaves, feature.tensors), leaves)
            if note is not None:
                note(found)
            return found

        if first_gradient is not None and note is not None:
            note(first_gradient)
        index = self.blocks.index(block)
        if self.aux is None:
            return self.perturbation.find(feature.tensors, gradient_at, first_gradient, step=self.passes, index=index)
        with self._statistics.kept():  # only what is trained on counts
            return self.perturbation.find(feature.tensors, gradient_at, first_gradient, step=self.passes, index=index)

    def find_deltas(
        self,
        recording: Recording,
        features: Mapping[str, Feature],
        target: Any,
        first_gradients: Mapping[str, Sequence[Tensor]],
        note: Callable[[Sequence[Tensor]], object] | None = None,
    ) -> dict[str, list[Tensor]]:
        """The perturbations of several blocks, all steps of which follow the loss with all blocks perturbed.

        Args:
            recording: Of the clean pass.
            features: Block name -> its feature, in order of execution: tails are replayed from the first.
            target: What the criterion takes.
            first_gradients: By block, the gradient at delta = 0, if it is known; else every step is a tail replay.
            note: Called with every gradient that a delta follows.
        """
        indices = {block: self.blocks.index(block) for block in features}
        # Before the first step everything is the clean pass, whose gradients are known.
        searches = {
            block: self.perturbation.search(  # type: ignore[attr-defined]  # checked on construction
                feature.tensors, first_gradients.get(block), step=self.passes, index=indices[block]
            )
            for block, feature in features.items()
        }
        if note is not None:
            for gradient in first_gradients.values():
                note(gradient)
        asked: dict[str, list[Tensor]] = {}
        gradients: dict[str, list[Tensor]] = {}
        with self._statistics.kept() if self.aux is not None else nullcontext():  # only what is trained on counts
            while searches:
                for block, search in list(searches.items()):
                    try:
                        asked[block] = search.send(gradients[block]) if gradients else next(search)
                    except StopIteration as found:
                        asked[block] = found.value
                        del searches[block]
                if searches:
                    gradients = self._joint_gradients(recording, features, target, asked)
                    if note is not None:
                        for block in searches:
                            note(gradients[block])
        return {block: asked[block] for block in features}

    def _joint_gradients(
        self, recording: Recording, features: Mapping[str, Feature], target: Any, deltas: Mapping[str, Sequence[Tensor]]
    ) -> dict[str, list[Tensor]]:
        """d crit / d delta of every block, with all of them perturbed, by one replay from the first."""
        leaves = {block: [part.detach().requires_grad_() for part in deltas[block]] for block in features}
        first = next(iter(features))
        clean = [tensor.detach() for tensor in features[first].tensors]
        value = features[first].rebuild(add_to(features[first], clean, leaves[first]))
        later = {
            block: partial(add_to, feature, delta=leaves[block])
            for block, feature in features.items()
            if block != first
        }
        output = self._active_replay().replay(recording, first, value, detach=True, later=later)
        of_features = [tensor for feature in features.values() for tensor in feature.tensors]
        found = iter(self._gradient(output, target, [leaf for part in leaves.values() for leaf in part], of_features))
        return {
            block: gradients_or_zeros(block, [next(found) for _ in parts], parts) for block, parts in leaves.items()
        }

    def adversarial_output(self, recording: Recording, deltas: Mapping[str, Sequence[Tensor]]) -> Any:
        """The output with some blocks perturbed, connected to the weights, to eta, and in ``grad="full"`` to f_i.

        For one block T_i(f_i + eta_i * delta_i).

        Args:
            recording: Of the clean pass.
            deltas: Block name -> its perturbation; of several blocks, in one pass.
        """
        first, *others = sorted(deltas, key=recording.order.__getitem__)
        feature = recording.features[first]
        tensors = feature.tensors if self.grad == "full" else [tensor.detach() for tensor in feature.tensors]
        later = {
            block: partial(self.perturbed, block, recording.features[block], delta=deltas[block]) for block in others
        }
        value = feature.rebuild(self.perturbed(first, feature, tensors, deltas[first]))
        return self.replay(recording, first, value, later=later)

    def perturbed(
        self, block: str, feature: Feature, tensors: Sequence[Tensor], delta: Sequence[Tensor]
    ) -> list[Tensor]:
        """f_i + eta_i * delta_i.

        Args:
            block: Its name.
            feature: Its output.
            tensors: The floating-point tensors of it, each [B, ...], as they are or detached.
            delta: One tensor of the same shape for each.
        """
        return add_to(feature, tensors, self.scaled(block, delta))

    def scaled(self, block: str, delta: Sequence[Tensor]) -> Sequence[Tensor]:
        """eta_i * delta_i.

        Args:
            block: Its name.
            delta: [B, ...] each.
        """
        if not self.eta.learnable:
            return delta
        strength = self.eta.values[self.blocks.index(block)]
        return [strength.to(part.dtype) * part for part in delta]

    def replay(self, recording: Recording, block: str, value: Any, later: Mapping[str, Change] = NOTHING) -> Any:
        """T_i(value): only the tail of the block computes.

        Args:
            recording: Of the clean pass.
            block: Its name.
            value: What it returns, nested as in the clean pass.
            later: Blocks in the tail -> what becomes of their outputs.
        """
        return self._active_replay().replay(recording, block, value, later=later)

    def check_blocks(self, input_size: tuple[int, ...]) -> None:
        """Try the blocks out on two blank inputs, before training starts; nothing of the model moves.

        Args:
            input_size: Shape of one input, [C, H, W].

        Raises:
            BlockError: A block that runs several times per forward, not at all, or that cannot be perturbed.
        """
        trial = Replay(self.model, {block: self.model.get_submodule(block) for block in self.blocks})
        start = RandomState(random_devices(self.model, ()), random_sources(self.model))
        with start.left_as_is(), evaluating(self.model), torch.enable_grad():
            recording = trial.record((blank_batch(self.model, input_size, batch_size=2),))
            for block, feature in recording.features.items():
                trial.replay(recording, block, feature.rebuild(feature.tensors))
        if self.aux is not None:
            self.aux.keep_only(norms_behind(self.model, self.blocks, blank_batch(self.model, input_size)))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model's parts between and after the blocks; arguments are those of ``torch.compile``.

        Raises:
            ValueError: They make CUDA graphs (modes ``reduce-overhead`` and ``max-autotune``, on a CUDA device).
        """
        self._active_replay().compile(*args, **kwargs)

    def remove(self) -> None:
        """Take everything off the model. May be called again."""
        self._replay = None
        if self.aux is not None:
            self.aux.remove()

    def _active_replay(self) -> Replay:
        if self._replay is None:
            raise RuntimeError("this AlfaWrapper was removed from its model; build a new one")
        return self._replay

    def _gradient(
        self, output: Any, target: Any, inputs: Sequence[Tensor], features: Sequence[Tensor], retain_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        loss = scalar_loss(self.criterion, output, target)
        return attack_gradients(loss, inputs, [*tensors_of(output), *features], retain_graph=retain_graph)


def add_to(feature: Feature, tensors: Sequence[Tensor], delta: Sequence[Tensor]) -> list[Tensor]:
    """f + delta in the precision of delta. Under autocast it stays there, where rounding to bfloat16 would lose it."""
    sums = []
    for tensor, part in zip(tensors, delta, strict=True):
        total = tensor + part
        sums.append(total if feature.autocast else total.to(tensor.dtype))
    return sums


class _AdversarialPass:
    """The context of :meth:`Engine.adversarial_pass`; a class, as every step enters it once per block."""

    def __init__(self, recording: Recording, kept: AbstractContextManager[None] | None):
        self._recording = recording
        self._kept = kept

    def __enter__(self) -> None:
        if self._kept is not None:
            self._kept.__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            if self._kept is not None:
                self._kept.__exit__(*error)
        finally:
            self._recording.end.restore()


def gradients_or_zeros(block: str, gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """A block's gradients, with zeros where one of its tensors leads nowhere.

    Raises:
        BlockError: None of them reaches the loss.
    """
    reached = [gradient for gradient in gradients if gradient is not None]
    if len(reached) == len(gradients):
        return reached
    if not reached:
        raise BlockError(f"block {block!r} has no influence on the loss; choose one that the output depends on")
    return [
        torch.zeros_like(tensor) if gradient is None else gradient
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]


def check_model(model: nn.Module) -> None:
    """Refuse a model whose blocks cannot be reached any more.

    Raises:
        ValueError: It is compiled or distributed already.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model: wrap the AlfaWrapper in DistributedDataParallel, not the model inside it")
    if is_compiled(model):
        raise ValueError("model: pass the model as it was before torch.compile, then call AlfaWrapper.compile()")
