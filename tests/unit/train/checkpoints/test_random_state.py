from __future__ import annotations

import multiprocessing
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from timm_alfa.train.checkpoints import random_state
from timm_alfa.train.checkpoints.random_state import gather_random_states, restore_random_state
from timm_alfa.utils.distributed import leave_group


def draw(device="cpu"):
    """Draws from every generator; the odd Gaussian counts leave one stored in numpy's and python's."""
    on_device = torch.randn(3, device=device).tolist()
    return [
        on_device,
        torch.randn(3).tolist(),
        np.random.randn(3).tolist(),
        random.gauss(0, 1),
        random.random(),
        np.random.rand(),
    ]


def test_draws_repeat_after_a_round_trip_through_a_file(tmp_path, device: torch.device):
    draw(device)
    torch.save({"random_states": gather_random_states()}, tmp_path / "file")
    expected = draw(device)
    checkpoint = torch.load(tmp_path / "file", weights_only=True)
    assert restore_random_state(checkpoint, 0) is True
    assert draw(device) == expected


def test_nothing_is_restored_from_another_kind_of_run(monkeypatch):
    states = gather_random_states()
    for checkpoint in ({}, {"random_states": None}, {"random_states": states * 2}):
        before = torch.get_rng_state()
        torch.rand(1)
        changed = torch.get_rng_state()
        assert restore_random_state(checkpoint, 0) is False
        assert torch.equal(torch.get_rng_state(), changed)
        assert not torch.equal(changed, before)
    monkeypatch.setattr(random_state, "_accelerator", lambda: "cuda")
    assert restore_random_state({"random_states": states}, 0) is False


class FakeAccelerator:
    def __init__(self):
        self.state = torch.arange(4, dtype=torch.uint8)

    def get_rng_state(self):
        return self.state.clone()

    def set_rng_state(self, state):
        self.state = state


def test_accelerator_state_is_kept(monkeypatch):
    fake = FakeAccelerator()
    monkeypatch.setattr(random_state, "_accelerator", lambda: "cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda name: fake)
    states = gather_random_states()
    fake.state = torch.zeros(4, dtype=torch.uint8)
    assert restore_random_state({"random_states": states}, 0) is True
    assert fake.state.tolist() == [0, 1, 2, 3]


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=100)
    )
    try:
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(rank)
        states = gather_random_states()
        assert (states is None) == (rank == 1)
        expected = draw()
        if rank == 0:
            torch.save({"random_states": states}, f"{folder}/file")
        dist.barrier()
        checkpoint = torch.load(f"{folder}/file", weights_only=True)
        assert restore_random_state(checkpoint, rank)
        assert draw() == expected
        assert not restore_random_state({"random_states": checkpoint["random_states"][:1]}, rank)
    finally:
        leave_group()


def test_every_rank_gets_its_own_state_back(tmp_path):
    other = multiprocessing.get_context("spawn").Process(target=run_rank, args=(1, str(tmp_path)))
    other.start()
    run_rank(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
