"""What several processes have to agree on."""

from __future__ import annotations

import time

import torch.distributed as dist
from torch import Tensor


def in_group() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of all processes' values, alike on each; with a single process, the values themselves.

    A collective: where processes run in a group, every one of them has to call it.
    """
    if not in_group():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def leave_group() -> None:
    """End this process's part in the group, if it has one; after a failure of another process too."""
    if in_group():
        # Up to torch 2.7, the group's destructor holds Python's lock while it joins gloo's threads, and the thread of
        # the last collective may still wait for that lock to let go of its tensors (pytorch/pytorch#154976): without
        # a pause, leaving right after a collective can hang forever.
        time.sleep(0.1)
        dist.destroy_process_group()
