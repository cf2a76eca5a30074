"""What the lines that :mod:`timm_alfa.patch` inserts call: ALFA inside timm's own ``train.py``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

from timm.task import ClassificationTask, MultiLabelClassificationTask, TrainingTask
from torch import nn

from .errors import UsageError
from .tasks import registry
from .tasks.distillation import DISTILLATION_TASKS
from .tasks.flags import spell_flags
from .train.loop import ReportingTask

__all__ = ["add_arguments", "check_arguments", "epoch_metrics", "wrap_task"]

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--method`` and the ``--alfa-*`` flags to ``parser``, without those that only ``train_alfa.py`` acts on."""
    registry.add_arguments(parser, previews=False)


def check_arguments(args: argparse.Namespace) -> None:
    """Check the flags and fill in their defaults; a mistake ends the program with one line and exit code 2.

    Args:
        args: What the parser returned. Values may also come from a ``--config`` file, which timm hands to the parser
            as they are: they are held to what the command line would take.
    """
    try:
        _parse_again(args)
        registry.check_arguments(args)
        if args.method != "standard":
            _refuse_conflicts(args)
    except UsageError as error:
        _fail(error)


def wrap_task(
    args: argparse.Namespace, task: TrainingTask, data_config: Mapping[str, Any] | None = None
) -> TrainingTask:
    """The task to train with, in place of the one that the script created.

    Args:
        args: After :func:`check_arguments`.
        task: timm's for one class, for independent labels or for distillation, just created: not compiled, not
            distributed, without EMA.
        data_config: From ``timm.data.resolve_data_config``; with its ``input_size`` [C, H, W] blocks are tried out.

    Returns:
        ``task`` itself for ``--method standard``, else the method's, with the model and criterion of ``task``.
    """
    if args.method == "standard":
        return task
    input_size = None
    if data_config is not None and not getattr(args, "naflex_loader", False):  # whose batches are not [B, C, H, W]
        input_size = tuple(data_config["input_size"])
    model = task.get_trainable_module()
    assert model is not None  # a classification task has one
    try:
        if type(task) not in (ClassificationTask, MultiLabelClassificationTask, *DISTILLATION_TASKS):
            raise UsageError(
                f"--method {args.method}: needs one of timm's tasks for classification, independent labels or "
                f"distillation, not {type(task).__name__}"
            )
        wrapped = registry.create_task(
            args,
            model,
            cast(nn.Module, task.criterion),
            device=task.device,
            dtype=task.dtype,
            verbose=task.verbose,
            input_size=input_size,
            threshold=task.threshold if isinstance(task, MultiLabelClassificationTask) else None,
            teaching=task if isinstance(task, DISTILLATION_TASKS) else None,
        )
    except UsageError as error:
        _fail(error)
    if task.verbose and input_size is not None and isinstance(wrapped, ReportingTask):
        for line in wrapped.summary_lines(input_size):
            _logger.info(line)
    return wrapped


def epoch_metrics(args: argparse.Namespace, task: TrainingTask, folder: str | None) -> dict[str, float]:
    """The method's metrics of an epoch, for its summary; eta of every step goes to ``eta.csv`` in ``folder``.

    Args:
        args: After :func:`check_arguments`.
        task: From :func:`wrap_task`.
        folder: Of the run; None on all ranks but the first. Every rank has to call.
    """
    if args.method == "standard" or not isinstance(task, ReportingTask):
        return {}
    task.write_history(None if folder is None else Path(folder))
    return task.epoch_metrics()


def _parse_again(args: argparse.Namespace) -> None:
    """Spell our flags' values as a command line would, and parse that: wrong types and choices come out."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_arguments(parser)
    try:
        parsed, rest = parser.parse_known_args(spell_flags(parser, args))
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from None
    if rest:
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}")
    vars(args).update(vars(parsed))


def _refuse_conflicts(args: argparse.Namespace) -> None:
    if getattr(args, "torchscript", None):
        raise UsageError(
            f"--torchscript: does not go with --method {args.method}; a scripted model's blocks cannot be reached"
        )


def _fail(error: UsageError) -> NoReturn:
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(2)
