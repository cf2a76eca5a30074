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
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import BlockError
from .compiler import allow_second_walks, is_compiled, refuse_cuda_graphs
from .grad_checkpointing import last_of_sequence
from .interception import Region, find_regions
from .inventory import Inventory
from .nested import copied, tensors_of
from .random_sources import Source, moved, random_sources
from .randomness import NoRandomState, RandomState, random_devices
from .recording import Call, OutputUses, Recording, RecordPass
from .tail import NOTHING, Change, Reads, Tail

_logger = logging.getLogger(__name__)


class Replay:
    """Records a clean pass of a model and replays the tails of chosen blocks.

    Args:
        model: Any module; not itself compiled (what it consists of may be).
        blocks: Name -> submodule. Each must run exactly once per forward.
        joint: Whether only the first of them, in order of execution, is replayed from.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], *, joint: bool = False):
        self.model = model
        _refuse_blocks_inside(model, blocks)
        self._given = dict(blocks)
        self.blocks = {name: last_of_sequence(model, block) for name, block in blocks.items()}
        self._candidates = list(find_regions(model, self.blocks))
        self._of_block = {region.name: region for region in self._candidates if region.is_block}
        self._known: list[Region] | None = None  # the regions, once a clean pass has shown them
        self._optional: set[Region] = set()  # regions that some passes do without (layers dropped at random)
        self._uses = OutputUses(self.blocks, joint=joint)
        self._counts: dict[Region, int] = {}  # how often each region ran
        self.inventory = Inventory(model)
        self.frozen = False  # random states are left alone, as nothing is drawn
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
        kwargs = dict(kwargs or {})
        inputs = tensors_of(args) + (tensors_of(kwargs) if kwargs else [])
        kept = (args, kwargs) if self._writes_input is False else copied((args, kwargs))
        versions = [tensor._version for tensor in inputs]
        first = self._sources is None
        if self._sources is None:
            self._sources = self._drawn_from = random_sources(self.model)
        untouched = [] if self.frozen else [source for source in self._sources if source not in self._drawn_from]
        states = [source.get() for source in untouched]
        if self.frozen:
            start: RandomState = NoRandomState()
        else:
            start = RandomState(random_devices(self.inventory, args), self._drawn_from)
        regions = self._candidates if self._known is None else self._known
        pass_ = RecordPass(regions, self.blocks, self._uses, start, cut, draws=self._draws, first=self._known is None)
        try:
            pass_.interception.start()
            output = self.model(*args, **kwargs)
        finally:
            pass_.interception.stop()
            del pass_.interception  # a cycle, which would keep the clean graph until the next garbage collection
        if len(pass_.order) != len(self.blocks):
            self._refuse(next(name for name in self.blocks if name not in pass_.order))
        self._note_input(inputs, versions)
        pass_.note_mutations()
        self._note_regions(pass_.calls)
        end = start.again()
        drew = start.differs(end)
        if first:
            moving = zip(start.sources, start.others, end.others, strict=True)
            self._drawn_from = tuple(source for source, before, after in moving if moved(before, after))
        late = [source for source, state in zip(untouched, states, strict=True) if moved(state, source.get())]
        if late:
            self._drawn_from += tuple(late)
            end = RandomState(start.devices, self._drawn_from)
            _logger.warning(
                f"the model draws from {', '.join(source.name for source in late)}, which it did not in its first "
                "step: the adversarial pass of this one step draws other numbers, later ones repeat them"
            )
        elif drew and not self._draws:
            _logger.warning(
                "the model draws random numbers, which it did not in earlier steps: should it draw outside of its "
                "submodules, the adversarial pass of this one step draws other numbers there; later ones repeat them"
            )
        if late or (drew and not self._draws):
            self._uses.watch_again()
        self._draws = drew or bool(late) or (self._draws and not first)
        args_again, kwargs_again = kept if self._writes_input else (args, kwargs)
        return Recording(
            output,
            {name: pass_.features[name] for name in self.blocks},
            pass_.cuts,
            start,
            end,
            args_again,
            kwargs_again,
            drew,
            pass_.whole and (pass_.draws or not drew),
            pass_.calls,
            pass_.order,
        )

    def replay(
        self,
        recording: Recording,
        block: str,
        value: Any,
        *,
        detach: bool = False,
        later: Mapping[str, Change] = NOTHING,
    ) -> Any:
        """The model's output when ``block`` returns ``value``: only its tail computes.

        The random state runs through the same values as in the clean pass and is left where the tail leaves it.

        Args:
            recording: What :meth:`record` returned.
            block: Name of the block.
            value: In the structure of the block's output.
            detach: Cut the remembered outputs of earlier regions (skip connections around the block) from the graph.
            later: Blocks that run in the tail -> what becomes of their outputs.
        """
        tail = recording.tails.get(block)
        if tail is None:
            tail = recording.tails[block] = Tail(self, recording, block)
        changes = {self._of_block[name]: change for name, change in later.items()} if later else NOTHING
        if block in self._uses.watched:
            return tail.run(value, detach, changes)
        reads = Reads()
        with torch.compiler.set_stance("force_eager"), reads:  # operations are watched
            output = tail.run(value, detach, changes, watch=True)
        tail.note_reads(reads)
        if recording.whole:
            self._uses.note_watched(block)
        else:
            self._uses.watch_again()
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

    def note_draws(self) -> None:
        """Random numbers were drawn in a replay where none were in watched ones."""
        _logger.warning(
            "the model draws random numbers between its submodules, which it did not in earlier steps: the "
            "adversarial pass of this one step draws other numbers there, later ones repeat them"
        )
        self._uses.watch_again()

    @property
    def uses(self) -> OutputUses:
        """What earlier passes showed about outputs."""
        return self._uses

    @property
    def writes_input(self) -> bool:
        """Whether the model writes into what it is given."""
        return bool(self._writes_input)

    def _refuse(self, missing: str) -> NoReturn:
        if dict(self.model.named_modules()).get(missing) is not self._given[missing]:
            raise BlockError(
                f"block {missing!r} was replaced after AlfaWrapper was built; build AlfaWrapper afterwards, and to "
                "compile call its compile()"
            )
        raise BlockError(f"block {missing!r} did not run in the model's forward; choose one that does")

    def _note_input(self, inputs: list[Tensor], versions: list[int]) -> None:
        """A model that writes into its input (normalises it in place) leaves nothing to run it again on but a copy."""
        written = [tensor._version for tensor in inputs] != versions
        if written and self._writes_input is False:
            raise RuntimeError(
                "the model wrote into its input in place, which it did not in the first step; build a new AlfaWrapper "
                "after changing the model or its mode"
            )
        self._writes_input = written or bool(self._writes_input)

    def note_stale(self, region: str) -> None:
        """An output was written into after it was remembered, and is read in a replay: it was not known to be."""
        _logger.warning(
            f"the output of {region!r} was written into, which it was not in earlier steps: the adversarial pass of "
            "this one step starts from what was written, later ones from the output"
        )

    def _note_regions(self, calls: Mapping[Region, list[Call]]) -> None:
        counts = {region: len(of_region) for region, of_region in calls.items()}
        if counts != self._counts:
            if any(self._counts.get(region, count) != count for region, count in counts.items()):
                self._uses.varies = True
                self._uses.watch_again()
            self._counts = {**self._counts, **counts}
        if self._known is None:
            self._known = [region for region in self._candidates if region in calls or region in self._optional]
            return
        missing = [region for region in self._known if region not in calls and region not in self._optional]
        if missing:  # another way through the model: look again, at all of it, in the next pass
            self._optional.update(self._known)
            self._known = None
            self._uses.watch_again()


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
