"""torch's random state, captured and restored: an adversarial pass sees the dropout masks of the clean one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The CPU's random state and those of some accelerators, at one moment."""

    devices: tuple[torch.device, ...]
    states: tuple[Tensor, ...]

    @classmethod
    def capture(cls, devices: Sequence[torch.device] = ()) -> RandomState:
        """The state now, of the CPU and of ``devices`` (accelerators, none of them the CPU)."""
        states = (torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices))
        return cls(tuple(devices), states)

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self.states[0])
        for device, state in zip(self.devices, self.states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    @contextmanager
    def left_as_is(self) -> Iterator[None]:
        """Whatever is drawn inside, the state afterwards is this one."""
        try:
            yield
        finally:
            self.restore()
