"""What others can use of a run: plain timm weights, ONNX and a model card; ``timm-alfa-export`` writes all of them."""

from __future__ import annotations

from .weights import CONFIG_FILE, WEIGHTS_FILE, export_checkpoint, export_model

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "export_checkpoint", "export_model"]
