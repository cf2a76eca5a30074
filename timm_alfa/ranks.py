"""What several processes have to agree on."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of all processes' values, alike on each; with a single process, the values themselves.

    A collective: where processes run in a group, every one of them has to call it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
