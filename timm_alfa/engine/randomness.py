"""The random state, captured and restored: an adversarial pass sees the dropout masks of the clean one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .inventory import Inventory
from .nested import tensors_of
from .random_sources import Source, moved


class RandomState:
    """torch's random state on the CPU and on some accelerators, and those of other sources, at one moment: now.

    Args:
        devices: Accelerators, none of them the CPU.
        sources: What else may be drawn from.
    """

    def __init__(self, devices: Sequence[torch.device] = (), sources: Sequence[Source] = ()):
        self.devices = tuple(devices)
        self.sources = tuple(sources)
        self._generators: list[Any] = [torch.default_generator]
        for device in self.devices:
            self._generators.append(_generator(device))
        # Loops: a step captures often, and before Python 3.12 a comprehension is a call.
        self.states: list[Tensor] = []
        for generator in self._generators:
            self.states.append(generator.get_state())
        self.others: list[Any] = []
        for source in self.sources:
            self.others.append(source.get())

    def again(self) -> RandomState:
        """The state now, of what this one is of."""
        return RandomState(self.devices, self.sources)

    def restore(self) -> None:
        """Go back to it."""
        for generator, state in zip(self._generators, self.states, strict=True):
            generator.set_state(state)
        for source, other in zip(self.sources, self.others, strict=True):
            source.set(other)

    def differs(self, other: RandomState) -> bool:
        """Whether something was drawn between this moment and another.

        Args:
            other: Of the same devices and sources.
        """
        for one, two in zip(self.states, other.states, strict=True):
            if not torch.equal(one, two):
                return True
        return bool(self.others) and moved(self.others, other.others)

    @contextmanager
    def left_as_is(self) -> Iterator[None]:
        """Whatever is drawn inside, the state afterwards is this one."""
        try:
            yield
        finally:
            self.restore()


class NoRandomState(RandomState):
    """In place of states that nothing is drawn from, and that must not be read: while a CUDA graph is captured."""

    def __init__(self) -> None:
        self.devices, self.sources, self._generators = (), (), []
        self.states, self.others = [], []

    def again(self) -> RandomState:
        """This one."""
        return self


class _StateOf:
    """The random state of a kind of accelerator that shows no generators."""

    def __init__(self, device: torch.device):
        self._module, self._device = torch.get_device_module(device), device

    def get_state(self) -> Tensor:
        state: Tensor = self._module.get_rng_state(self._device)
        return state

    def set_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state, self._device)


def _generator(device: torch.device) -> Any:
    """What a forward on an accelerator draws from; its methods cost a fraction of what torch's functions do."""
    generators = getattr(torch.get_device_module(device), "default_generators", None)
    return generators[device.index] if generators and device.index is not None else _StateOf(device)


def step_generator(step: int, device: torch.device | str = "cpu", *, stream: int = 0) -> torch.Generator:
    """For what a step draws besides the model's own draws: anew in each step, the global state stays as it is.

    Args:
        step: Training step.
        device: Of the generator.
        stream: Tells several draws of one step apart.
    """
    generator = torch.Generator(device)
    generator.manual_seed((torch.initial_seed() + 1_000_003 * step + 7_919 * stream) % 2**63)
    return generator


def random_devices(model: nn.Module | Inventory, args: tuple[Any, ...]) -> tuple[torch.device, ...]:
    """The accelerators that a forward may draw random numbers on."""
    inventory = model if isinstance(model, Inventory) else Inventory(model)
    devices = set(inventory.accelerators())
    for tensor in tensors_of(args):
        if tensor.device.type != "cpu":
            devices.add(tensor.device)
    return tuple(sorted(devices, key=str))
