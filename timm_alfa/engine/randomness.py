"""The random state, captured and restored: an adversarial pass sees the dropout masks of the clean one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .inventory import Inventory
from .nested import tensors_of
from .random_sources import Source


@dataclass(frozen=True)
class RandomState:
    """torch's random state on the CPU and on some accelerators, and those of other sources, at one moment."""

    devices: tuple[torch.device, ...]
    states: tuple[Tensor, ...]
    sources: tuple[Source, ...] = ()
    others: tuple[Any, ...] = ()

    @classmethod
    def capture(cls, devices: Sequence[torch.device] = (), sources: Sequence[Source] = ()) -> RandomState:
        """The state now, of the CPU, of ``devices`` (accelerators, none of them the CPU) and of ``sources``."""
        states = (torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices))
        return cls(tuple(devices), states, tuple(sources), tuple(source.get() for source in sources))

    def again(self) -> RandomState:
        """The state now, of what this one is of."""
        return RandomState.capture(self.devices, self.sources)

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.states[0])
        for device, state in zip(self.devices, self.states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        for source, other in zip(self.sources, self.others, strict=True):
            source.set(other)

    @contextmanager
    def left_as_is(self) -> Iterator[None]:
        """Whatever is drawn inside, the state afterwards is this one."""
        try:
            yield
        finally:
            self.restore()


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
    devices = {tensor.device for tensor in tensors_of(args) if tensor.device.type != "cpu"}
    return tuple(sorted(devices.union(inventory.accelerators()), key=str))
