"""Robust accuracy of a model, a checkpoint, or what a run ends with.

In Python :func:`robust_accuracy`, for a file ``python -m timm_alfa.robust``, at the end of training ``--eval-pgd``.
"""

from .accuracy import robust_accuracy

__all__ = ["robust_accuracy"]
