"""Starts commands as they are started for real: in processes of their own, one or several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in the repository, with this copy of the package."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
