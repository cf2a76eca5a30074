"""``--alfa-dry-run``: a few training steps with and without the method, what they cost and what they do."""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import is_primary
from torch import Tensor

from ..errors import UsageError
from ..perturbation import Pgd
from ..run_folder.output import DEFAULT_OUTPUT
from ..tasks.alfa import AlfaTask
from ..tasks.base import MethodTask
from .propose_alpha import propose_alpha

PAIRS = 5


def dry_run(
    args: argparse.Namespace,
    task: TrainingTask,
    epoch: Callable[[], Iterator[Any]],
    *,
    device: torch.device,
    amp_autocast: Callable[[], AbstractContextManager[Any]],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Time plain steps and the task's, in turns, on one batch, and print the ratio and what delta does.

    With weights that were trained before, also propose sizes, see :mod:`timm_alfa.train.propose_alpha`. No checkpoint
    is written.

    Args:
        args: The command line, for the memory layout and the rank.
        task: The task as training would use it.
        epoch: Makes the batches of an epoch of training; one is taken, and more for a proposal.
        device: Where the batch goes.
        amp_autocast: Makes the context of a forward.
        optimizer: Steps after each backward, as in training.

    Raises:
        UsageError: The data holds no full batch.
    """
    batch = next(epoch(), None)
    if batch is None:
        raise UsageError(f"--batch-size {args.batch_size}: no full batch in the training data; use a smaller one")

    def placed(batch: Any) -> tuple[Tensor, Tensor]:
        input, target = batch[0].to(device), batch[1].to(device)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        return input, target

    input, target = placed(batch)
    model = task.get_eval_model()  # the model itself, without DDP
    module = task.get_trainable_module()
    assert model is not None
    assert module is not None
    module.train()
    trained = bool(args.pretrained or args.initial_checkpoint)
    if trained:  # the proposal starts from them, not from what the steps below make of them
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def step(loss_of: Callable[[], Tensor]) -> tuple[float, float]:
        start = _now(device)
        with amp_autocast():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return _now(device) - start, loss.item()

    def plain() -> Tensor:
        loss: Tensor = task.plain_loss(input, target) if isinstance(task, MethodTask) else task(input, target)["loss"]
        return loss

    def method() -> Tensor:
        return task(input, target)["loss"]

    step(plain), step(method)
    timed = [(step(plain), step(method)) for _ in range(PAIRS)]
    metrics = task.monitor.take() if isinstance(task, AlfaTask) else None
    if not is_primary(args):
        return
    ratio = statistics.median(other[0] / base[0] for base, other in timed)
    plain_time = statistics.median(base[0] for base, _ in timed)
    print(f"batch {'x'.join(map(str, input.shape))} on {device}, loss {timed[0][1][1]:.4g}")
    print(
        f"plain step {1000 * plain_time:.1f} ms, --method {args.method} {ratio:.2f} times that "
        f"(median of {PAIRS} pairs, in turns)"
    )
    if not isinstance(task, AlfaTask) or metrics is None:
        return
    print(task.effects(metrics), *task.advice(metrics).values(), sep="\n")
    if not isinstance(task.engine.perturbation, Pgd) or args.distributed:
        return
    if trained:
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        pairs = (placed(batch) for batch in itertools.chain.from_iterable(iter(epoch, None)))
        batches = ((input, task.targets(input, target)) for input, target in pairs)
        folder = Path(args.output or DEFAULT_OUTPUT)
        print(propose_alpha(args, task, batches, optimizer=optimizer, autocast=amp_autocast, folder=folder))
    else:
        print("With trained weights (--pretrained, --initial-checkpoint) this also proposes a value of --alfa-alpha.")


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()
