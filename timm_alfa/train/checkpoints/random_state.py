"""The random states of every process, so that a resumed run draws what the uninterrupted one would have drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...utils.distributed import in_group

__all__ = ["gather_random_states", "randomness_kept", "restore_random_state"]


def gather_random_states() -> list[dict[str, Any]] | None:
    """Collect the random states of all processes: torch, its accelerator, numpy and python.

    A collective: where processes run in a group, every one of them has to call it.

    Returns:
        One entry per rank, made of tensors, numbers, strings and lists only (``torch.load(weights_only=True)`` reads
        it), on rank 0; None on the others.
    """
    state = _capture()
    if not in_group():
        return [state]
    if dist.get_rank() != 0:
        dist.gather_object(state, dst=0)
        return None
    states: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(state, states, dst=0)
    return states


def restore_random_state(checkpoint: dict[str, Any], rank: int) -> bool:
    """Put the random generators of this process back to where ``checkpoint['random_states'][rank]`` has them.

    Returns:
        False, with nothing changed, where the run cannot go on as it would have: the checkpoint has no random states
        (timm's own have none), was written by another number of processes, or on another kind of device.
    """
    states = checkpoint.get("random_states")
    world_size = dist.get_world_size() if in_group() else 1
    if not states or len(states) != world_size:
        return False
    state = states[rank]
    if state["accelerator"] != _accelerator():
        return False
    _restore(state)
    return True


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Whatever is drawn inside, from whichever generator, the states afterwards are those of before."""
    state = _capture()
    try:
        yield
    finally:
        _restore(state)


def _restore(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["accelerator"]:
        torch.get_device_module(state["accelerator"]).set_rng_state(state["accelerator_state"])
    numpy_state = state["numpy"]
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy_state["pos"], numpy_state["has_gauss"], numpy_state["cached_gaussian"]))
    version, keys, gauss_next = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss_next))


def _capture() -> dict[str, Any]:
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    version, python_keys, gauss_next = random.getstate()
    accelerator = _accelerator()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "accelerator": accelerator,
        "numpy": {
            "keys": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "cached_gaussian": float(numpy_state["gauss"]),
        },
        "python": [version, torch.tensor(python_keys, dtype=torch.int64), gauss_next],
    }
    if accelerator:
        state["accelerator_state"] = torch.get_device_module(accelerator).get_rng_state()
    return state


def _accelerator() -> str:
    """Device type of the accelerator in use, '' for none: one that nothing was placed on must not be woken for this."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return ""
    is_initialized = getattr(torch.get_device_module(device), "is_initialized", None)
    return device.type if is_initialized is None or is_initialized() else ""
