"""The clean pass, recorded: features of the blocks, outputs that replays return again, and cuts of the graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import BlockError
from .interception import Interception, Region
from .nested import copied, is_floating, memory_of, tensors_of
from .randomness import RandomState

if TYPE_CHECKING:
    from .tail import Tail

LEAF = tree_flatten(torch.empty(0))[1]  # how one tensor is nested


@dataclass
class Feature:
    """Output of a block: a tensor, or nested lists, tuples and dicts of tensors.

    Args:
        tensors: The floating-point tensors of the output, each [B, ...], connected to the clean graph.
        leaves: All leaves of the output.
        spec: How the leaves were nested.
        autocast: Whether the block ended under autocast, which the training loop or the model itself may have opened.
        leaf: Whether the output is one tensor, as most are.
    """

    tensors: list[Tensor]
    leaves: list[Any]
    spec: TreeSpec
    autocast: bool = False
    leaf: bool = False

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The block's output with its floating-point tensors replaced, in their order."""
        if self.leaf:
            return tensors[0]
        remaining = iter(tensors)
        leaves = [next(remaining) if is_floating(leaf) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)

    def detached(self) -> Feature:
        """The same without the graph behind it."""
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return Feature([leaf for leaf in leaves if is_floating(leaf)], leaves, self.spec, self.autocast, self.leaf)


@dataclass(eq=False)
class Cut:
    """Where a clean graph was cut: the rest of the model was given leaves instead of a region's output.

    Args:
        order: Position among the calls of the clean pass.
        block: The chosen block's name, or ``None`` for an output that bypasses a block.
        tensors: The output's floating-point tensors, at the end of what came before.
        leaves: The same values, at the start of what came after.
        use: What is known about an output that bypasses a block.
    """

    order: int
    block: str | None
    tensors: list[Tensor]
    leaves: list[Tensor]
    use: OutputUse | None = None


class Call(NamedTuple):
    """One call of a region that finished before the last block did.

    Args:
        use: What is known about its output.
        order: Position among the calls of this pass.
        output: What it returned.
        versions: Of the tensors in it; not kept of several that nothing reads.
        state: Random state when the call had finished; not kept if nothing is drawn before the next call.
    """

    use: OutputUse
    order: int
    output: Any
    versions: list[int] | None = None
    state: RandomState | None = None


@dataclass
class Recording:
    """What a clean pass left behind: the output, the chosen blocks' features and what replays need.

    Args:
        output: The model's output.
        features: Block name -> :class:`Feature`, in the order in which the blocks were asked for.
        cuts: Where the graph was cut, in order of execution; empty unless asked for.
        start: Random state before the pass.
        end: Random state after it.
        draws: Whether the model drew random numbers.
        whole: Whether every output was kept with its random state and versions, as watched replays need them.
    """

    output: Any
    features: dict[str, Feature]
    cuts: list[Cut]
    start: RandomState
    end: RandomState
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    draws: bool = True
    whole: bool = True
    calls: dict[Region, list[Call]] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    tails: dict[str, Tail] = field(default_factory=dict)

    def forget(self, after: int) -> None:
        """Drop what only replays of blocks after this position need, so that the graph behind it can be freed."""
        self.output = None
        self.tails.clear()
        if after == max(self.order.values()):
            return  # nothing after the last block was kept
        self.features = {name: feature for name, feature in self.features.items() if self.order[name] <= after}
        for calls in self.calls.values():
            while calls and calls[-1].order > after:
                calls.pop()


@dataclass
class OutputUse:
    """What earlier passes showed about a region's output.

    Args:
        region: Name of the region.
        count: How many times it had been called before.
    """

    region: str
    count: int
    mutated: bool = False  # a later operation wrote into it
    read: bool = False  # a replay read it (most outputs only feed regions that do not compute)
    idle: bool = False  # though read, no adversarial loss depended on it
    drawn_after: bool = False  # random numbers were drawn after it, before the next region was called
    seen: bool = False  # by a whole pass: it is known whether it is mutated
    settled: bool = False  # by watched replays as well: the rest is known, too
    simple: bool = False  # all known, and there is nothing to do but to return it again


