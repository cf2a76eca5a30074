"""Intercept calls of submodules while a pass runs: the only file that touches how a module is called.

It uses the slot that ``nn.Module.compile`` uses, filled for the duration of one pass and emptied in ``finally``:
nothing stays on the model between passes, copies and pickles never see it, and regions that were compiled one by one
keep their compiled call. It is the only place that writes into a module's ``__dict__``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn
from torch._dynamo import OptimizedModule

from ..errors import BlockError
from .grad_checkpointing import inside_checkpoint

_SLOT = "_compiled_call_impl"  # read by nn.Module.__call__ before anything else, left out of copies and pickles


class Region:
    """A module whose calls are intercepted while a pass runs; a handler decides what a call does."""

    def __init__(self, name: str, module: nn.Module, is_block: bool, contains_block: bool):
        self.name = name
        self.module = module
        self.is_block = is_block
        self.contains_block = contains_block  # another block: it must run for that one to be reached
        self.compiled: Any = None  # what the slot held before the pass

    def compute(self, args: tuple[Any, ...], kwargs: dict[str, Any], eager: bool = False) -> Any:
        """What the module itself returns, hooks included; compiled if it was, unless ``eager``."""
        if self.compiled is None or eager:
            return self.module._call_impl(*args, **kwargs)
        return self.compiled(*args, **kwargs)


Handler: TypeAlias = Callable[..., Any]  # called in place of a module, with the call's arguments


class Interception:
    """While it is on, calls of some regions go to handlers. Off and on again in the middle of a pass, if need be.

    Args:
        handlers: Region -> handler.
    """

    def __init__(self, handlers: Mapping[Region, Handler]):
        self._handlers = handlers

    def start(self) -> None:
        """From now on."""
        for region, handler in self._handlers.items():
            slots = region.module.__dict__
            region.compiled = slots.get(_SLOT)
            slots[_SLOT] = handler

    def stop(self) -> None:
        """No longer; may be called again."""
        for region, handler in self._handlers.items():
            slots = region.module.__dict__
            if slots.get(_SLOT) is handler:
                if region.compiled is None:
                    del slots[_SLOT]
                else:
                    slots[_SLOT] = region.compiled
                region.compiled = None


def find_regions(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[Region]:
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
        contains_block = any(id(child) in chosen for child in module.modules() if child is not module)
        if module is not model and (id(module) in chosen or (has_forward(module) and not contains_block)):
            yield Region(chosen.get(id(module), name), module, id(module) in chosen, contains_block)


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called (lists and dicts of modules cannot)."""
    return getattr(module.forward, "__name__", "") != "_forward_unimplemented"


@contextmanager
def watch_outputs(model: nn.Module, report: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Report every submodule's name, itself and its output whenever one of them has finished; nothing runs compiled."""

    def watching(region: Region) -> Handler:
        def handler(*args: Any, **kwargs: Any) -> Any:
            output = region.compute(args, kwargs, eager=True)
            report(region.name, region.module, output)
            return output

        return handler

    regions = [
        Region(name, module, is_block=False, contains_block=False) for name, module in model.named_modules() if name
    ]
    interception = Interception({region: watching(region) for region in regions})
    try:
        interception.start()
        yield
    finally:
        interception.stop()


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
