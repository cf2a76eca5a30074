"""Validation: loss and accuracy of a model over a loader."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from timm.task import TrainingTask
from timm.task.evaluator import evaluation_sample_limit
from timm.utils import AverageMeter, is_primary
from torch import nn

from .device import Precision
from .log import progress_bar

_logger = logging.getLogger(__name__)

# as timm's log names accuracies, and how they are written
_SHOWN = {"loss": "Loss: {:>6.3f}", "top1": "Acc@1: {:>7.3f}", "top5": "Acc@5: {:>7.3f}"}


def validate(
    args: argparse.Namespace,
    task: TrainingTask,
    model: nn.Module,
    loader: Any,
    *,
    device: torch.device,
    precision: Precision,
    label: str = "Test",
) -> dict[str, float]:
    """Return the metrics of the task's evaluator over all of ``loader``, the same on every rank.

    These are ``loss``, ``top1`` and ``top5`` (percent), or of independent labels ``loss``, ``map``, ``micro_f1``,
    ``macro_f1`` and ``sample_f1`` (percent). Padding that a distributed sampler adds is not counted. ``model`` is left
    in eval mode.
    """
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    batch_time = AverageMeter()
    last = len(loader) - 1
    model.eval()
    start = time.time()
    with torch.inference_mode(), progress_bar(last + 1, label, primary=is_primary(args)) as bar:
        for index, (images, target) in enumerate(loader):
            if not args.prefetcher:
                images = images.to(device=device, dtype=precision.model_dtype)
                target = target.to(device=device)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with precision.autocast():
                output = model(images)
            if isinstance(output, (tuple, list)):
                output = output[0]
            if args.tta > 1:  # the loader yields this many views of an image in a row
                output = output.unfold(0, args.tta, args.tta).mean(dim=2)
                target = target[:: args.tta]
            evaluator.update(output, target)
            batch_time.update(time.time() - start)
            start = time.time()
            bar.update()
            if is_primary(args) and (index == last or (bar.disable and index % args.log_interval == 0)):
                _logger.info(
                    f"{label}: [{index:>4d}/{last}]  Time: {batch_time.val:.3f} ({batch_time.avg:.3f})  "
                    f"{metrics_text(evaluator.summary())}"
                )
    metrics: dict[str, float] = evaluator.compute(distributed=args.distributed)
    if metrics.keys() != evaluator.summary().keys() and is_primary(args):  # what needs all images at once
        _logger.info(f"{label}: {metrics_text(metrics)}")
    return metrics


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Metrics for the log, ``Loss:  0.300  Acc@1:  90.000``; others by their names, ``map: 80.000``."""
    return "  ".join(_SHOWN.get(name, f"{name}: {{:.3f}}").format(value) for name, value in metrics.items())
