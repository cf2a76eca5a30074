"""Nested outputs: whatever modules return and take, as leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def is_floating(leaf: Any) -> TypeGuard[Tensor]:
    """Whether a leaf is a floating-point tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors among the leaves."""
    if isinstance(output, Tensor):
        return [output]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def memory_of(tensors: Iterable[Tensor]) -> set[int]:
    """Where the tensors keep their values; views of one tensor share it."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout == torch.strided}


def copied(output: Any) -> Any:
    """The same structure with every tensor cloned."""
    if isinstance(output, Tensor):
        return output.clone()
    return tree_map_only(Tensor, Tensor.clone, output)
