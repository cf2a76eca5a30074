"""Modules and parameters of a model, listed once: a step looks for them in lists, not by walking the module tree."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn

_children, _parameters = attrgetter("_modules"), attrgetter("_parameters")
_requires_grad, _device = attrgetter("requires_grad"), attrgetter("device")


class Inventory:
    """What a step needs to know of a model besides its forward.

    :meth:`refresh` notices modules and parameters that were added, removed or replaced; whether they train, and where
    they are, is read anew whenever it is asked for. Everything runs in C, without a Python call per module.

    Args:
        model: Any module.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._list()

    def refresh(self) -> None:
        """Before a step: list again if the structure has changed."""
        if not (
            _same(self._children, chain.from_iterable(map(dict.values, map(_children, self.modules))))
            and _same(self._entries, chain.from_iterable(map(dict.values, map(_parameters, self.modules))))
        ):
            self._list()

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that require a gradient, each once."""
        return list(compress(self.parameters, map(_requires_grad, self.parameters)))

    def accelerators(self) -> tuple[torch.device, ...]:
        """Devices of the parameters, without the CPU."""
        devices = set(map(_device, self.parameters))
        return tuple(sorted((device for device in devices if device.type != "cpu"), key=str))

    def checkpointing(self) -> list[nn.Module]:
        """Modules whose gradient checkpointing is on."""
        return [module for module in self._switches if module.__dict__.get("grad_checkpointing")]

    def _list(self) -> None:
        self.modules = list(self.model.modules())
        self.parameters = list(self.model.parameters())
        self._children = list(chain.from_iterable(map(dict.values, map(_children, self.modules))))
        self._entries: list[Any] = list(chain.from_iterable(map(dict.values, map(_parameters, self.modules))))
        self._switches = [module for module in self.modules if hasattr(module, "grad_checkpointing")]


def _same(old: list[Any], new: Iterable[Any]) -> bool:
    """Whether both hold the same objects in the same order."""
    found = list(new)
    return len(found) == len(old) and all(map(is_, found, old))
