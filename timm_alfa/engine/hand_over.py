"""A loss whose gradients are known already, for the one ``backward`` of the training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST_FLOAT16_SCALE = 2.0**8  # until a backward has told how the training loop scales its loss: rather too small


class LossScale:
    """What the training loop multiplied the loss by in its last backward; float16 gradients are computed at it."""

    def __init__(self) -> None:
        self.value: Tensor | float = FIRST_FLOAT16_SCALE


class HandOver(torch.autograd.Function):
    """A scalar whose gradients with respect to some tensors are already known."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        loss_scale: LossScale,
        scale: Tensor | float,
        gradients: list[Tensor],
        shared: bool,
        *tensors: Tensor,
    ) -> Tensor:
        """The loss; ``shared`` gradients are somebody else's, too, and not given away."""
        ctx.loss_scale, ctx.scale, ctx.gradients, ctx.shared = loss_scale, scale, gradients, shared
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Any, ...]:
        """The gradients, in the training loop's scale."""
        if torch.is_grad_enabled():
            raise RuntimeError("AlfaTask gives no second derivatives; use an optimizer without create_graph=True")
        ctx.loss_scale.value = factor.detach()
        if ctx.gradients is None:
            raise RuntimeError("the loss of an AlfaTask can be walked backward once; call the task again")
        scaled, ctx.gradients = ctx.gradients, None  # nobody else holds them: they become the weights' own
        ratio = factor / ctx.scale  # on an accelerator, looking at it would cost more than to multiply
        if scaled and (ctx.shared or ratio.device.type != "cpu" or ratio.item() != 1):
            scaled = torch._foreach_mul(scaled, ratio)
        cast = [gradient.to(dtype) for gradient, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return None, None, None, None, None, *cast


class _RefuseGradients(torch.autograd.Function):
    """A tensor whose graph was freed; without this, a loss on it would train nothing and say nothing."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(
            "the graph behind the output of an AlfaTask is freed in its step; put a loss on it into the criterion, "
            "or use AlfaWrapper and AlfaLoss"
        )


def refusing_gradients(loss: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, a part of a step's output, such that a backward from it raises."""
    refusing: Tensor = _RefuseGradients.apply(loss, tensor) if tensor.is_floating_point() else tensor
    return refusing
