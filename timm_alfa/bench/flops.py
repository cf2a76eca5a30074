"""FLOPs of what a step really executes: convolutions, matrix products and attention, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry


def count_flops(step: Callable[[], object]) -> int:
    """FLOPs of one call, by torch's formulas.

    Args:
        step: Not compiled: what a compiled graph executes is not seen.
    """
    with _Counter() as counter:
        step()
    return counter.total


class _Counter(TorchDispatchMode):
    # torch's FlopCounterMode also follows modules, with hooks that do not go with autograd.grad on leaves.
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.convolution_backward:
            self.total += _convolution_backward(*args)
        elif func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **kwargs, out_val=output)
        return output


def _convolution_backward(
        grad_out: Tensor,
        x: Tensor,
        weight: Tensor,
        bias_sizes: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
        output_mask: Sequence[bool],
) -> int:
    """The forward's FLOPs for the input's gradient, and again for the weight's: torch's formula forgets the groups."""
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad_out.shape), transposed=transposed)
    return sum(output_mask[:2]) * forward
