"""An older timm, told in one sentence before anything of it fails to import."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import timm

__all__ = ["OLDEST_TIMM", "require_timm"]

OLDEST_TIMM = "1.0.31"


def require_timm(found: str = timm.__version__) -> None:
    """Accept timm from ``OLDEST_TIMM`` on.

    Args:
        found: Version of timm, such as ``1.0.31`` or ``1.0.32.dev0``.

    Raises:
        ImportError: It is older; the message says which version is there and which is needed.
        SystemExit: 2, instead, with that message as one line, where a command of this package is being started.
    """
    if _release(found) >= _release(OLDEST_TIMM):
        return
    message = f"timm-alfa needs timm {OLDEST_TIMM} or newer, found {found}: pip install --upgrade timm"
    command = _started_command()
    if command is None:
        raise ImportError(message)
    print(f"{command}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _started_command() -> str | None:
    """Name of our command that this process is, or None inside other programs.

    Commands import the package first, so that none of them could catch the error itself.
    """
    program = Path(sys.argv[0]).stem if sys.argv else ""
    if program == "-m":  # python is still looking for the module to run
        module = re.search(r" -\w*m\s*(timm_alfa[\w.]*)", " ".join(sys.orig_argv))
        return module[1] if module else None
    return program if program == "train_alfa" or program.startswith("timm-alfa-") else None
