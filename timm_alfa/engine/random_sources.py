"""Random states that torch's seed does not govern: Python's, numpy's, and generators that a model draws from.

Such a generator is an attribute of a module, or is held by a function that a module calls: in its closure, or as a
global of its file. What cannot be found this way (a generator inside an object that is none of these) is not replayed.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Source:
    """A random state that can be read and put back.

    Args:
        name: For messages.
        get: A copy of the state now.
        set: Puts a copy back.
    """

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], Any]


def random_sources(model: nn.Module) -> tuple[Source, ...]:
    """Every source that the model's forward may draw from, besides torch's own.

    Args:
        model: Generators are looked for in the attributes of its modules, in lists, tuples and dicts too, and in the
            functions that are attributes or methods of them.
    """
    found = [Source("Python's random", random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append(Source("numpy.random", _numpy_state, _set_numpy_state))
    seen: set[int] = set()
    for name, value in _attributes(model):
        source = None if id(value) in seen else _source(name, value)
        if source is not None:
            seen.add(id(value))
            found.append(source)
    return tuple(found)


def _numpy_state() -> tuple[Any, ...]:
    """As plain values, which every step compares at once."""
    name, keys, *others = sys.modules["numpy"].random.get_state()
    return (0, name, keys.tobytes(), *others)


def _set_numpy_state(state: tuple[Any, ...]) -> None:
    numpy = sys.modules["numpy"]
    _, name, keys, *others = state
    numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *others))


def moved(before: Any, after: Any) -> bool:
    """Whether two states differ.

    Args:
        before: What ``get`` returned.
        after: What it returned later.
    """
    if isinstance(before, Tensor):
        return not torch.equal(before, after)
    if isinstance(before, dict):
        return any(moved(value, after[key]) for key, value in before.items())
    if isinstance(before, (tuple, list)):
        if before and isinstance(before[0], int):  # Python's and numpy's: plain values
            return bool(before != after)
        return any(moved(one, other) for one, other in zip(before, after, strict=True) if one is not other)
    different = before != after
    return bool(different.any() if hasattr(different, "any") else different)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Whatever the modules and their functions hold, with a name."""
    functions: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                name = ".".join(filter(None, (path, attribute)))
                for leaf in _leaves(value):
                    functions.setdefault(id(leaf), (name, leaf))
                    yield name, leaf
        for kind in type(module).__mro__:
            if not _is_well_known(kind.__module__):
                for attribute, value in vars(kind).items():
                    functions.setdefault(id(value), (f"{kind.__name__}.{attribute}", value))
                    yield from ((f"{kind.__name__}.{attribute}", leaf) for leaf in _leaves(value))
    queue = list(functions.values())
    while queue:
        name, value = queue.pop()
        for held_as, held in _held_by(value):
            for leaf in _leaves(held):
                if id(leaf) not in functions:
                    functions[id(leaf)] = (held_as, leaf)
                    queue.append((held_as, leaf))
                    yield held_as, leaf


def _leaves(value: Any) -> list[Any]:
    return tree_leaves(value) if isinstance(value, (list, tuple, dict)) else [value]


def _held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """What a function's closure holds, and those globals that it names; functions of well-known libraries hold none."""
    if isinstance(value, functools.partial):
        yield from (("an argument", held) for held in (value.func, *value.args, *value.keywords.values()))
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if not isinstance(value, FunctionType) or _is_well_known(value.__module__ or ""):
        return
    names = value.__code__.co_freevars
    for name, cell in zip(names, value.__closure__ or (), strict=True):
        try:
            yield f"{name} of {value.__qualname__}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in _names(value.__code__):
        if name in value.__globals__:
            yield f"{name} of {value.__module__}", value.__globals__[name]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function inside
            yield from _names(constant)


def _is_well_known(module: str) -> bool:
    """Whether forwards of this library draw from torch's own states alone."""
    return module.partition(".")[0] in ("torch", "torchvision", "timm", "timm_alfa", "numpy", "random", "builtins")


def _source(name: str, value: Any) -> Source | None:
    if isinstance(value, torch.Generator):
        return Source(name, lambda: value.get_state().clone(), value.set_state)
    if isinstance(value, random.Random):
        return Source(name, value.getstate, value.setstate)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return Source(name, lambda: bits.state, lambda state: setattr(bits, "state", state))
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return Source(name, value.get_state, value.set_state)
    return None
