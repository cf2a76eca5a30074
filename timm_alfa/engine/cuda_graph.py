"""A training step as one CUDA graph: where launching kernels is the price, all of them are launched at once.

What is captured is the sweep: from static inputs and targets to the loss, the output and the gradients of all leaves.
The gradients are handed to autograd outside of it, so that loss scaling, accumulation, clipping, hooks,
DistributedDataParallel, the average of the weights and eta's own step stay as they are.

A graph repeats what the host did when it was captured. Steps are therefore captured only after some eager ones that
drew no random number, and again when parameters, buffers or modes of modules change; inputs of another shape, such as
a last smaller batch, run eagerly, with the same result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .hand_over import HandOver, LossScale, refusing_gradients
from .inventory import Inventory
from .nested import copied, detached, map_tensors, tensors_of
from .random_sources import Source, random_sources
from .randomness import RandomState, random_devices

_logger = logging.getLogger(__name__)

EAGER_STEPS = 3  # before a capture: the first ones of an engine look at how the model is called


class Graphable(Protocol):
    """A training step that can be captured."""

    criterion: Any

    def compute(self, input: Any, target: Any) -> dict[str, Any]:
        """``loss``, which has a ``backward``, ``output``, and further tensors, detached."""
        ...

    def graph_inventory(self) -> Inventory:
        """Of the model."""
        ...

    def graph_variant(self) -> Hashable:
        """What the host decides anew in each step; steps that differ in it are captured one by one."""
        ...

    def graph_mode(self) -> AbstractContextManager[None]:
        """Around steps that are captured: nothing is asked of random states."""
        ...

    def graph_replayed(self) -> None:
        """After a replay: count what the host counts."""
        ...


class Capture(Protocol):
    """Makes replays of a function."""

    def __call__(self, function: Callable[[], Any], prepared: Callable[[], AbstractContextManager[None]]) -> Any:
        """Run it for the capture; ``prepared`` surrounds runs whose side effects have to go."""
        ...

    def replay(self) -> None:
        """Run it again, into the same tensors."""
        ...


class CudaCapture:
    """One ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self, function: Callable[[], Any], prepared: Callable[[], AbstractContextManager[None]]) -> Any:
        """Warm up on a stream of its own, then capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), prepared():
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        # Threads of data loaders pin memory meanwhile, which only a capture of this thread alone allows.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """Launch the graph."""
        self._graph.replay()


class _Captured:
    """A captured sweep and its static tensors."""

    def __init__(self, capture: Capture, input: Any, target: Any):
        self.capture = capture
        self.input, self.target = copied(input), copied(target)
        self.result: dict[str, Any] = {}
        self.leaves: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def replay(self, input: Any, target: Any) -> tuple[dict[str, Any], list[Tensor]]:
        for static, given in zip(tensors_of([self.input, self.target]), tensors_of([input, target]), strict=True):
            static.copy_(given, non_blocking=True)
        self.capture.replay()
        # The next replay overwrites all of it, gradients too: those the hand-over multiplies into tensors of their own.
        return {name: map_tensors(Tensor.clone, value) for name, value in self.result.items()}, self.gradients


class GraphedStep:
    """Computes training steps as ``owner.compute`` does, captured ones by a graph.

    Args:
        owner: Whose steps.
        capture: Makes one capture; the default is a CUDA graph.
    """

    def __init__(self, owner: Graphable, capture: Callable[[], Capture] = CudaCapture):
        self._owner = owner
        self._new_capture = capture
        self._captured: dict[Hashable, _Captured] = {}
        self._eager = 0  # steps since the last change
        self._shapes: Hashable = None  # of what is captured
        self._model: Hashable = None  # its fingerprint at the last step
        self._sources: tuple[Source, ...] | None = None
        self._obstacle: str | None = None  # why nothing is captured, once that is known
        self._loss_scale = LossScale()

    def __call__(self, input: Any, target: Any) -> dict[str, Any]:
        """One step.

        Args:
            input: What the model takes.
            target: What the criterion takes.

        Raises:
            RuntimeError: The step waits for the device, or does something else that no graph can hold.
        """
        shapes = _shapes(input, target)
        model = self._fingerprint()
        if model != self._model:
            self._captured.clear()
            self._model, self._eager, self._shapes, self._obstacle = model, 0, None, None
        if self._obstacle is not None or shapes is None or self._shapes not in (None, shapes):
            return self._owner.compute(input, target)
        if self._eager < EAGER_STEPS:
            return self._watched(input, target)
        self._shapes = shapes
        key = (self._owner.graph_variant(), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(input, target)
        result, gradients = captured.replay(input, target)
        self._owner.graph_replayed()
        handed = HandOver.apply(result["loss"], self._loss_scale, 1.0, list(gradients), True, *captured.leaves)
        result["loss"] = handed
        result["output"] = map_tensors(lambda tensor: refusing_gradients(handed, tensor), result["output"])
        return result

    def _watched(self, input: Any, target: Any) -> dict[str, Any]:
        """An eager step that tells whether the model may be captured."""
        inventory = self._owner.graph_inventory()
        if self._sources is None:
            self._sources = random_sources(inventory.model)
        start = RandomState(random_devices(inventory, tuple(tensors_of([input]))), self._sources)
        result = self._owner.compute(input, target)
        self._eager += 1
        if start.differs(start.again()):
            self._obstacle = "the model or the criterion draws random numbers (dropout, drop path)"
        elif inventory.checkpointing():
            self._obstacle = "gradient checkpointing reads the random state"
        elif any(isinstance(module, nn.SyncBatchNorm) for module in inventory.modules):
            self._obstacle = "synchronized batch norms exchange statistics"
        elif torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16:
            self._obstacle = "attacks in float16 look for a scale that does not overflow; bfloat16 needs none"
        elif result.get("others"):
            self._obstacle = "the loss depends on tensors outside of the model and the criterion"
        if self._obstacle is not None:
            _logger.info(f"Steps are not captured as CUDA graphs: {self._obstacle}.")
        return result

    def _capture(self, input: Any, target: Any) -> _Captured:
        captured = _Captured(self._new_capture(), input, target)
        inventory = self._owner.graph_inventory()
        leaves = self._leaves()

        def sweep() -> tuple[dict[str, Any], Sequence[Tensor | None]]:
            with self._owner.graph_mode(), _without_autocast_cache():
                result = self._owner.compute(captured.input, captured.target)
                found = torch.autograd.grad(result["loss"], leaves, allow_unused=True)
            return {**result, "loss": result["loss"].detach(), "output": detached(result["output"])}, found

        try:
            result, found = captured.capture(sweep, lambda: _undone(inventory))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeError(
                f"the step cannot be captured as a CUDA graph ({reason}); leave cuda_graph out"
            ) from error
        captured.result = result
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                captured.leaves.append(leaf)
                captured.gradients.append(gradient)
        return captured

    def _leaves(self) -> list[Tensor]:
        """Of the model, and of a criterion that is a module."""
        found: list[Tensor] = list(self._owner.graph_inventory().trainable())
        criterion = self._owner.criterion
        if isinstance(criterion, nn.Module):
            known = set(map(id, found))
            found += [leaf for leaf in criterion.parameters() if leaf.requires_grad and id(leaf) not in known]
        return found

    def _fingerprint(self) -> Hashable:
        """What a graph takes for granted: where parameters and buffers are, which of them train, modes of modules."""
        inventory = self._owner.graph_inventory()
        inventory.refresh()
        entries = chain.from_iterable(map(dict.values, map(_buffers, inventory.modules)))
        buffers = [buffer for buffer in entries if buffer is not None]
        return (
            tuple(map(Tensor.data_ptr, inventory.parameters)),
            tuple(map(Tensor.data_ptr, buffers)),
            tuple(map(_requires_grad, inventory.parameters)),
            tuple(map(_training, inventory.modules)),
        )


_buffers, _training = attrgetter("_buffers"), attrgetter("training")
_requires_grad = attrgetter("requires_grad")


def _shapes(input: Any, target: Any) -> Hashable:
    """What has to be alike for a graph to serve; None where gradients have to go on from the input."""
    tensors = tensors_of([input, target])
    if any(tensor.requires_grad for tensor in tensors):
        return None
    return tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)


@contextmanager
def _undone(inventory: Inventory) -> Iterator[None]:
    """What runs inside moves no buffer: statistics are put back in place."""
    buffers = [buffer for module in inventory.modules for buffer in module._buffers.values() if buffer is not None]
    before = [buffer.clone() for buffer in buffers]
    yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Weights that were cast before the capture are not part of the graph, and would not follow the optimizer."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
