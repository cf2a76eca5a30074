"""Measurements: ``python -m timm_alfa.bench`` and a name, such as ``step``, ``loop``, ``paper`` or ``finetune``."""

import sys

from . import host, loader, loop, rounding, step
from .common import run
from .finetune import command as finetune
from .gpu import command as gpu
from .paper import command as paper

COMMANDS = {
    "step": step,
    "loop": loop,
    "loader": loader,
    "host": host,
    "rounding": rounding,
    "paper": paper,
    "finetune": finetune,
    "gpu": gpu,
}
USAGE = f"usage: python -m timm_alfa.bench {{{','.join(COMMANDS)}}} ..."

name = sys.argv[1] if len(sys.argv) > 1 else ""
if name in ("-h", "--help"):
    print(USAGE, "", *(str(module.__doc__).splitlines()[0].replace("``", "") for module in COMMANDS.values()), sep="\n")
elif name in COMMANDS:
    run(name, COMMANDS[name].main, sys.argv[2:])
else:
    print(USAGE, file=sys.stderr)
    sys.exit(2)
