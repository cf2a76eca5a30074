"""Putting a checkpoint back into a run."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from timm.models import clean_state_dict
from timm.task import TrainingTask
from timm.utils import NativeScaler

from ...errors import UsageError
from ...utils.text import one_line
from ..log import is_first_process
from .resume_flags import check_same_blocks
from .resume_optimizer import restore_optimizer
from .saver import find_resume, read_checkpoint, restore_random_state

_logger = logging.getLogger(__name__)

# what loading the state of something else raises
_MISFITS = (RuntimeError, LookupError, ValueError, TypeError, AttributeError)


def open_checkpoint(args: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """Finds and reads what ``--resume`` names; ``("", None)`` when the run starts anew.

    Raises:
        UsageError: The file is missing, damaged or no checkpoint.
    """
    path = find_resume(args.resume, args.output, args.experiment)
    if not path:
        return "", None
    checkpoint = read_checkpoint(path)
    for key, is_right in _RIGHT.items():
        if checkpoint.get(key) is not None and not is_right(checkpoint[key]):
            raise UsageError(f"--resume {path}: damaged ('{key}' is not what a training run writes)")
    return path, checkpoint


def _is_history(saver: Any) -> bool:
    """Whether this is timm's ranking of checkpoints. It names files that are deleted in time: none but checkpoints."""
    if not isinstance(saver, dict):
        return False
    try:
        ranked = [*saver["checkpoint_files"], (None, saver["best_metric"]), saver["pending"]]
        names = [name for name, _ in saver["checkpoint_files"]]
        numbers = [number for _, number in ranked] + [saver["best_epoch"], saver["pending"][0]]
    except (KeyError, TypeError, ValueError):
        return False
    return all(number is None or isinstance(number, (int, float)) for number in numbers) and all(
        isinstance(name, str) and re.fullmatch(r"checkpoint-\d+\.pth\.tar", name) for name in names
    )


def _is_optimizer_state(state: Any) -> bool:
    """Whether this has the form of ``torch.optim.Optimizer.state_dict()``."""
    if not isinstance(state, dict) or not isinstance(state.get("state"), dict):
        return False
    groups = state.get("param_groups")
    return isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )


_RIGHT: dict[str, Callable[[Any], bool]] = {
    "epoch": lambda value: isinstance(value, int) and value >= 0,
    "version": lambda value: isinstance(value, int),
    "saver": _is_history,
    "optimizer": _is_optimizer_state,
    "state_dict_ema": lambda value: isinstance(value, dict),
}


def restore_training(
    args: argparse.Namespace,
    path: str,
    checkpoint: dict[str, Any],
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    scaler: NativeScaler | None,
) -> int:
    """Loads weights, the task's own state and, without ``--no-resume-opt``, optimizer and loss scaler.

    Returns:
        The epoch to go on with: the one after the checkpoint's, or the checkpoint's own if it was written in the
        middle of that epoch (a recovery checkpoint). 0 if it does not say.

    Raises:
        UsageError: The checkpoint does not fit the model, the blocks or the optimizer.
    """
    try:
        task.load_checkpoint_state(clean_state_dict(checkpoint["state_dict"]), checkpoint.get("task_state"))
    except UsageError as error:
        raise UsageError(f"--resume {path}: {error}") from error
    except _MISFITS as error:
        raise UsageError(f"--resume {path}: does not fit --model {args.model}: {one_line(error)}") from error
    module = task.get_eval_model()
    assert module is not None  # a classification task has one
    check_same_blocks(args, path, checkpoint, module)
    if not args.no_resume_opt:
        try:
            restore_optimizer(optimizer, checkpoint.get("optimizer"))
        except _MISFITS as error:
            raise UsageError(
                f"--resume {path}: its optimizer state does not fit --opt {args.opt}: {one_line(error)}; "
                "--no-resume-opt goes on with a new optimizer"
            ) from error
        if scaler is not None:
            _restore_scaler(path, checkpoint.get(scaler.state_dict_key), scaler)
    epoch = checkpoint.get("epoch")
    if epoch is None:
        return 0
    interrupted = os.path.basename(path).startswith("recovery-")
    finished = checkpoint.get("version", 1) > 1 and not interrupted
    _logger.info(f"Resumed from {path}, " + ("in the middle of" if interrupted else "after") + f" epoch {epoch}.")
    return epoch + 1 if finished else epoch


def _restore_scaler(path: str, state: Any, scaler: NativeScaler) -> None:
    if state is None:
        if is_first_process():
            _logger.warning(f"--resume {path}: was trained without a loss scaler, whose scale starts anew.")
        return
    try:
        if not all(isinstance(value, (int, float)) for value in state.values()):
            raise ValueError("values that are no numbers")
        scaler.load_state_dict(state)
    except _MISFITS as error:
        raise UsageError(
            f"--resume {path}: the state of its loss scaler cannot be used: {one_line(error)}; "
            "--no-resume-opt goes on without"
        ) from error


def restore_ema(path: str, checkpoint: dict[str, Any], task: TrainingTask) -> None:
    """Loads the averaged weights, or the plain ones where the checkpoint has no average."""
    suffix = "_ema" if checkpoint.get("state_dict_ema") is not None else ""
    if not suffix and is_first_process():
        _logger.warning(f"--resume {path}: has no averaged weights; the average starts from the plain ones.")
    try:
        task.load_checkpoint_state(
            clean_state_dict(checkpoint[f"state_dict{suffix}"]), checkpoint.get(f"task_state{suffix}"), ema=True
        )
    except _MISFITS as error:
        raise UsageError(f"--resume {path}: its averaged weights do not fit: {one_line(error)}") from error


def restore_randomness(args: argparse.Namespace, path: str, checkpoint: dict[str, Any]) -> None:
    """Put the random generators of this process back, with a warning where the checkpoint has no states for it."""
    try:
        restored = restore_random_state(checkpoint, args.rank)
    except _MISFITS as error:
        raise UsageError(f"--resume {path}: damaged ('random_states': {one_line(error)})") from error
    if not restored:
        _logger.warning(
            f"--resume {path}: has no random states for {args.world_size} process(es) on this kind of device; "
            "training goes on, but not exactly as it would have without the break."
        )
