"""Random states that torch's seed does not govern: Python's, numpy's, and generators that modules own."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
        model: Generators are looked for in the attributes of its modules, in lists, tuples and dicts too.
    """
    found = [Source("Python's random", random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append(Source("numpy.random", numpy.random.get_state, numpy.random.set_state))
    seen: set[int] = set()
    for name, value in _attributes(model):
        source = None if id(value) in seen else _source(name, value)
        if source is not None:
            seen.add(id(value))
            found.append(source)
    return tuple(found)


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
        if before and isinstance(before[0], int):  # Python's 625 numbers
            return bool(before != after)
        return any(moved(one, other) for one, other in zip(before, after, strict=True))
    different = before != after
    return bool(different.any() if hasattr(different, "any") else different)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules"):
                continue
            leaves = tree_leaves(value) if isinstance(value, (list, tuple, dict)) else [value]
            for leaf in leaves:
                yield ".".join(filter(None, (path, attribute))), leaf


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
