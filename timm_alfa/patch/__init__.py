"""``python -m timm_alfa.patch train.py``: ALFA in timm's own training script."""

from .command import main, patch, show_diff, unpatch

__all__ = ["main", "patch", "show_diff", "unpatch"]
