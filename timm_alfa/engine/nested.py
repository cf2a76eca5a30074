"""Nested outputs: whatever modules return and take, as leaves.

Most are one tensor, or a few in a tuple; these are not handed to torch's general functions, which cost a step more than
some layers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten


def is_floating(leaf: Any) -> TypeGuard[Tensor]:
    """Whether a leaf is a floating-point tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors among the leaves."""
    if isinstance(output, Tensor):
        return [output]
    if type(output) in (tuple, list):
        for item in output:
            if not isinstance(item, Tensor):
                break
        else:
            return list(output)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """The same structure with the function's results in place of the tensors."""
    if isinstance(output, Tensor):
        return function(output)
    return tree_map_only(Tensor, function, output)


def change_floating(function: Callable[[list[Tensor]], Sequence[Tensor]], output: Any) -> Any:
    """The same structure with other floating-point tensors.

    Args:
        function: All floating-point tensors of the output -> as many others.
        output: What a module returned.
    """
    leaves, spec = tree_flatten(output)
    changed = iter(function([leaf for leaf in leaves if is_floating(leaf)]))
    return tree_unflatten([next(changed) if is_floating(leaf) else leaf for leaf in leaves], spec)


def memory_of(tensors: Iterable[Tensor]) -> set[int]:
    """Where the tensors keep their values; views of one tensor share it."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout == torch.strided}


def copied(output: Any) -> Any:
    """The same structure with every tensor cloned."""
    return map_tensors(Tensor.clone, output)


def detached(output: Any) -> Any:
    """The same structure with every tensor detached."""
    return map_tensors(Tensor.detach, output)
