"""What a record says about where it was made."""

from __future__ import annotations

import platform
from datetime import datetime
from typing import Any

import timm
import torch
import torchvision

from .. import __version__


def describe_run(command: str, device: torch.device, *, processes: int) -> dict[str, Any]:
    """The command, when and where it started, and the versions that decide what it computes."""
    return {
        "command": command,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "processes": processes,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a str subclass, which plain YAML does not take
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "timm-alfa": __version__,
    }


def hardware(device: torch.device) -> str:
    """The device's name, or for the CPU how many threads compute, and with what instructions."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{threads} CPU thread{'s' if threads > 1 else ''} ({torch.backends.cpu.get_cpu_capability()})"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
