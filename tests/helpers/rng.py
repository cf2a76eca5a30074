"""torch's random states: a model on an accelerator draws its dropout masks there, and some draws stay on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def rng_state(device: torch.device) -> Tensor:
    """The state of the CPU and, if it is another, of ``device``: bytes, to compare or to put back."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return torch.cat(states)


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Put back what :func:`rng_state` returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size])
    if device.type != "cpu":
        own = state[size:].clone()  # torch 2.14 reads a view's bytes from twice its offset
        torch.get_device_module(device).set_rng_state(own, device)
