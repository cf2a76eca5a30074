"""Run a model once, then run it again from a block: the tail replay.

During the clean pass every *region* keeps its output. A region is a submodule without a chosen block inside that is
called from outside of any other such submodule, or a chosen block itself; what lies above the regions (the modules on
the *path* to a block, with their functional glue) is orchestration. In a replay the regions that had finished before
block ``i`` return what they returned in the clean pass without computing, block ``i`` returns the given value, and
everything after it, the tail, computes. Position embeddings, flattening, concatenations and skip connections around the
block therefore need no special case.

The first clean pass intercepts every submodule to find the regions, and copies what they hand on; the first replays
show which outputs are read, and so which of those that are later written to in place have to be copied from then on.

This is the only file that intercepts module calls. It does so through the slot that ``nn.Module.compile`` uses, filled
for the duration of one pass and emptied in ``finally``: nothing stays on the model between passes, copies and pickles
never see it, and regions that were compiled one by one keep their compiled call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from ..errors import BlockError
from .compiler import allow_second_walks, is_compiled, refuse_cuda_graphs
from .grad_checkpointing import inside_checkpoint, last_of_sequence, without_checkpointing
from .random_sources import Source, moved, random_sources
from .randomness import RandomState

_logger = logging.getLogger(__name__)

_SLOT = "_compiled_call_impl"  # read by nn.Module.__call__ before anything else, left out of copies and pickles


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
        leaves = [next(remaining) if _is_floating(leaf) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)


@dataclass(eq=False)
class Cut:
    """Where a clean graph was cut: the rest of the model was given leaves instead of a region's output.

    Args:
        order: Position among the calls of the clean pass.
        block: The chosen block's name, or ``None`` for an output that bypasses a block.
        tensors: The output's floating-point tensors, at the end of what came before.
        leaves: The same values, at the start of what came after.
    """

    order: int
    block: str | None
    tensors: list[Tensor]
    leaves: list[Tensor]


@dataclass
class _Call:
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
    """

    output: Any
    features: dict[str, Feature]
    cuts: list[Cut]
    start: RandomState
    end: RandomState
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calls: dict[_Region, list[_Call]] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)

    def forget(self, after: int) -> None:
        """Drop what only replays of blocks after this position need, so that the graph behind it can be freed."""
        self.output = None
        self.features = {name: feature for name, feature in self.features.items() if self.order[name] <= after}
        for calls in self.calls.values():
            calls[:] = [call for call in calls if call.order <= after]


class _Region:
    """A module whose calls are intercepted while a pass runs; the pass decides what a call does."""

    def __init__(self, name: str, module: nn.Module, is_block: bool, on_path: bool):
        self.name = name
        self.module = module
        self.is_block = is_block
        self.on_path = on_path  # a block above another block: it must run for the other to be reached
        self.pass_: _Pass | None = None
        self.compiled: Any = None  # what the slot held before the pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.pass_ is not None
        return self.pass_.call(self, args, kwargs)

    def compute(self, args: tuple[Any, ...], kwargs: dict[str, Any], eager: bool = False) -> Any:
        """What the module itself returns, hooks included; compiled if it was, unless ``eager``."""
        if self.compiled is None or eager:
            return self.module._call_impl(*args, **kwargs)
        return self.compiled(*args, **kwargs)


