"""Measurements: ``python -m timm_alfa.bench step`` for what a training step costs."""
