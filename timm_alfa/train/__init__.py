"""timm's training pipeline from timm's public parts, with ALFA: the command behind ``train_alfa.py``."""

from __future__ import annotations

from .run import main

__all__ = ["main"]
