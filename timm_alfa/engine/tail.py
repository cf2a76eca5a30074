"""The tail of a block, replayed: what was recorded up to the block, a given value there, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import BlockError
from .grad_checkpointing import inside_checkpoint
from .interception import Interception, Region
from .nested import change_floating, copied, detached, tensors_of
from .randomness import RandomState
from .recording import Call, OutputUse, Recording

if TYPE_CHECKING:
    from .replay import Replay

Change: TypeAlias = Callable[[list[Tensor]], Sequence[Tensor]]  # a block's floating-point tensors -> perturbed ones
NOTHING: Mapping[Any, Change] = {}


class Tail:
    """T_i of one clean pass: returns what was recorded up to a block, a given value there, and computes what follows.

    Args:
        replay: Whose model runs.
        recording: Of the clean pass.
        block: Its name.
    """

    def __init__(self, replay: Replay, recording: Recording, block: str):
        self._replay = replay
        self._uses = replay.uses
        self._start, self._draws, self._whole = recording.start, recording.draws, recording.whole
        self._args, self._kwargs = recording.args, recording.kwargs
        self._block = block
        self._calls: dict[Region, list[Call]] = {}
        last = recording.order[block]
        for region, calls in recording.calls.items():
            if calls[-1:] and calls[-1].order <= last:
                self._calls[region] = calls
            elif calls and calls[0].order <= last:
                self._calls[region] = [call for call in calls if call.order <= last]
        self._handed: list[tuple[OutputUse, list[Tensor], bool]] = []  # whether it was written into since

    def run(self, value: Any, detach: bool, later: Mapping[Region, Change] = NOTHING, watch: bool = False) -> Any:
        """One replay, see :meth:`Replay.replay`.

        Args:
            value: What the block returns.
            detach: Cut the outputs of earlier regions from the graph.
            later: What becomes of the outputs of blocks in the tail.
            watch: Note which of them are read, and where random numbers are drawn; compiled code is left out.
        """
        self._value, self._detach, self._later, self._watch = value, detach, later, watch
        self._reached = False
        self._last: tuple[OutputUse | None, RandomState] | None = None  # drawn from since, unless it is None
        if self._draws:
            self._start.restore()
            self._last = (None, self._start)
        handlers = {region: partial(self._call, region, iter(calls)) for region, calls in self._calls.items()}
        self._interception = Interception(handlers)
        checkpointing = self._replay.inventory.checkpointing()
        args, kwargs = self._args, self._kwargs
        if self._replay.writes_input:
            args, kwargs = copied((args, kwargs))
        try:
            # A recomputation in backward would not see the perturbation: replays keep what their tails compute.
            for module in checkpointing:
                module.grad_checkpointing = False  # type: ignore[assignment]
            self._interception.start()
            output = self._replay.model(*args, **kwargs)
        finally:
            self._interception.stop()
            for module in checkpointing:
                module.grad_checkpointing = True  # type: ignore[assignment]
            del self._value, self._later, self._interception
        if not self._reached:
            raise BlockError(f"block {self._block!r} ran in the clean pass but not in its replay")
        return output

    def note_reads(self, reads: Reads) -> None:
        """After a watched run: which outputs an operation took.

        Args:
            reads: What was watched.
        """
        self._uses.of(self._block, 0).read = True
        for use, tensors, stale in self._handed:
            if any(id(tensor) in reads.seen for tensor in tensors):
                use.read = True
                if stale:
                    self._replay.note_stale(use.region)
        self._handed.clear()

    def _call(self, region: Region, calls: Iterator[Call], /, *args: Any, **kwargs: Any) -> Any:
        """In place of a region that had finished before the block."""
        for call in calls:
            use = call.use
            return call.output if use.simple else self._hand_out(region, call)
        return self._beyond(region, args, kwargs)

    def _hand_out(self, region: Region, call: Call) -> Any:
        """What the region returned, with whatever care it needs; from the block on, the model is left to itself."""
        _refuse_checkpoint(self._block)
        use, copy = call.use, self._uses.needs_copy(call.use)
        if self._last is not None and (self._watch or region.name == self._block):
            self._note_draws(*self._last)
        if call.state is not None:
            call.state.restore()
            self._last = (use, call.state) if self._draws else None
        if region.name == self._block:
            self._reached = True
            self._interception.stop()
            if self._later:
                self._interception = Interception({r: partial(self._changed, r) for r in self._later})
                self._interception.start()
            return copied(self._value) if copy else self._value
        stale = call.versions is not None and [t._version for t in tensors_of(call.output)] != call.versions
        if stale and use.read and not self._watch:
            raise RuntimeError(
                f"the output of {use.region!r} was modified in place after it was remembered, which it was not in "
                "earlier steps; build a new AlfaWrapper after changing the model or its mode"
            )
        output = copied(call.output) if copy else call.output
        if self._detach:
            output = detached(output)
        if self._watch:
            self._handed.append((use, tensors_of(output), stale))
        return output

    def _changed(self, region: Region, /, *args: Any, **kwargs: Any) -> Any:
        """In place of a block in the tail: its output, perturbed."""
        _refuse_checkpoint(region.name)
        return change_floating(self._later[region], region.compute(args, kwargs, eager=self._watch))

    def _note_draws(self, use: OutputUse | None, state: RandomState) -> None:
        """Whether random numbers were drawn since a state was restored after an output, or at the start."""
        if self._watch:
            if self._whole and state.differs(state.again()):
                if use is None:
                    self._uses.drawn_before = True
                else:
                    use.drawn_after = True
        elif use is None and not self._uses.drawn_before and state.differs(state.again()):
            self._replay.note_draws()

    def _beyond(self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that the clean pass did not make before the block: it computes, and its own calls are its own."""
        interception = self._interception
        interception.stop()
        try:
            return region.module(*args, **kwargs)
        finally:
            interception.start()


def _refuse_checkpoint(block: str) -> None:
    if inside_checkpoint():
        raise BlockError(
            f"block {block!r} cannot be replayed inside a checkpointed part of the model, whose recomputation would "
            "not see the perturbation; turn checkpointing off or choose another block"
        )


class Reads(TorchFunctionMode):
    """Remembers every tensor that an operation took while it was active."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) or getattr(func, "__name__", "") != "__get__":  # a shape or a dtype is no value
            self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return result
