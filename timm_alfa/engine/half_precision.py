"""What half precision leaves of a perturbation.

Under autocast f + delta is kept in float32, but a layer that computes in bfloat16 or float16 rounds what it is given. A
feature that such a layer made lies on that precision's grid (in bfloat16 0.0039 apart between 0.5 and 1), so whatever
of delta is below half a spacing is gone. A model that is in half precision itself rounds the sum at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .core import Engine
from .nested import memory_of, tensors_of
from .recording import Recording

HALF = (torch.float16, torch.bfloat16)

_aten = torch.ops.aten
# Every value goes on as it is, or not at all: what was on a grid still is.
_PASSING = {
    _aten.relu, _aten.relu_, _aten.hardtanh, _aten.hardtanh_, _aten.clone, _aten._to_copy, _aten.cat,
    _aten.constant_pad_nd, _aten.max_pool2d_with_indices,
}  # fmt: skip


def survival(feature: Sequence[Tensor], delta: Sequence[Tensor], dtypes: Sequence[torch.dtype | None]) -> Tensor:
    """Share of delta's squared size at entries whose value it changes: sum delta^2 [cast(f + delta) != cast(f)] / sum.

    In ``linf`` that is the share of the entries that move.

    Args:
        feature: The floating-point tensors of a feature, of any shape.
        delta: A tensor of the same shape for each, at least float32.
        dtypes: What each sum is rounded to, ``None`` where it is not.

    Returns:
        [], in [0, 1], on the device; 1 for a delta of 0, not a number where delta is none.
    """
    kept, total = [], []
    for tensor, part, dtype in zip(feature, delta, dtypes, strict=True):
        tensor, squares = tensor.detach(), part.detach().square()
        total.append(squares.sum())
        if dtype is not None:
            squares = squares * ((tensor + part.detach()).to(dtype) != tensor.to(dtype))
        kept.append(squares.sum())
    whole = torch.stack(total).sum()
    return torch.where(whole == 0, 1.0, torch.stack(kept).sum() / whole)


class Rounding:
    """Which precision perturbed features are rounded to, and what that leaves of their perturbations.

    Args:
        engine: Whose blocks are perturbed.

    Attributes:
        dtype: The half precision at work; ``None`` as long as none was met.
        consumers: Block -> what each tensor of its perturbed feature is rounded to, ``None`` where it is not.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.dtype: torch.dtype | None = None
        self.consumers: dict[str, list[torch.dtype | None]] = {}

    def survival(self, recording: Recording, block: str, delta: Sequence[Tensor]) -> Tensor | None:
        """:func:`survival` of eta_i * delta_i at one block; ``None`` where everything is float32 or wider.

        A block's first call replays its tail once more. The model's statistics stay as they are; the random state does
        inside of ``Engine.adversarial_pass``.

        Args:
            recording: Of the clean pass.
            block: Its name.
            delta: What ``Engine.find_delta`` returned.
        """
        feature = recording.features[block]
        own = [tensor.dtype if tensor.dtype in HALF else None for tensor in feature.tensors]
        if not feature.autocast and not any(own):
            return None
        engine = self.engine
        if engine.eta.learnable:
            strength = engine.eta.values.detach()[engine.blocks.index(block)]
            delta = [strength.to(part.dtype) * part for part in delta]
        if block not in self.consumers:
            self.consumers[block] = self._find(recording, block, delta) if feature.autocast else own
        dtypes = self.consumers[block]
        if self.dtype is None:
            device = feature.tensors[0].device.type
            self.dtype = next(filter(None, [*dtypes, *own]), None) or torch.get_autocast_dtype(device)
        return survival(feature.tensors, delta, dtypes)

    def _find(self, recording: Recording, block: str, delta: Sequence[Tensor]) -> list[torch.dtype | None]:
        feature = recording.features[block]
        # Without a gradient: the cast of a leaf that requires one may be in autocast's cache, and would not be seen.
        sums = [tensor.detach() + part for tensor, part in zip(feature.tensors, delta, strict=True)]
        watch = FirstConsumer(sums)
        stance = torch.compiler.set_stance("force_eager")  # compiled code casts out of sight
        with self.engine.statistics_kept(), stance, watch:
            self.engine.replay(recording, block, feature.rebuild(sums))
        return watch.dtypes


class FirstConsumer(TorchDispatchMode):
    """Finds what the first operation to compute with a tensor rounds it to.

    Views, and operations that hand values on or drop them (ReLU, padding, max pooling, concatenation), are followed.

    Args:
        tensors: Floating-point tensors that do not share memory.

    Attributes:
        dtypes: For each the half precision that it was cast to; ``None`` where it was used as it is, as by a layer norm
            under autocast or an addition, or not at all.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        super().__init__()
        self.dtypes: list[torch.dtype | None] = [None] * len(tensors)
        self._followed: dict[int, int] = {}  # memory -> index of the tensor whose values it holds
        self._kept: list[Tensor] = []  # so that nothing else is put there
        self._consumed: set[int] = set()
        for index, tensor in enumerate(tensors):
            self._follow([tensor], index)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        taken = memory_of(tensors_of((args, kwargs)))
        for index in {self._followed[place] for place in taken & self._followed.keys()} - self._consumed:
            self._note(func, output, index)
        return output

    def _note(self, func: Any, output: Any, index: int) -> None:
        operation, results = func.overloadpacket, tensors_of(output)
        if operation is _aten._to_copy and output.dtype in HALF:
            self.dtypes[index] = output.dtype
            self._consumed.add(index)
        elif operation in _PASSING:
            self._follow(results, index)
        elif func._schema.is_mutable or index not in map(self._followed.get, memory_of(results)):  # no view
            self._consumed.add(index)

    def _follow(self, tensors: Sequence[Tensor], index: int) -> None:
        self._kept += tensors
        self._followed.update(dict.fromkeys(memory_of(tensors), index))
