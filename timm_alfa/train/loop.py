"""One epoch of training: timm's order of operations, step by step, whatever the task computes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from timm import utils
from timm.data import Mixup
from timm.task import TrainingTask
from torch import nn
from torchvision.utils import save_image

from .checkpoints.saver import TrainCheckpointSaver, gather_random_states
from .device import Precision
from .finite import FiniteCheck
from .log import progress_bar

_logger = logging.getLogger(__name__)


@runtime_checkable
class ReportingTask(Protocol):
    """What a task may add to the logs; timm's own tasks add nothing."""

    def interval_text(self) -> str:
        """For a log line."""
        ...

    def epoch_metrics(self) -> dict[str, float]:
        """For the epoch's summary; every rank calls."""
        ...

    def write_history(self, folder: Path | None) -> None:
        """Write what was recorded step by step."""
        ...

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """For the start of a run."""
        ...


@dataclass
class Training:
    """The parts of a run that stay the same from epoch to epoch.

    Attributes:
        batch_size: Images per process and batch on average, which ``--variable-batch-loss-scale`` relates to.
        scheduler: timm's learning rate schedule; None for ``--sched none``.
        mixup: Mixing done here rather than by the loader (``--no-prefetcher``, ``--cache-images``).
        saver: Checkpoints; the primary rank's only.
        folder: Of the run; the primary rank's only.
    """

    args: argparse.Namespace
    task: TrainingTask
    loader: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: Precision
    batch_size: float
    scheduler: Any = None
    mixup: Mixup | None = None
    saver: TrainCheckpointSaver | None = None
    folder: Path | None = None

    @property
    def module(self) -> nn.Module:
        """What is trained, inside its wrapper for several processes if there is one."""
        module = self.task.get_trainable_module()
        assert module is not None  # a classification task has one
        return module

    @property
    def learning_rate(self) -> float:
        """Mean over the parameter groups."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return sum(rates) / len(rates)


def updates_per_epoch(args: argparse.Namespace, loader: Any) -> int:
    """Return the number of optimizer steps that one pass over ``loader`` makes."""
    return -(-len(loader) // args.grad_accum_steps)


def train_one_epoch(run: Training, epoch: int) -> dict[str, float]:
    """Train for one pass over the loader; return its metrics, averaged over all ranks.

    Args:
        run: The parts of the run.
        epoch: Number of the epoch, from 0; schedules and EMA warm-up count updates from it.
    """
    args, task, loader = run.args, run.task, run.loader
    _switch_mixup_off(run, epoch)
    run.module.train()

    batches, updates = len(loader), updates_per_epoch(args, loader)
    remainder = batches % args.grad_accum_steps
    num_updates = epoch * updates
    losses, update_time, data_time = utils.AverageMeter(), utils.AverageMeter(), utils.AverageMeter()
    accumulated, samples = args.grad_accum_steps, 0
    check = FiniteCheck(args, run.device, epoch)
    data_start = update_start = time.time()

    run.optimizer.zero_grad()
    with progress_bar(updates, f"Train: {epoch}", primary=utils.is_primary(args)) as bar:
        for index, (images, target) in enumerate(loader):
            last = index == batches - 1
            update = last or (index + 1) % accumulated == 0
            if index >= batches - remainder:
                accumulated = remainder  # timm's next `update` goes by it too, and so does this one, for equal weights
            images, target = prepare_batch(run, images, target)
            data_time.update(accumulated * (time.time() - data_start))

            loss = _step(run, images, target, check, accumulated=accumulated, update=update)

            losses.update(loss * accumulated, images.shape[0])
            samples += images.shape[0] * args.world_size
            if not update:
                data_start = time.time()
                continue

            num_updates += 1
            run.optimizer.zero_grad()
            task.update_ema(step=num_updates)
            if args.synchronize_step and run.device.type != "cpu":
                torch.accelerator.synchronize()
            update_time.update(time.time() - update_start)
            update_start = time.time()

            position = num_updates - epoch * updates - 1
            bar.update()
            if position % args.log_interval == 0 or last:
                text = (
                    _loss_text(run, losses) + f"  Time: {update_time.val:.3f}s, {samples / update_time.val:>7.2f}/s  "
                    f"({update_time.avg:.3f}s, {samples / update_time.avg:>7.2f}/s)  LR: {run.learning_rate:.3e}  "
                    f"Data: {data_time.val:.3f} ({data_time.avg:.3f})"
                )
                if bar.disable or last:
                    share = 100.0 * (position + 1) / updates
                    _logger.info(f"Train: {epoch} [{position:>4d}/{updates} ({share:>3.0f}%)]  {text}")
                else:
                    bar.set_postfix_str(text.partition("  Time:")[0])
                if isinstance(task, ReportingTask):
                    task.write_history(run.folder)
                if args.save_images and run.folder is not None:
                    save_image(images, str(run.folder / f"train-batch-{index}.jpg"), padding=0, normalize=True)
            if args.recovery_interval and (position + 1) % args.recovery_interval == 0:
                save_recovery(run, epoch, position)
            if run.scheduler is not None:
                run.scheduler.step_update(num_updates=num_updates, metric=losses.avg)
            samples = 0
            data_start = time.time()

    if hasattr(run.optimizer, "sync_lookahead"):
        run.optimizer.sync_lookahead()
    metrics = {
        "loss": _mean_over_ranks(run, losses.avg),
        "step_time": update_time.avg,  # seconds per update, waiting for data included
        "images_per_second": losses.count * args.world_size / update_time.sum,
    }
    if isinstance(task, ReportingTask):
        metrics |= task.epoch_metrics()
    return metrics


def _switch_mixup_off(run: Training, epoch: int) -> None:
    if run.args.mixup_off_epoch and epoch >= run.args.mixup_off_epoch:
        if run.mixup is not None:
            run.mixup.mixup_enabled = False
        elif run.args.prefetcher and run.loader.mixup_enabled:
            run.loader.mixup_enabled = False


def prepare_batch(run: Training, images: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of the loader as the task takes it: on its device, mixed, in its memory layout."""
    if not run.args.prefetcher:
        images = images.to(device=run.device, dtype=run.precision.model_dtype)
        target = target.to(device=run.device)
    if run.mixup is not None:
        images, target = run.mixup(images, target)
    if run.args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, target


