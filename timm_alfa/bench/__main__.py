import sys

from . import step

COMMANDS = {"step": step.main}

if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
    print(f"usage: python -m timm_alfa.bench {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
    sys.exit(2)
COMMANDS[sys.argv[1]](sys.argv[2:])
