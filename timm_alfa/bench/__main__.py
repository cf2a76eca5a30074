"""Measurements: ``python -m timm_alfa.bench step``, ``loop``, ``loader`` and ``paper``."""
import sys

from . import loader, loop, paper, step
from .common import run

COMMANDS = {"step": step.main, "loop": loop.main, "loader": loader.main, "paper": paper.main}

if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
    print(f"usage: python -m timm_alfa.bench {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
    sys.exit(2)
run(sys.argv[1], COMMANDS[sys.argv[1]], sys.argv[2:])
