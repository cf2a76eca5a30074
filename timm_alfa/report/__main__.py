"""``python -m timm_alfa.report``."""

from .page import main

main()