def _step(
    run: Training, images: torch.Tensor, target: torch.Tensor, check: FiniteCheck, *, accumulated: int, update: bool
) -> float:
    """Run forward and backward and, if ``update``, the optimizer; return the batch's share of the update's loss."""
    args, task, optimizer = run.args, run.task, run.optimizer
    second_order = getattr(optimizer, "is_second_order", False)
    with contextlib.nullcontext() if update else task.no_sync():
        with run.precision.autocast():
            result = task(images, target)
        loss = result["loss"]
        if accumulated > 1:
            loss = loss / accumulated
        # The step's only wait for the device. What is launched after it, up to the optimizer's step, runs while the
        # next batch is fetched.
        value = check.read(loss, result.get("finite", {}), update=update)
        scaled = loss * _batch_scale(run, images.shape[0]) if args.train_img_sizes is not None else loss

        clipped = None
        if args.clip_grad is not None:
            clipped = task.get_clip_parameters(exclude_head="agc" in args.clip_mode)
        if run.precision.scaler is not None:
            run.precision.scaler(
                scaled,
                optimizer,
                clip_grad=args.clip_grad,
                clip_mode=args.clip_mode,
                parameters=clipped,
                create_graph=second_order,
                need_update=update,
            )
        else:
            scaled.backward(create_graph=second_order)
            if update:
                if clipped is not None:
                    utils.dispatch_clip_grad(clipped, value=args.clip_grad, mode=args.clip_mode)
                optimizer.step()
    return value


def _batch_scale(run: Training, batch_size: int) -> float:
    ratio = batch_size / run.batch_size
    return {"none": 1.0, "sqrt": ratio**0.5, "linear": ratio}[run.args.variable_batch_loss_scale]


def _loss_text(run: Training, losses: utils.AverageMeter) -> str:
    """Return the part of the log line about losses; every rank calls it."""
    text = f"Loss: {_mean_over_ranks(run, losses.val):#.3g} ({_mean_over_ranks(run, losses.avg):#.3g})"
    extra = run.task.interval_text() if isinstance(run.task, ReportingTask) else ""
    return f"{text}  {extra}" if extra else text


def _mean_over_ranks(run: Training, value: float) -> float:
    if not run.args.distributed:
        return value
    tensor = torch.tensor([value], device=run.device, dtype=torch.float32)
    return float(utils.reduce_tensor(tensor, run.args.world_size).item())


def save_recovery(run: Training, epoch: int, position: int) -> None:
    """Write a recovery checkpoint; every rank calls it, for its random state."""
    states = gather_random_states()
    if run.saver is not None:
        run.saver.random_states = states
        run.saver.save_recovery(epoch, batch_idx=position)
