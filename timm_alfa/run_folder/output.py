"""The folder of a run, and what is recorded in it besides checkpoints."""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from timm import utils
from timm.models import safe_model_name

from ..errors import UsageError
from .records import ENVIRONMENT_FILE

_logger = logging.getLogger(__name__)

DEFAULT_OUTPUT = "./output/train"


def snapshot(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags as they are now, to be saved later: set-up adds to and changes the namespace."""
    return copy.deepcopy(vars(args))


def open_output(
    args: argparse.Namespace, config: dict[str, Any], environment: dict[str, Any], *, side: int, resume_path: str
) -> Path:
    """Create (or, when resuming, reopen) the run's folder and write ``args.yaml``, ``environment.yaml`` into it.

    A folder that already holds another run is left alone: the new run's folder gets ``-1``, ``-2``, ... appended.

    Args:
        args: Flags.
        config: What ``snapshot`` returned, for ``args.yaml``.
        environment: What :func:`~timm_alfa.run_folder.environment.describe_run` returned.
        side: Input width, for the name of an unnamed run.
        resume_path: The checkpoint that this run continues, or ''.

    Raises:
        UsageError: The folder cannot be written.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = args.experiment or f"{stamp}-{safe_model_name(args.model)}-{side}"
    folder = wanted = Path(args.output or DEFAULT_OUTPUT, name)
    continued = args.resume == "auto" or (resume_path and folder.resolve() == Path(resume_path).resolve().parent)
    try:
        numbers = itertools.count(1)
        while not continued and _holds_run(folder):
            folder = wanted.with_name(f"{wanted.name}-{next(numbers)}")
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "args.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(config, file, default_flow_style=False)
        with open(folder / ENVIRONMENT_FILE, "w", encoding="utf-8") as file:
            yaml.safe_dump(environment, file, sort_keys=False)
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written ({error.strerror or error})") from error
    if folder != wanted:
        _logger.warning(f"{wanted} holds a run already: this one goes to {folder} (--resume auto would continue it).")
    return folder


def _holds_run(folder: Path) -> bool:
    """Whether a run has left anything in ``folder`` that another would overwrite."""
    names = (entry.name for entry in folder.iterdir()) if folder.exists() else ()
    return any(name in ("args.yaml", "summary.csv") or name.endswith((".pth.tar", ".safetensors")) for name in names)


def read_record(path: Path) -> dict[str, Any]:
    """What an earlier session left in a JSON file; empty if it left nothing that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class MetricLog:
    """Records each epoch's metrics in ``summary.csv`` and, if asked for, TensorBoard and Weights & Biases."""

    def __init__(self, args: argparse.Namespace, folder: Path, config: dict[str, Any], start_epoch: int) -> None:
        """Open the log; rows of a previous run at or after ``start_epoch`` are dropped from ``summary.csv``."""
        self._summary = folder / "summary.csv"
        utils.trim_summary(str(self._summary), start_epoch)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if args.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder), purge_step=start_epoch)
        if args.log_wandb:
            import wandb

            self._wandb = wandb.init(
                project=args.wandb_project,
                name=folder.name,
                config=config,
                tags=args.wandb_tags,
                resume="must" if args.wandb_resume_id else None,
                id=args.wandb_resume_id or None,
            )

    def write(
        self,
        epoch: int,
        train_metrics: Mapping[str, float],
        eval_metrics: Mapping[str, float] | None,
        learning_rate: float,
    ) -> None:
        """Appends one epoch. A resumed run keeps the columns that its ``summary.csv`` has."""
        row: dict[str, float] = {"epoch": epoch}
        row |= {f"train_{name}": value for name, value in train_metrics.items()}
        row |= {f"eval_{name}": value for name, value in (eval_metrics or {}).items()}
        row["lr"] = learning_rate
        columns = self._columns()
        with open(self._summary, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns or list(row), restval="", extrasaction="ignore", lineterminator="\n")
            if columns is None:
                writer.writeheader()
            writer.writerow(row)
        if self._wandb is not None:
            self._wandb.log(row)
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "epoch":
                    self._tensorboard.add_scalar(name.replace("_", "/", 1), value, epoch)
            self._tensorboard.flush()

    def _columns(self) -> list[str] | None:
        """Return the header of an existing ``summary.csv``, or None."""
        try:
            with open(self._summary, newline="", encoding="utf-8") as file:
                return next(csv.reader(file), None)
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Flushes and closes what is open."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
