"""Peak memory of a training step, measured in a process of its own."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 2**20


def fresh_process_environment() -> dict[str, str]:
    """Variables under which freed tensors leave the process at once, so that its resident size is what is alive."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def peak_memory(step: Callable[[], object], device: torch.device, steps: int = 4) -> float:
    """MiB that steps need at their peak beyond what is there before the first.

    On an accelerator this is what its allocator handed out, the model included; on the CPU the growth of the process's
    resident size since before the first step, so gradients and the optimizer's state count and the model does not.

    Args:
        step: One training step.
        device: Where it runs.
        steps: How many to run; the peak is over all but the first two, which allocate for good or try things out.
    """
    gc.collect()
    before = _resident()
    for _ in range(2):
        step()
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_resident_peak()
    for _ in range(steps - 2):
        step()
    if device.type != "cpu":
        return torch.cuda.max_memory_allocated(device) / MIB
    return (_resident_peak() - before) / MIB


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _resident_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _reset_resident_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