class OutputUses:
    """What earlier passes showed about regions' outputs, by region and call.

    Args:
        blocks: Names of the blocks.
        joint: Whether one of them alone is replayed from; otherwise all are.
    """

    def __init__(self, blocks: Collection[str], *, joint: bool = False):
        self._blocks = frozenset(blocks)
        self._joint = joint
        self.watched: set[str] = set()  # blocks whose replays were watched
        self.pending = True  # some replay is still to be watched
        self.by_call: dict[tuple[str, int], OutputUse] = {}
        self.drawn_before = False  # random numbers, before the first region was called
        self.varies = False  # how often a region runs: what is known of one output then says nothing of the next

    def of(self, region: str, count: int) -> OutputUse:
        """What is known about one output; at first nothing."""
        use = self.by_call.get((region, count))
        if use is None:
            use = self.by_call[region, count] = OutputUse(region, count)
        return use

    def bypasses(self, use: OutputUse) -> bool:
        """Whether a replay was seen to use this output, and its loss to depend on it: it bypasses a block."""
        return use.read and not use.idle

    def needs_copy(self, use: OutputUse) -> bool:
        """Whether somebody else writes into this output while a replay needs it as it was."""
        return self.varies or not use.seen or (use.mutated and (use.read or self.pending))

    def note_watched(self, block: str) -> None:
        """After a watched replay; the last one tells which outputs need no care."""
        self.watched.add(block)
        self.pending = not (self._joint or self.watched >= self._blocks)
        if not (self.pending or self.varies):
            for use in self.by_call.values():
                use.settled = use.seen
                care = use.read or use.drawn_after or use.region in self._blocks
                use.simple = use.settled and not care

    def watch_again(self) -> None:
        """The model does something that it did not do before: the next replays are watched."""
        self.watched.clear()
        self.pending = True
        for use in self.by_call.values():
            use.settled = use.simple = False


