"""``python -m timm_alfa.robust``."""

from .command import main

main()
