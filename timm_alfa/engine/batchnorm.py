"""Which statistics a pass reads and moves.

In the adversarial passes batch norms use the batch's statistics, as in every training pass. With ``bn="clean"`` their
running statistics and counters move only with the clean pass, and so do the buffers of other norms that keep some. With
``bn="aux"`` they have statistics of their own, see :mod:`timm_alfa.engine.aux_batchnorm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .aux_batchnorm import AuxBranch
from .inventory import Inventory

BatchNormMode = Literal["clean", "shared", "aux"]
BATCH_NORM_MODES: tuple[BatchNormMode, ...] = ("clean", "shared", "aux")


class Statistics:
    """The buffers that a training-mode forward may move.

    Args:
        model: Looked through once; modules added later are not seen.
        inventory: Of the model.
    """

    def __init__(self, model: nn.Module, inventory: Inventory | None = None):
        self._inventory = Inventory(model) if inventory is None else inventory
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._others = [
            (module, name)
            for module in model.modules()
            if not isinstance(module, (_BatchNorm, AuxBranch))
            for name, _ in module.named_buffers(recurse=False)
        ]
        self._observed = False

    @property
    def known(self) -> bool:
        """Whether a pass was observed."""
        return self._observed

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Around the first clean pass, which tells what buffers, outside of batch norms, move at all."""
        before = [(buffer, buffer._version) for buffer in map(_buffer, self._others)]
        yield
        self._others = [
            owner
            for owner, (buffer, version) in zip(self._others, before, strict=True)
            if _buffer(owner) is not buffer or buffer._version != version
        ]
        self._observed = True

    def kept(self) -> AbstractContextManager[None]:
        """Passes inside use batch statistics and leave every running statistic as it is."""
        return _Kept(self._norms, self._others)

    @contextmanager
    def kept_outside_batch_norms(self) -> Iterator[None]:
        """Passes inside move the batch norms' running statistics only."""
        with _copies(self._others):
            yield

    @contextmanager
    def kept_in_recomputation(self) -> Iterator[None]:
        """Around a walk of the clean graph that a plain step does not make.

        With gradient checkpointing such a walk runs forwards again, which have to save what they saved the first time:
        so statistics do move, but those of copies.
        """
        if not self._inventory.checkpointing():
            yield
            return
        norms = [(norm, name) for norm in self._norms for name, _ in norm.named_buffers(recurse=False)]
        with _copies([*norms, *self._others]):
            yield


class _Kept:
    """The context of :meth:`Statistics.kept`; a class, as every adversarial pass of every step enters it."""

    def __init__(self, norms: Sequence[nn.Module], others: Sequence[tuple[nn.Module, str]]):
        self._norms = norms
        self._tracking: list[nn.Module] = []
        self._copies = _copies(others) if others else None

    def __enter__(self) -> None:
        if self._copies is not None:
            self._copies.__enter__()
        # track_running_stats = False in training mode: batch statistics, nothing moves. momentum = 0 would still count.
        for norm in self._norms:
            if norm.training and norm.track_running_stats:
                object.__setattr__(norm, "track_running_stats", False)  # several times quicker than a module's own
                self._tracking.append(norm)

    def __exit__(self, *error: Any) -> None:
        for norm in self._tracking:
            object.__setattr__(norm, "track_running_stats", True)
        if self._copies is not None:
            self._copies.__exit__(*error)


@contextmanager
def _copies(owners: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Modules work on copies of some of their buffers."""
    originals = [(module, name, _buffer((module, name))) for module, name in owners]
    try:
        for module, name, buffer in originals:
            module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in originals:
            module._buffers[name] = buffer


def _buffer(owner: tuple[nn.Module, str]) -> Tensor:
    module, name = owner
    return module.get_buffer(name)
