"""Plain training as a task whose steps can be captured as CUDA graphs; without them timm's own task is used."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.inventory import Inventory
from ..loss import scalar_loss
from .base import MethodTask


class PlainTask(MethodTask):
    """The model and the criterion.

    Args:
        model: The model to train, on its device.
        criterion: (output, target) -> scalar; ``None`` builds timm's from ``criterion_kwargs``.
        criterion_kwargs: For ``timm.loss.create_classification_loss``, where ``criterion`` is ``None``.
        cuda_graph: Launch each step as one CUDA graph, see :mod:`timm_alfa.engine.cuda_graph`.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log what the task does.

    Raises:
        ValueError: ``cuda_graph`` without a CUDA device.
    """

    reported = ()
    second_derivatives = True

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        *,
        criterion_kwargs: dict[str, Any] | None = None,
        cuda_graph: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose
        )
        self._inventory = Inventory(model)
        if cuda_graph:
            self.use_cuda_graph()

    def compute(self, input: Any, target: Any) -> dict[str, Any]:
        """Forward and loss.

        Args:
            input: What the model takes.
            target: What the criterion takes.
        """
        output = self.models.called(input)
        return {"loss": scalar_loss(self.criterion, output, target), "output": output}

    def graph_inventory(self) -> Inventory:
        """Of the model."""
        return self._inventory

    def graph_variant(self) -> Hashable:
        """All steps are alike."""
        return None

    def graph_mode(self) -> AbstractContextManager[None]:
        """Nothing to be done."""
        return nullcontext()

    def graph_replayed(self) -> None:
        """Nothing is counted."""
