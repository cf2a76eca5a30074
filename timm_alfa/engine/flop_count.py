"""FLOPs of the operations that torch executes: convolutions, matrix products, attention, recurrent layers.

torch's own table of formulas lacks, by version, the attention of CPUs and other devices, the fused inference path of
``nn.MultiheadAttention`` and recurrent layers, and its formula for the backward of a grouped convolution forgets the
groups. An operation without a formula would count 0 without a word, so what models use is counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of everything that runs inside; a multiplication with its addition counts 2.

    torch's ``FlopCounterMode`` also follows modules, with hooks that do not go with ``autograd.grad`` on leaves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self.total += flops_of(func.overloadpacket, args, kwargs, output)
        return output


def flops_of(operation: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> int:
    """FLOPs of one call of an operation such as ``torch.ops.aten.addmm``; 0 if nothing is multiplied in it.

    Args:
        operation: What was called.
        args: With which arguments.
        kwargs: And which by name.
        output: What it returned.
    """
    name = operation.__name__
    if "scaled_dot_product" in name:
        if name.endswith("_backward"):  # the products once more, and two gradients of each but the first
            return _attention(*args[1:4], first=3, second=2)
        return _attention(*args[:3])
    formula = _FORMULAS.get(name)
    if formula is not None:
        return formula(*args)
    if operation in flop_registry:
        return int(flop_registry[operation](*args, **kwargs, out_val=output))
    return 0


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, first: int = 1, second: int = 1) -> int:
    """q @ k.T, ``first`` times, and scores @ v, ``second`` times; [..., heads, length, width] each."""
    pairs = query.shape[:-1].numel() * key.shape[-2]  # of positions, in all heads: those of the queries
    return 2 * pairs * (first * query.shape[-1] + second * value.shape[-1])


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
    """The forward's FLOPs for the input's gradient, and again for the weight's."""
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(grad_out.shape), transposed=transposed)
    return int(sum(output_mask[:2]) * forward)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, width: int, *rest: Any) -> int:
    """``nn.MultiheadAttention`` in one operation: projections of [B, L, width], attention, one more projection."""
    batch, length = query.shape[:2]
    projections = 2 * length + key.shape[1] + value.shape[1]
    return 2 * batch * projections * width**2 + 4 * batch * length * key.shape[1] * width


def _fused_encoder_layer(source: Tensor, width: int, heads: int, *rest: Any) -> int:
    """``nn.TransformerEncoderLayer`` in one operation: attention and two linear layers."""
    layers = sum(part.numel() for part in (rest[11], rest[13]))
    return _fused_attention(source, source, source, width) + 2 * source.shape[:-1].numel() * layers


def _recurrent(times: int) -> Callable[..., int]:
    def flops(x: Tensor, *rest: Any) -> int:
        """Every position [L, B] of the input is multiplied with every matrix."""
        weights = rest[0] if isinstance(rest[0], (list, tuple)) else rest[:2]
        matrices = sum(weight.numel() for weight in weights if weight.dim() == 2)
        return times * 2 * x.shape[:2].numel() * matrices

    return flops


_FORMULAS: dict[str, Callable[..., int]] = {
    "convolution_backward": _convolution_backward,
    "_native_multi_head_attention": _fused_attention,
    "_transformer_encoder_layer_fwd": _fused_encoder_layer,
    "mkldnn_rnn_layer": _recurrent(1),
    "mkldnn_rnn_layer_backward": _recurrent(2),
    "_cudnn_rnn": _recurrent(1),
    "_cudnn_rnn_backward": _recurrent(2),
    "mv": lambda matrix, vector: 2 * matrix.numel(),
    "addmv": lambda start, matrix, vector: 2 * matrix.numel(),
    "dot": lambda one, other: 2 * one.numel(),
    "addbmm": lambda start, one, other: 2 * one.numel() * other.shape[-1],
}


def count_flops(step: Callable[[], object]) -> int:
    """FLOPs of one call.

    Args:
        step: Not compiled: what a compiled graph executes is not seen.
    """
    with FlopCounter() as counter:
        step()
    return counter.total
