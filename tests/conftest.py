"""What every test shares: a fixed seed, and property tests without a clock and with fixed examples."""

from __future__ import annotations

import os

# Tests run in several processes on few cores, where threads of one process wait for those of another.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
