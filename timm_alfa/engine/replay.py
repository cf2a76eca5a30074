"""Run a model once, then run it again from a block: the tail replay.

During the clean pass every *region* keeps its output. A region is a submodule without a chosen block inside that is
called from outside of any other such submodule, or a chosen block itself; what lies above the regions (the modules on
the *path* to a block, with their functional glue) is orchestration. In a replay the regions that had finished before
block ``i`` return what they returned in the clean pass without computing, block ``i`` returns the given value, and
everything after it, the tail, computes. Position embeddings, flattening, concatenations and skip connections around the
block therefore need no special case.

The first clean pass intercepts every submodule to find the regions, and copies what they hand on; the first replays
show which outputs are read, and so which of those that are later written to in place have to be copied from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import BlockError
from .compiler import allow_second_walks, is_compiled, refuse_cuda_graphs
from .grad_checkpointing import inside_checkpoint, last_of_sequence, without_checkpointing
from .interception import Pass, Region, find_regions, intercept
from .inventory import Inventory
from .nested import copied, tensors_of
from .random_sources import Source, moved, random_sources
from .randomness import RandomState, random_devices
from .recording import Call, OutputUses, Recording, RecordPass

_logger = logging.getLogger(__name__)


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
        self._candidates = list(find_regions(model, self.blocks))
        self._known: list[Region] | None = None  # the regions, once a clean pass has shown them
        self._optional: set[Region] = set()  # regions that some passes do without (layers dropped at random)
        self._uses = OutputUses(self.blocks)
        self.inventory = Inventory(model)
        self._draws = True  # the model, random numbers, as far as is known: until a first pass without any
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
        self.inventory.refresh()
        given = (args, dict(kwargs or {}))
        kept = given if self._writes_input is False else copied(given)
        versions = [tensor._version for tensor in tensors_of(given)]
        first = self._sources is None
        if self._sources is None:
            self._sources = self._drawn_from = random_sources(self.model)
        untouched = [source for source in self._sources if source not in self._drawn_from]
        states = [source.get() for source in untouched]
        start = RandomState.capture(random_devices(self.inventory, args), self._drawn_from)
        pass_ = RecordPass(self.blocks, self._uses, start, cut, draws=self._draws, eager=self._known is None)
        with intercept(self._candidates if self._known is None else self._known, pass_):
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
        drew = moved(start.states, end.states) or moved(start.others, end.others)
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
        elif drew and not self._draws:
            _logger.warning(
                "the model draws random numbers, which it did not in earlier steps: should it draw outside of its "
                "submodules, the adversarial pass of this one step draws other numbers there; later ones repeat them"
            )
        self._draws = drew or bool(late) or (self._draws and not first)
        args_again, kwargs_again = kept if self._writes_input else given
        return Recording(
            output,
            {name: pass_.features[name] for name in self.blocks},
            pass_.cuts,
            start,
            end,
            args_again,
            kwargs_again,
            pass_.draws,
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
        watch = block in self._uses.unwatched
        pass_ = ReplayPass(self._uses, recording, block, value, detach, watch)
        recording.start.restore()
        stance = torch.compiler.set_stance("force_eager") if watch else nullcontext()  # operations are watched
        with intercept(pass_.regions, pass_), without_checkpointing(self.inventory), stance, pass_.reads:
            args, kwargs = (recording.args, recording.kwargs)
            if self._writes_input:
                args, kwargs = copied((args, kwargs))
            output = self.model(*args, **kwargs)
        if not pass_.reached:
            raise BlockError(f"block {block!r} ran in the clean pass but not in its replay")
        if watch:
            pass_.note_reads()
            self._uses.unwatched.discard(block)
        return output

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
        written = [tensor._version for tensor in tensors_of(given)] != versions
        if written and self._writes_input is False:
            raise RuntimeError(
                "the model wrote into its input in place, which it did not in the first step; build a new AlfaWrapper "
                "after changing the model or its mode"
            )
        self._writes_input = written or bool(self._writes_input)

    def _note_regions(self, called: set[Region]) -> None:
        if self._known is None:
            self._known = [region for region in self._candidates if region in called or region in self._optional]
            return
        missing = [region for region in self._known if region not in called and region not in self._optional]
        if missing:  # another way through the model: look again, at all of it, in the next pass
            self._optional.update(self._known)
            self._known = None
            self._uses.unwatched = set(self.blocks)


class ReplayPass(Pass):
    """Returns what was recorded up to a block, a given value there, and computes its tail."""

    def __init__(self, uses: OutputUses, recording: Recording, block: str, value: Any, detach: bool, watch: bool):
        self.uses = uses
        self.block = block
        self.value = value
        self.detach = detach
        self.draws = recording.draws
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

    def call(self, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what was recorded, or compute."""
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
        if self.draws or region.name == self.block:
            call.state.restore()
        if region.name == self.block:
            self.reached = True
            return copied(self.value) if self.uses.needs_copy(call.key) else self.value
        return self._hand_out(call)

    def _hand_out(self, call: Call) -> Any:
        if self.uses.needs_copy(call.key):
            output = copied(call.output)
        else:
            output = call.output
            tensors = tensors_of(output)
            if self.uses.of(call.key).read and [t._version for t in tensors] != call.versions:
                raise RuntimeError(
                    f"the output of {call.key[0]!r} was modified in place after it was remembered, which it was not in "
                    "earlier steps; build a new AlfaWrapper after changing the model or its mode"
                )
        if self.detach:
            output = tree_map_only(Tensor, Tensor.detach, output)
        if self.watch:
            self.handed.append((call.key, tensors_of(output)))
        return output

    def note_reads(self) -> None:
        """After the pass: which outputs an operation took."""
        assert isinstance(self.reads, _Reads)
        self.uses.of((self.block, 0)).read = True
        for key, tensors in self.handed:
            self.uses.of(key).read |= any(id(tensor) in self.reads.seen for tensor in tensors)


class _Reads(TorchFunctionMode):
    """Remembers every tensor that an operation took while it was active."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


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
