"""Robust accuracy: of any model (:func:`robust_accuracy`), of any checkpoint (``python -m timm_alfa.robust``), and of
what a training run ends with (``--eval-pgd``)."""

from .accuracy import robust_accuracy

__all__ = ["robust_accuracy"]