class RecordPass:
    """Keeps what every region returned until the last block has run.

    Args:
        regions: Whose calls to intercept.
        blocks: Names of the blocks.
        uses: Of outputs, as earlier passes showed them.
        start: Random state before the pass.
        cut: Blocks at which to cut the graph.
        draws: Whether the model draws random numbers, as far as is known: else only the blocks' states are kept.
        first: Whether the regions are still to be found: whatever is called is intercepted to the end, and compiled
            code left out, as it would trace into that.
    """

    def __init__(
        self,
        regions: Iterable[Region],
        blocks: Collection[str],
        uses: OutputUses,
        start: RandomState,
        cut: Collection[str],
        *,
        draws: bool,
        first: bool,
    ):
        self.blocks = blocks
        self.uses = uses
        self.start = start
        self.cut = cut
        self.draws = draws
        self.first = first
        self.whole = uses.pending
        self.interception = Interception({region: partial(self.call, region) for region in regions})
        self.calls: dict[Region, list[Call]] = {}
        self.features: dict[str, Feature] = {}
        self.cuts: list[Cut] = []
        self.order: dict[str, int] = {}
        self.count = 0
        self.depth = 0  # > 0 inside a computing region: calls from there belong to that region
        self.copies: list[tuple[OutputUse, list[Tensor], list[Tensor], list[int]]] = []

    def call(self, region: Region, /, *args: Any, **kwargs: Any) -> Any:
        """Compute, and keep what replays need. Runs for every region of every step: no call that it can do without."""
        if region.is_block:
            self._check_block_call(region)
        elif self.depth or len(self.order) == len(self.blocks):
            return region.compute(args, kwargs, self.first)
        inside = not region.contains_block
        self.depth += inside
        try:
            if region.compiled is None or self.first:
                output = region.module._call_impl(*args, **kwargs)
            else:
                output = region.compiled(*args, **kwargs)
        finally:
            self.depth -= inside
        calls = self.calls.get(region)
        if calls is None:
            calls = self.calls[region] = []
        use = self.uses.by_call.get((region.name, len(calls)))
        if use is not None and use.simple:
            versions = [output._version] if isinstance(output, Tensor) else None
            calls.append(tuple.__new__(Call, (use, self.count, output, versions, None)))
            self.count += 1
            return output
        return self._keep(region, calls, output)

    def _keep(self, region: Region, calls: list[Call], output: Any) -> Any:
        """Keep an output that needs care: copies, versions, random states, cuts."""
        use = self.uses.of(region.name, len(calls))
        if region.is_block:
            output = self._keep_feature(region, output)
            self.order[region.name] = self.count
            if len(self.order) == len(self.blocks) and not self.first:
                self.interception.stop()  # the rest is the model's own
        if region.name in self.cut or (self.cut and not region.is_block and self.uses.bypasses(use)):
            output = self._cut(region, output, None if region.is_block else use)
        handed = output
        if self.uses.needs_copy(use):
            handed = copied(handed)
            tensors = tensors_of(handed)
            self.copies.append((use, tensors_of(output), tensors, [tensor._version for tensor in tensors]))
        if isinstance(output, Tensor):
            versions = [output._version]
        else:
            versions = [tensor._version for tensor in tensors_of(output)]
        state = None
        if region.is_block or (self.draws and (use.drawn_after or not use.settled)):
            state = self.start.again()
        calls.append(Call(use, self.count, output, versions, state))
        self.count += 1
        return handed

    def _check_block_call(self, region: Region) -> None:
        if region.name in self.order:
            raise BlockError(
                f"block {region.name!r} runs several times per forward, so its output is not one feature; "
                "choose a block that runs once, such as the one around it"
            )
        if self.depth:
            raise BlockError(
                f"block {region.name!r} is called by a module that does not contain it and cannot be replayed; "
                "choose the block around it"
            )
        if not torch.is_grad_enabled():
            raise BlockError(
                f"block {region.name!r} runs without gradient tracking (reentrant checkpointing?); "
                "use non-reentrant checkpointing"
            )

    def _keep_feature(self, region: Region, output: Any) -> Any:
        """Note a chosen block's output; returns it with a gradient, should a frozen prefix have left it without."""
        if isinstance(output, Tensor) and output.is_floating_point():
            leaf = output if output.requires_grad else output.detach().requires_grad_()
            autocast = torch.is_autocast_enabled(leaf.device.type)
            self.features[region.name] = Feature([leaf], [leaf], LEAF, autocast, True)
            return leaf
        leaves, spec = tree_flatten(output)
        floating = [index for index, leaf in enumerate(leaves) if is_floating(leaf)]
        if not floating:
            raise BlockError(
                f"block {region.name!r} returns no floating-point tensor (but {type(output).__name__}); "
                "choose a block that returns a feature map"
            )
        for index in floating:
            if not leaves[index].requires_grad:
                leaves[index] = leaves[index].detach().requires_grad_()
            elif len(floating) > 1:  # one may be computed from another, or be it: each is to have its own gradient
                leaves[index] = leaves[index].view_as(leaves[index])
        tensors = [leaves[index] for index in floating]
        autocast = torch.is_autocast_enabled(tensors[0].device.type)
        feature = Feature(tensors, leaves, spec, autocast)
        self.features[region.name] = feature
        return feature.rebuild(tensors)

    def _cut(self, region: Region, output: Any, use: OutputUse | None) -> Any:
        if isinstance(output, Tensor):
            leaves, spec = [output], LEAF
        else:
            leaves, spec = tree_flatten(output)
        cut = Cut(self.count, region.name if region.is_block else None, [], [], use)
        for index, leaf in enumerate(leaves):
            if is_floating(leaf) and leaf.requires_grad:
                leaves[index] = leaf.detach().requires_grad_()
                cut.tensors.append(leaf)
                cut.leaves.append(leaves[index])
        self.cuts.append(cut)
        return leaves[0] if spec is LEAF else tree_unflatten(leaves, spec)

    def note_mutations(self) -> None:
        """After the pass: which outputs were written into."""
        if not self.copies:
            return
        written: set[int] = set()
        for use, returned, handed, versions in reversed(self.copies):
            moved = any(tensor._version != version for tensor, version in zip(handed, versions, strict=True))
            if moved or not written.isdisjoint(memory_of(handed)):
                use.mutated = True
                # What a module was given and returned as it is (nn.Identity) would have been written to without copies.
                written |= memory_of(returned)
        for use, *_ in self.copies:
            if not use.seen and not self.uses.pending:
                self.uses.watch_again()  # one that there was not when replays were watched
            use.seen = True
