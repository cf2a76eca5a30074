from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch.distributed as dist

from timm_alfa.utils.distributed import leave_group


def _gather_and_leave(rank: int, folder: str) -> None:
    for turn in range(10):
        dist.init_process_group("gloo", init_method=f"file://{folder}/{turn}", rank=rank, world_size=2)
        dist.gather_object(rank, [None, None] if rank == 0 else None, dst=0)
        leave_group()


@pytest.mark.timeout(120)
def test_leaving_right_after_a_collective_does_not_hang(tmp_path: Path):
    processes.call_ranks(_gather_and_leave, (str(tmp_path),), count=2)


def test_without_a_group_there_is_nothing_to_leave():
    leave_group()
    assert not dist.is_initialized()
