"""Checkpoints that survive a crash, and the way back from them: timm's files and bookkeeping, written safely."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver, get_state_dict
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ...errors import UsageError
from ...run_folder.checkpoint import read_checkpoint
from ...utils.files import duplicate_file, replace_file, write_file
from .random_state import gather_random_states, restore_random_state

__all__ = [
    "CheckpointError",
    "TrainCheckpointSaver",
    "find_resume",
    "gather_random_states",
    "read_checkpoint",
    "restore_random_state",
]


class CheckpointError(OSError):
    """A checkpoint could not be written. The message names the file; the checkpoints written before are intact."""


class TrainCheckpointSaver(CheckpointSaver):
    """timm's saver (same file names, ranked history, ``last``, ``model_best``, milestones, recovery) with safe writes.

    Every file is written beside its final place, forced to the disk and renamed, so ``last`` is at every moment a whole
    checkpoint. Checkpoints have two more keys: ``random_states``, with one entry per rank, and ``label_names``.

    Attributes:
        random_states: What ``gather_random_states()`` returned; the training loop sets it before it saves.
        label_names: What the outputs mean, see :func:`~timm_alfa.train.data.classes.label_names`; empty if unknown.

    Raises:
        CheckpointError: From every ``save_*`` method, when a file cannot be written (disk full, folder gone).
    """

    random_states: list[dict[str, Any]] | None = None
    label_names: list[str] | dict[int, str] | None = None

    def load_state_dict_from_checkpoint(self, checkpoint_path: str) -> bool:
        """Restore the history, and finish the ranking where a kill came after ``last`` and before the ranked files."""
        in_place = Path(checkpoint_path).resolve().parent == Path(self.checkpoint_dir).resolve()
        if in_place:
            self._keep_if_unranked(checkpoint_path, load_checkpoint_metadata(checkpoint_path).get("saver"))
        restored = bool(super().load_state_dict_from_checkpoint(checkpoint_path))
        if in_place and restored and self.best_epoch is not None:
            best = self._checkpoint_path(self.best_epoch)
            if os.path.exists(best):
                self._duplicate(best, os.path.join(self.checkpoint_dir, "model_best" + self.extension))
        return restored

    def _keep_if_unranked(self, checkpoint_path: str, state: dict[str, Any] | None) -> None:
        epoch, metric = state["pending"] if state else (None, None)
        if state is None or metric is None or os.path.exists(self._checkpoint_path(epoch)):
            return
        ranks = [rank for _, rank in state["checkpoint_files"]]
        if len(ranks) < self.max_history or ranks[-1] is None or self.cmp(metric, ranks[-1]):
            self._duplicate(checkpoint_path, self._checkpoint_path(epoch))

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        state: dict[str, Any] = {
            "epoch": epoch,
            "arch": self.args.model if self.args is not None else type(self.model).__name__.lower(),
            "version": 2,
            "optimizer": self.optimizer.state_dict(),
            "saver": self.state_dict(epoch, metric),
        }
        if self.task is not None:
            for ema in (False, True):
                state.update(self.task.get_checkpoint_state(ema=ema, unwrap_fn=self.unwrap_fn))
        else:
            state["state_dict"] = get_state_dict(self.model, self.unwrap_fn)
            if self.model_ema is not None:
                state["state_dict_ema"] = get_state_dict(self.model_ema, self.unwrap_fn)
        if self.args is not None:
            state["args"] = self.args
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        if metric is not None:
            state["metric"] = metric
        if self.random_states is not None:
            state["random_states"] = self.random_states
        if self.label_names is not None:
            state["label_names"] = self.label_names
        try:
            write_file(save_path, lambda file: torch.save(state, file))
        except (OSError, RuntimeError) as error:
            raise _checkpoint_error(save_path, error) from error

    def _replace(self, src: str, dst: str) -> None:
        try:
            replace_file(src, dst)
        except OSError as error:
            raise _checkpoint_error(dst, error) from error

    def _duplicate(self, src: str, dst: str) -> None:
        try:
            duplicate_file(src, dst)
        except OSError as error:
            raise _checkpoint_error(dst, error) from error


def find_resume(resume: str, output: str, experiment: str) -> str:
    """Turn the value of --resume into the path of a checkpoint file, or '' when there is nothing to resume.

    Args:
        resume: '' (start anew), the path of a checkpoint, or ``auto``: ``last.pth.tar`` of the experiment's folder,
            else its newest recovery checkpoint, else ''.
        output: Value of --output; '' is timm's ``./output/train``.
        experiment: Value of --experiment, which ``auto`` needs.

    Raises:
        UsageError: ``auto`` without an experiment, or no file at the path.
    """
    if not resume:
        return ""
    if resume != "auto":
        path = Path(resume)
        if path.is_dir():
            raise UsageError(f"--resume {resume}: a folder, expected a checkpoint file such as {path / 'last.pth.tar'}")
        if not path.is_file():
            raise UsageError(f"--resume {resume}: no such file, expected a checkpoint such as last.pth.tar")
        return resume
    if not experiment:
        raise UsageError("--resume auto needs --experiment NAME, the folder in which to look for last.pth.tar")
    folder = Path(output or "./output/train") / experiment
    last = folder / "last.pth.tar"
    if last.is_file():
        return str(last)
    recoveries = [
        (int(match[1]), int(match[2]), str(file))
        for file in folder.glob("recovery-*.pth.tar")
        if (match := re.fullmatch(r"recovery-(\d+)-(\d+)\.pth\.tar", file.name))
    ]
    return max(recoveries)[2] if recoveries else ""


def _checkpoint_error(path: str, error: Exception) -> CheckpointError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # torch.save hides the file's own error behind a RuntimeError
    reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
    return CheckpointError(f"cannot write checkpoint {path}: {reason}; the checkpoints written before are intact")
