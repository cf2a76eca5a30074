"""The clean pass, recorded: features of the blocks, outputs that replays return again, and cuts of the graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import BlockError
from .interception import Pass, Region
from .nested import copied, is_floating, memory_of, tensors_of
from .randomness import RandomState


@dataclass
class Feature:
    """Output of a block: a tensor, or nested lists, tuples and dicts of tensors.

    Args:
        tensors: The floating-point tensors of the output, each [B, ...], connected to the clean graph.
        leaves: All leaves of the output.
        spec: How the leaves were nested.
        autocast: Whether the block ended under autocast, which the training loop or the model itself may have opened.
    """

    tensors: list[Tensor]
    leaves: list[Any]
    spec: TreeSpec
    autocast: bool = False

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The block's output with its floating-point tensors replaced, in their order."""
        remaining = iter(tensors)
        leaves = [next(remaining) if is_floating(leaf) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)


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


@dataclass
class Call:
    """One call of a region that finished before the last block did."""

    key: tuple[str, int]  # region and how many times it had been called before
    order: int  # position among the calls of this pass
    output: Any
    versions: list[int]
    state: RandomState  # when the call had finished


@dataclass
class Recording:
    """What a clean pass left behind: the output, the chosen blocks' features and what replays need.

    Args:
        output: The model's output.
        features: Block name -> :class:`Feature`, in the order in which the blocks were asked for.
        cuts: Where the graph was cut, in order of execution; empty unless asked for.
        start: Random state before the pass.
        end: Random state after it.
        draws: Whether every call's random state was kept, or those of the blocks alone.
    """

    output: Any
    features: dict[str, Feature]
    cuts: list[Cut]
    start: RandomState
    end: RandomState
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    draws: bool = True
    calls: dict[Region, list[Call]] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)

    def forget(self, after: int) -> None:
        """Drop what only replays of blocks after this position need, so that the graph behind it can be freed."""
        self.output = None
        self.features = {name: feature for name, feature in self.features.items() if self.order[name] <= after}
        for calls in self.calls.values():
            calls[:] = [call for call in calls if call.order <= after]


@dataclass
class OutputUse:
    """What earlier passes showed about a region's output."""

    mutated: bool = False  # a later operation wrote into it
    read: bool = False  # a replay read it (most outputs only feed regions that do not compute)
    idle: bool = False  # though read, no adversarial loss depended on it


class OutputUses:
    """What earlier passes showed about regions' outputs, by region and call.

    Args:
        blocks: Names of the blocks, whose replays are still to be watched.
    """

    def __init__(self, blocks: Collection[str]):
        self.unwatched = set(blocks)
        self._by_call: dict[tuple[str, int], OutputUse] = {}

    def of(self, key: tuple[str, int]) -> OutputUse:
        """What is known about one output; at first nothing."""
        return self._by_call.setdefault(key, OutputUse())

    def bypasses(self, key: tuple[str, int]) -> bool:
        """Whether a replay was seen to use this output, and its loss to depend on it: it bypasses a block."""
        use = self._by_call.get(key)
        return use is not None and use.read and not use.idle

    def needs_copy(self, key: tuple[str, int]) -> bool:
        """Whether somebody else writes into this output while a replay needs it as it was."""
        use = self._by_call.get(key)
        return use is None or (use.mutated and (use.read or bool(self.unwatched)))


class RecordPass(Pass):
    """Keeps what every region returned until the last block has run.

    Args:
        blocks: Names of the blocks.
        uses: Of outputs, as earlier passes showed them.
        start: Random state before the pass.
        cut: Blocks at which to cut the graph.
        draws: Whether the model draws random numbers, as far as is known: else only the blocks' states are kept.
        eager: Leave compiled code out: it would trace into intercepted calls inside it.
    """

    def __init__(
        self,
        blocks: Collection[str],
        uses: OutputUses,
        start: RandomState,
        cut: Collection[str],
        *,
        draws: bool,
        eager: bool,
    ):
        self.blocks = blocks
        self.uses = uses
        self.start = start
        self.cut = cut
        self.draws = draws
        self.eager = eager
        self.calls: dict[Region, list[Call]] = {}
        self.features: dict[str, Feature] = {}
        self.cuts: list[Cut] = []
        self.order: dict[str, int] = {}
        self.count = 0
        self.copies: list[tuple[OutputUse, list[Tensor], list[Tensor], list[int]]] = []

    def call(self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute, and keep what replays need."""
        if region.is_block:
            self._check_block_call(region)
        elif self.depth or len(self.order) == len(self.blocks):
            return region.compute(args, kwargs, self.eager)
        output = self.compute(region, args, kwargs, self.eager)
        if self.depth or len(self.order) == len(self.blocks):
            return output
        calls = self.calls.setdefault(region, [])
        key = (region.name, len(calls))
        if region.is_block:
            output = self._keep_feature(region, output)
            self.order[region.name] = self.count
        if region.name in self.cut or (self.cut and not region.is_block and self.uses.bypasses(key)):
            output = self._cut(region, output, None if region.is_block else self.uses.of(key))
        handed = output
        if self.uses.needs_copy(key):
            handed = copied(handed)
            tensors = tensors_of(handed)
            use = self.uses.of(key)
            self.copies.append((use, tensors_of(output), tensors, [tensor._version for tensor in tensors]))
        versions = [tensor._version for tensor in tensors_of(output)]
        state = self.start.again() if self.draws or region.is_block else self.start
        calls.append(Call(key, self.count, output, versions, state))
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
        self.features[region.name] = Feature(tensors, leaves, spec, autocast)
        return tree_unflatten(leaves, spec)

    def _cut(self, region: Region, output: Any, use: OutputUse | None) -> Any:
        leaves, spec = tree_flatten(output)
        cut = Cut(self.count, region.name if region.is_block else None, [], [], use)
        for index, leaf in enumerate(leaves):
            if is_floating(leaf) and leaf.requires_grad:
                leaves[index] = leaf.detach().requires_grad_()
                cut.tensors.append(leaf)
                cut.leaves.append(leaves[index])
        self.cuts.append(cut)
        return tree_unflatten(leaves, spec)

    def note_mutations(self) -> None:
        """After the pass: which outputs were written into."""
        written: set[int] = set()
        for use, returned, handed, versions in reversed(self.copies):
            moved = any(tensor._version != version for tensor, version in zip(handed, versions, strict=True))
            if moved or not written.isdisjoint(memory_of(handed)):
                use.mutated = True
                # What a module was given and returned as it is (nn.Identity) would have been written to without copies.
                written |= memory_of(returned)
