"""Infinite losses and the like end a run before the weights take a step from them, on all ranks alike."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import NonFiniteError
from ..pgd import is_finite


class FiniteCheck:
    """Watches the steps of one epoch. Reading the loss, which a loop does anyway, is its only wait for the device.

    Args:
        args: Flags; ``distributed``, ``rank`` and ``world_size`` are set.
        device: Where losses are.
        epoch: Its number, for the error.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, epoch: int) -> None:
        self._args = args
        self._device = device
        self._epoch = epoch
        self._step = 0
        self._bad: list[str] = []  # of this rank, in the batches of the current update

    def read(self, loss: Tensor, finite: Mapping[str, Tensor], *, update: bool) -> float:
        """Return a batch's loss as a number, before anything is done with its gradients.

        Args:
            loss: [].
            finite: What else has to be finite -> whether it is, [] on the device.
            update: Whether the optimizer steps after this batch; the ranks then agree, so every one has to call.

        Raises:
            NonFiniteError: With ``update``, if anything in the batches since the last one was not finite on any rank.
        """
        names = ["loss", *finite]
        flags = torch.stack([loss.detach().isfinite(), *finite.values()])
        any_bad = (~flags).any().float().reshape(1)
        if update and self._args.distributed:
            any_bad += bool(self._bad)
            dist.all_reduce(any_bad)
        loss = loss.detach().reshape(1)
        value, *flags_and_any = torch.cat([loss, flags.to(loss.dtype), any_bad.to(loss.dtype)]).tolist()
        *are_finite, anywhere = flags_and_any
        self._bad += [name for name, fine in zip(names, are_finite, strict=True) if not fine and name not in self._bad]
        if update:
            if anywhere or self._bad:
                _stop(self._args, self._bad, f"epoch {self._epoch}, step {self._step}")
            self._step += 1
        return float(value)


def check_weights(args: argparse.Namespace, module: nn.Module, device: torch.device, epoch: int) -> None:
    """Weights that cannot be used are not saved over a checkpoint that can; every rank has to call.

    Raises:
        NonFiniteError: A parameter of ``module`` is not finite on any rank.
    """
    names, tensors = zip(*module.named_parameters(), strict=True)
    flags = torch.stack([is_finite([tensor]) for tensor in tensors]).tolist()
    bad = [name for name, fine in zip(names, flags, strict=True) if not fine]
    anywhere = torch.tensor(float(bool(bad)), device=device)
    if args.distributed:
        dist.all_reduce(anywhere)
    if anywhere.item():
        _stop(args, bad[:1], f"epoch {epoch}, after its last step")


def _stop(args: argparse.Namespace, bad: list[str], when: str) -> None:
    """Raise the same error on every rank."""
    by_rank: list[Any] = [bad]
    if args.distributed:
        by_rank = [None] * args.world_size
        dist.all_gather_object(by_rank, bad)
    found = "; ".join(f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(by_rank) if names)
    raise NonFiniteError(
        f"{when}: not finite on {found}. The weights have not been saved since; a lower --lr or --clip-grad may help, "
        "and --resume goes on from the last checkpoint"
    )
