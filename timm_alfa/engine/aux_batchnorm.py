"""Auxiliary batch norm (Xie et al. 2020): adversarial passes have affine parameters and statistics of their own.

Every batch norm gets a child module ``aux`` that holds a second set of whatever the norm holds. In an adversarial pass
the norm computes with that set instead of its own, whichever class it is. Being a child, the set is moved, copied,
clipped, synchronised and optimised with the model; it is never part of a ``state_dict``, and evaluation never sees it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import BlockError
from .trace import trace

CHILD = "aux"


class AuxBranch(nn.Module):
    """The second set of one batch norm, at first a copy of the first. It is not called, and not saved with the model.

    Args:
        norm: Any batch norm; what it lacks (affine parameters, statistics) the branch lacks too.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        for name, parameter in norm._parameters.items():
            copied = None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            self.register_parameter(name, copied)
        for name, buffer in norm._buffers.items():
            self.register_buffer(name, None if buffer is None else buffer.detach().clone())

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class AuxBatchNorms:
    """The auxiliary branches of a model's batch norms, attached on construction.

    Build it before the optimizer, which trains the branches' affine parameters, and before DistributedDataParallel.

    Args:
        model: Its batch norms (``nn.BatchNorm1d`` to ``3d``, ``SyncBatchNorm``, timm's ``BatchNormAct2d`` and whatever
            derives from them) get a branch each. There may be none.

    Raises:
        ValueError: The model has branches already.
    """

    def __init__(self, model: nn.Module):
        self._norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        if any(CHILD in norm._modules for norm in self._norms.values()):
            raise ValueError("model: has auxiliary batch norms already; remove those first")
        for norm in self._norms.values():
            norm.add_module(CHILD, AuxBranch(norm))

    def __len__(self) -> int:
        return len(self._norms)

    @property
    def names(self) -> list[str]:
        """Of the norms that have a branch."""
        return list(self._norms)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Forwards inside compute with the branches, and move their statistics.

        Gradient checkpointing has to be off inside: forwards that are repeated in backward would not see the branches.
        """
        own = [(norm, dict(norm._parameters), dict(norm._buffers)) for norm in self._norms.values()]
        try:
            for norm in self._norms.values():
                branch = norm._modules[CHILD]
                assert branch is not None
                norm._parameters.update(branch._parameters)
                norm._buffers.update(branch._buffers)
            yield
        finally:
            for norm, parameters, buffers in own:
                norm._parameters.update(parameters)
                norm._buffers.update(buffers)

    def keep_only(self, names: Collection[str]) -> None:
        """Take the branches off all other norms."""
        for name in self._norms.keys() - set(names):
            del self._norms.pop(name)._modules[CHILD]

    def remove(self) -> None:
        """Take all branches off the model; may be called again."""
        self.keep_only(())

    def state_dict(self) -> dict[str, Tensor]:
        """Every branch's tensors, as ``<norm>.<tensor>``: copies, for a checkpoint."""
        return {
            f"{name}.{key}": tensor.detach().clone()
            for name, branch in self._branches()
            for key, tensor in branch.tensors().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: The state is of other norms, or of norms of other sizes.
        """
        own = {f"{name}.{key}": tensor for name, branch in self._branches() for key, tensor in branch.tensors().items()}
        wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(f"auxiliary batch norms: {len(wrong)} tensors do not fit, the first is '{wrong[0]}'")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _branches(self) -> Iterator[tuple[str, AuxBranch]]:
        for name, norm in self._norms.items():
            branch = norm._modules[CHILD]
            assert isinstance(branch, AuxBranch)
            yield name, branch


def norms_behind(model: nn.Module, blocks: Collection[str], input: Any) -> list[str]:
    """Names of the batch norms that run after the first of ``blocks`` has finished, from one forward.

    Raises:
        BlockError: There are none.
    """
    order = [visit.name for visit in trace(model, input)]
    first = min(order.index(block) for block in blocks if block in order)
    behind = [name for name in order[first + 1 :] if isinstance(model.get_submodule(name), _BatchNorm)]
    if not behind:
        raise BlockError(
            f"no batch norm runs behind {', '.join(repr(block) for block in blocks)}, so auxiliary ones (bn 'aux') "
            "would do nothing; use 'clean', or an earlier block"
        )
    return behind
