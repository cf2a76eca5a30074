"""``--alfa-dry-run``: one batch, a few training steps with and without the method, and what they cost."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import is_primary
from torch import Tensor

from ..errors import UsageError

PAIRS = 5


def dry_run(
    args: argparse.Namespace,
    task: ClassificationTask,
    loader: Any,
    *,
    device: torch.device,
    amp_autocast: Callable[[], AbstractContextManager[Any]],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Time plain steps and the task's, in turns, on one batch, and print the ratio. Nothing is saved.

    Args:
        args: The command line, for the memory layout and the rank.
        task: The task as training would use it.
        loader: The training loader; one batch is taken.
        device: Where the batch goes.
        amp_autocast: Makes the context of a forward.
        optimizer: Steps after each backward, as in training.

    Raises:
        UsageError: The data holds no full batch.
    """
    batch = next(iter(loader), None)
    if batch is None:
        raise UsageError(f"--batch-size {args.batch_size}: no full batch in the training data; use a smaller one")
    input, target = batch[0].to(device), batch[1].to(device)
    if args.channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    model = task.get_eval_model()  # the model itself, without DDP
    module = task.get_trainable_module()
    assert model is not None
    assert module is not None
    module.train()

    def step(loss_of: Callable[[], Tensor]) -> tuple[float, float]:
        start = _now(device)
        with amp_autocast():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return _now(device) - start, loss.item()

    def plain() -> Tensor:
        return task.criterion(model(input), target)

    def method() -> Tensor:
        return task(input, target)["loss"]

    step(plain), step(method)
    pairs = [(step(plain), step(method)) for _ in range(PAIRS)]
    if not is_primary(args):
        return
    ratio = statistics.median(other[0] / base[0] for base, other in pairs)
    plain_time = statistics.median(base[0] for base, _ in pairs)
    print(f"batch {'x'.join(map(str, input.shape))} on {device}, loss {pairs[0][1][1]:.4g}")
    print(
        f"plain step {1000 * plain_time:.1f} ms, --method {args.method} {ratio:.2f} times that "
        f"(median of {PAIRS} pairs, in turns)"
    )


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()