class Replay:
    """Records a clean pass of a model and replays the tails of chosen blocks.

    Args:
        model: Any module; not itself compiled (what it consists of may be).
        blocks: Name -> submodule. Each must run exactly once per forward.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module]):
        self.model = model
        _refuse_blocks_inside(model, blocks)
        self._given = dict(blocks)
        self.blocks = {name: last_of_sequence(model, block) for name, block in blocks.items()}
        self._candidates = list(_candidates(model, self.blocks))
        self._known: list[_Region] | None = None  # the regions, once a clean pass has shown them
        self._optional: set[_Region] = set()  # regions that some passes do without (layers dropped at random)
        self._habits: dict[tuple[str, int], _Habit] = {}
        self._unwatched = set(self.blocks)  # blocks whose replay has not been observed yet
        self._sources: tuple[Source, ...] | None = None  # of random numbers, besides torch's; found in the first pass
        self._drawn_from: tuple[Source, ...] = ()  # those that some pass has drawn from
        self._writes_input: bool | None = None  # the model, into what it is given; the first pass shows it
        allow_second_walks()  # parts may be compiled later, too

    def __getstate__(self) -> dict[str, Any]:
        """A copy has generators of its own, which its first pass finds."""
        return {**self.__dict__, "_sources": None, "_drawn_from": ()}

    def record(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, cut: Collection[str] = ()
    ) -> Recording:
        """Run the model once and remember what replays need.

        Args:
            args: Positional arguments of the model.
            kwargs: Keyword arguments of the model.
            cut: Blocks at which to cut the graph: the rest of the model is given leaves in place of their features,
                and of the outputs that bypass blocks, as far as replays have shown these. The graph then falls into
                pieces that can be differentiated, and freed, one at a time.

        Raises:
            BlockError: A block ran several times, not at all, inside another region, without gradient tracking
                (reentrant checkpointing), or returned no floating-point tensor.
            RuntimeError: The model wrote into its input, which it did not in the first pass.
        """
        if is_compiled(self.model):
            raise BlockError(
                "the model was compiled as a whole after AlfaWrapper was built; call AlfaWrapper.compile() (a task's "
                "compile()) in place of model.compile()"
            )
        given = (args, dict(kwargs or {}))
        kept = given if self._writes_input is False else _copy(given)
        versions = [tensor._version for tensor in _tensors(given)]
        first = self._sources is None
        if self._sources is None:
            self._sources = self._drawn_from = random_sources(self.model)
        untouched = [source for source in self._sources if source not in self._drawn_from]
        states = [source.get() for source in untouched]
        start = RandomState.capture(random_devices(self.model, args), self._drawn_from)
        pass_ = _RecordPass(self, start, cut)
        with _intercept(self._candidates if self._known is None else self._known, pass_):
            output = self.model(*args, **(kwargs or {}))
        missing = [name for name in self.blocks if name not in pass_.order]
        if missing and dict(self.model.named_modules()).get(missing[0]) is not self._given[missing[0]]:
            raise BlockError(
                f"block {missing[0]!r} was replaced after AlfaWrapper was built; build AlfaWrapper afterwards, and to "
                "compile call its compile()"
            )
        if missing:
            raise BlockError(f"block {missing[0]!r} did not run in the model's forward; choose one that does")
        self._note_input(given, versions)
        pass_.note_mutations()
        self._note_regions(set(pass_.calls))
        end = start.again()
        if first:
            moving = zip(start.sources, start.others, end.others, strict=True)
            self._drawn_from = tuple(source for source, before, after in moving if moved(before, after))
        late = [source for source, state in zip(untouched, states, strict=True) if moved(state, source.get())]
        if late:
            self._drawn_from += tuple(late)
            end = RandomState.capture(start.devices, self._drawn_from)
            _logger.warning(
                f"the model draws from {', '.join(source.name for source in late)}, which it did not in its first "
                "step: the adversarial pass of this one step draws other numbers, later ones repeat them"
            )
        args_again, kwargs_again = kept if self._writes_input else given
        return Recording(
            output,
            {name: pass_.features[name] for name in self.blocks},
            pass_.cuts,
            start,
            end,
            args_again,
            kwargs_again,
            pass_.calls,
            pass_.order,
        )

    def replay(self, recording: Recording, block: str, value: Any, *, detach: bool = False) -> Any:
        """The model's output when ``block`` returns ``value``: only its tail computes.

        The random state runs through the same values as in the clean pass and is left where the tail leaves it.

        Args:
            recording: What :meth:`record` returned.
            block: Name of the block.
            value: In the structure of the block's output.
            detach: Cut the remembered outputs of earlier regions (skip connections around the block) from the graph.
        """
        watch = block in self._unwatched
        pass_ = _ReplayPass(self, recording, block, value, detach, watch)
        recording.start.restore()
        stance = torch.compiler.set_stance("force_eager") if watch else nullcontext()  # operations are watched
        with _intercept(pass_.regions, pass_), without_checkpointing(self.model), stance, pass_.reads:
            args, kwargs = (recording.args, recording.kwargs)
            if self._writes_input:
                args, kwargs = _copy((args, kwargs))
            output = self.model(*args, **kwargs)
        if not pass_.reached:
            raise BlockError(f"block {block!r} ran in the clean pass but not in its replay")
        if watch:
            pass_.note_reads()
            self._unwatched.discard(block)
        return output

    def is_read(self, key: tuple[str, int]) -> bool:
        """Whether a replay was seen to use this output of a region: it bypasses a block."""
        return key in self._habits and self._habits[key].read

    def compile(self, **options: Any) -> None:
        """``torch.compile`` the maximal submodules without a block inside, and the blocks, one by one.

        What orchestrates them stays eager: a compiled graph can neither return from the middle nor start there.

        Args:
            options: Of ``torch.compile``.

        Raises:
            ValueError: They make CUDA graphs.
        """
        refuse_cuda_graphs(self.model, options)
        allow_second_walks()
        for region in self._candidates:
            if not any(_contains(other.module, region.module) for other in self._candidates if other is not region):
                region.module.compile(**options)

    def _note_input(self, given: Any, versions: list[int]) -> None:
        """A model that writes into its input (normalises it in place) leaves nothing to run it again on but a copy."""
        written = [tensor._version for tensor in _tensors(given)] != versions
        if written and self._writes_input is False:
            raise RuntimeError(
                "the model wrote into its input in place, which it did not in the first step; build a new AlfaWrapper "
                "after changing the model or its mode"
            )
        self._writes_input = written or bool(self._writes_input)

    def _note_regions(self, called: set[_Region]) -> None:
        if self._known is None:
            self._known = [region for region in self._candidates if region in called or region in self._optional]
            return
        missing = [region for region in self._known if region not in called and region not in self._optional]
        if missing:  # another way through the model: look again, at all of it, in the next pass
            self._optional.update(self._known)
            self._known = None
            self._unwatched = set(self.blocks)

    def needs_copy(self, key: tuple[str, int]) -> bool:
        """Whether somebody else writes into this output while a replay needs it as it was."""
        habit = self._habits.get(key)
        return habit is None or (habit.mutated and (habit.read or bool(self._unwatched)))


@dataclass
class _Habit:
    """What earlier passes showed about a region's output."""

    mutated: bool = False  # a later operation wrote into it
    read: bool = False  # a replay read it (most outputs only feed regions that do not compute)


