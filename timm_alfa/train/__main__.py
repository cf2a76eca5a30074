"""``python -m timm_alfa.train``, and with it ``torchrun -m timm_alfa.train``."""

from __future__ import annotations

from .run import main

if __name__ == "__main__":
    main()