class _Pass:
    """Decides what an intercepted call does."""

    depth = 0  # > 0 inside a computing region: calls from there belong to that region

    def call(self, region: _Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def compute(self, region: _Region, args: tuple[Any, ...], kwargs: dict[str, Any], eager: bool = False) -> Any:
        self.depth += not region.on_path
        try:
            return region.compute(args, kwargs, eager)
        finally:
            self.depth -= not region.on_path


class _WatchPass(_Pass):
    """Computes everything, uncompiled, and reports what each module returned."""

    def __init__(self, report: Callable[[str, nn.Module, Any], None]):
        self.report = report

    def call(self, region: _Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = region.compute(args, kwargs, eager=True)
        self.report(region.name, region.module, output)
        return output


class _RecordPass(_Pass):
    def __init__(self, owner: Replay, start: RandomState, cut: Collection[str]):
        self.owner = owner
        self.start = start
        self.cut = cut
        self.calls: dict[_Region, list[_Call]] = {}
        self.features: dict[str, Feature] = {}
        self.cuts: list[Cut] = []
        self.order: dict[str, int] = {}
        self.count = 0
        self.eager = owner._known is None  # a compiled region would trace into the intercepted calls inside it
        self.copies: list[tuple[_Habit, list[Tensor], list[Tensor], list[int]]] = []

    def call(self, region: _Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if region.is_block:
            self._check_block_call(region)
        elif self.depth or len(self.order) == len(self.owner.blocks):
            return region.compute(args, kwargs, self.eager)
        output = self.compute(region, args, kwargs, self.eager)
        if self.depth or len(self.order) == len(self.owner.blocks):
            return output
        calls = self.calls.setdefault(region, [])
        key = (region.name, len(calls))
        if region.is_block:
            output = self._keep_feature(region, output)
            self.order[region.name] = self.count
        if region.name in self.cut or (self.cut and not region.is_block and self.owner.is_read(key)):
            output = self._cut(region, output)
        handed = output
        if self.owner.needs_copy(key):
            handed = _copy(handed)
            tensors = _tensors(handed)
            habit = self.owner._habits.setdefault(key, _Habit())
            self.copies.append((habit, _tensors(output), tensors, [tensor._version for tensor in tensors]))
        versions = [tensor._version for tensor in _tensors(output)]
        state = self.start.again()
        calls.append(_Call(key, self.count, output, versions, state))
        self.count += 1
        return handed

    def _check_block_call(self, region: _Region) -> None:
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

    def _keep_feature(self, region: _Region, output: Any) -> Any:
        """Note a chosen block's output; returns it with a gradient, should a frozen prefix have left it without."""
        leaves, spec = tree_flatten(output)
        floating = [index for index, leaf in enumerate(leaves) if _is_floating(leaf)]
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

    def _cut(self, region: _Region, output: Any) -> Any:
        leaves, spec = tree_flatten(output)
        cut = Cut(self.count, region.name if region.is_block else None, [], [])
        for index, leaf in enumerate(leaves):
            if _is_floating(leaf) and leaf.requires_grad:
                leaves[index] = leaf.detach().requires_grad_()
                cut.tensors.append(leaf)
                cut.leaves.append(leaves[index])
        self.cuts.append(cut)
        return tree_unflatten(leaves, spec)

    def note_mutations(self) -> None:
        written: set[int] = set()
        for habit, returned, handed, versions in reversed(self.copies):
            moved = any(tensor._version != version for tensor, version in zip(handed, versions, strict=True))
            if moved or not written.isdisjoint(_memory(handed)):
                habit.mutated = True
                # What a module was given and returned as it is (nn.Identity) would have been written to without copies.
                written |= _memory(returned)


class _ReplayPass(_Pass):
    def __init__(self, owner: Replay, recording: Recording, block: str, value: Any, detach: bool, watch: bool):
        self.owner = owner
        self.block = block
        self.value = value
        self.detach = detach
        last = recording.order[block]
        self.remembered = {
            region: [call for call in calls if call.order <= last] for region, calls in recording.calls.items()
        }
        self.regions = [region for region, calls in self.remembered.items() if calls]
        self.next_call = dict.fromkeys(self.regions, 0)
        self.reached = False
        self.watch = watch
        self.reads: AbstractContextManager[Any] = _Reads() if watch else nullcontext()
        self.handed: list[tuple[tuple[str, int], list[Tensor]]] = []

    def call(self, region: _Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self.next_call[region]
        if self.reached or self.depth or index == len(self.remembered[region]):
            return self.compute(region, args, kwargs, eager=self.watch)
        if inside_checkpoint():
            raise BlockError(
                f"block {self.block!r} cannot be replayed inside a checkpointed part of the model, whose recomputation "
                "would not see the perturbation; turn checkpointing off or choose another block"
            )
        call = self.remembered[region][index]
        self.next_call[region] += 1
        call.state.restore()
        if region.name == self.block:
            self.reached = True
            return _copy(self.value) if self.owner.needs_copy(call.key) else self.value
        return self._hand_out(call)

    def _hand_out(self, call: _Call) -> Any:
        if self.owner.needs_copy(call.key):
            output = _copy(call.output)
        else:
            output = call.output
            tensors = _tensors(output)
            if self.owner._habits[call.key].read and [t._version for t in tensors] != call.versions:
                raise RuntimeError(
                    f"the output of {call.key[0]!r} was modified in place after it was remembered, which it was not in "
                    "earlier steps; build a new AlfaWrapper after changing the model or its mode"
                )
        if self.detach:
            output = tree_map_only(Tensor, Tensor.detach, output)
        if self.watch:
            self.handed.append((call.key, _tensors(output)))
        return output

    def note_reads(self) -> None:
        assert isinstance(self.reads, _Reads)
        self.owner._habits[self.block, 0].read = True
        for key, tensors in self.handed:
            self.owner._habits[key].read |= any(id(tensor) in self.reads.seen for tensor in tensors)


class _Reads(TorchFunctionMode):
    """Remembers every tensor that an operation took while it was active."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


@contextmanager
def watch_outputs(model: nn.Module, report: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Report every submodule's name, itself and its output whenever one of them has finished."""
    regions = [_Region(name, module, is_block=False, on_path=False) for name, module in model.named_modules() if name]
    with _intercept(regions, _WatchPass(report)):
        yield


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Whatever the module returns is changed, in recordings and replays too. One that was compiled ignores it.

    Raises:
        BlockError: When the module runs in a checkpointed part, whose recomputation would not see the change.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if inside_checkpoint():
            raise BlockError("the block is in a checkpointed part of the model; turn checkpointing off")
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _intercept(regions: Iterable[_Region], pass_: _Pass) -> Iterator[None]:
    regions = list(regions)
    try:
        for region in regions:
            region.pass_ = pass_
            region.compiled = region.module.__dict__.get(_SLOT)
            region.module.__dict__[_SLOT] = region
        yield
    finally:
        for region in regions:
            if region.module.__dict__.get(_SLOT) is region:
                if region.compiled is None:
                    del region.module.__dict__[_SLOT]
                else:
                    region.module.__dict__[_SLOT] = region.compiled
            region.pass_ = region.compiled = None


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called (lists and dicts of modules cannot)."""
    return getattr(module.forward, "__name__", "") != "_forward_unimplemented"


def _candidates(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[_Region]:
    """The blocks, and every submodule that can be called and has no block inside, in order of definition."""
    chosen = {id(module): name for name, module in blocks.items()}
    hidden = {
        id(child)
        for module in model.modules()
        if isinstance(module, OptimizedModule)
        for child in module.modules()
        if child is not module
    }  # compiled code calls these, and would take an interception for a part of them
    for name, module in model.named_modules():
        if id(module) in hidden:
            continue
        on_path = any(id(child) in chosen for child in module.modules() if child is not module)
        if module is not model and (id(module) in chosen or (has_forward(module) and not on_path)):
            yield _Region(chosen.get(id(module), name), module, id(module) in chosen, on_path)


def _refuse_blocks_inside(model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Compiled code can neither end in the middle nor start there."""
    for name, module in model.named_modules():
        if not is_compiled(module):
            continue
        inside = {id(child) for child in module.modules() if child is not module}
        for block, chosen in blocks.items():
            if id(chosen) in inside:
                raise BlockError(
                    f"block {block!r} is inside {name or 'the model'!r}, which was compiled as one; pass the model as "
                    "it was before torch.compile, then call AlfaWrapper.compile()"
                )


def _contains(module: nn.Module, other: nn.Module) -> bool:
    return any(child is other for child in module.modules())


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _memory(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout == torch.strided}


def _copy(output: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, output)


def random_devices(model: nn.Module, args: tuple[Any, ...]) -> tuple[torch.device, ...]:
    """The accelerators that a forward may draw random numbers on."""
    devices = {tensor.device for tensor in (*_tensors(args), *model.parameters()) if tensor.device.type != "cpu"}
    return tuple(sorted(devices, key=str))
