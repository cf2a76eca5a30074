"""A finished run as its folder tells it: which model, which weights, and how accurate they were."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..run_folder.checkpoint import read_checkpoint, recorded_label_names
from ..run_folder.records import read_run
from ..train.arguments.command_line import build_parser
from ..train.arguments.config import load_config
from ..train.data.datasets import default_class_count
from ..train.final_test import TEST_FILE
from ..train.model import build_model, resolve_preprocessing
from .weights import plain_weights

__all__ = ["BEST", "TrainedRun", "read_trained_run"]

BEST, LAST = "model_best.pth.tar", "last.pth.tar"


@dataclass(frozen=True)
class TrainedRun:
    """One set of weights of a run.

    Args:
        args: The run's flags, as its ``args.yaml`` holds them; what that leaves out has its default.
        model: The architecture with the weights, on the CPU, in evaluation mode.
        weights: The checkpoint's tensors by the model's names, in the type in which they were trained.
        data_config: timm's preprocessing (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ...).
        source: Name of the checkpoint file.
        averaged: Whether the weights are the averaged ones (EMA).
        epoch: Number of finished epochs, from 1.
        metrics: What ``summary.csv`` says of these very weights in that epoch; empty where it says nothing.
        test: What ``test.json`` says of these very weights; empty where it says nothing.
        environment: The run's hardware and versions, as far as it recorded them.
        label_names: What the outputs mean, in order or by index; None where the checkpoint does not say.
    """

    args: argparse.Namespace
    model: nn.Module
    weights: dict[str, torch.Tensor]
    data_config: dict[str, Any]
    source: str
    averaged: bool
    epoch: int
    metrics: dict[str, float]
    test: dict[str, Any]
    environment: dict[str, Any]
    label_names: list[str] | dict[int, str] | None


def read_trained_run(folder: Path, checkpoint: str | None = None, ema: bool | None = None) -> TrainedRun:
    """Read the folder of a training run. Nothing is written, downloaded or, but for timm's models, executed.

    Args:
        folder: Holds ``args.yaml`` and checkpoints; written by this package's training command or by timm's.
        checkpoint: ``best``, ``last``, or the path of a checkpoint; None takes the best where there is one, else the
            last, as the training command's own export does.
        ema: Whether to take the averaged weights; None takes them if the run averaged.

    Raises:
        UsageError: Not the folder of a run, no such checkpoint, a damaged file, or weights that do not fit the model.
    """
    if not (folder / "args.yaml").is_file():
        raise UsageError(f"RUN_DIR {folder}: no args.yaml in it, expected the folder of a training run")
    parser = build_parser()
    parser.set_defaults(**load_config(str(folder / "args.yaml"), parser, flag="RUN_DIR"))
    args = parser.parse_args([])
    path = _find_checkpoint(folder, checkpoint)
    content = read_checkpoint(path, flag="--checkpoint")
    averaged = args.model_ema if ema is None else ema
    key = "state_dict_ema" if averaged else "state_dict"
    if content.get(key) is None:
        raise UsageError(f"--ema: {path} has no averaged weights, expected a run with --model-ema; use --no-ema")
    model = _build(args)
    try:
        weights = plain_weights(content[key], model)
    except ValueError as error:
        raise UsageError(f"--checkpoint {path}: not of the model in args.yaml, {args.model}: {error}") from error
    model.load_state_dict(weights)
    index = int(content.get("epoch", -1))
    record = read_run(folder) if (folder / "summary.csv").is_file() else None
    metrics: dict[str, float] = {}
    # the run measured one of the two, and a checkpoint in the middle of an epoch not at all
    if record is not None and "metric" in content and averaged == (args.model_ema and not args.model_ema_force_cpu):
        metrics = next((row for row in reversed(record.epochs) if row["epoch"] == index), {})
    test = _read_test(folder)
    return TrainedRun(
        args=args,
        model=model.eval(),
        weights=weights,
        data_config=resolve_preprocessing(args, model),
        source=path.name,
        averaged=averaged,
        epoch=index + 1,
        metrics=metrics,
        test=test if (test.get("epoch"), args.model_ema) == (index, averaged) else {},
        environment={} if record is None else record.environment,
        label_names=recorded_label_names(content),
    )


def _find_checkpoint(folder: Path, wanted: str | None) -> Path:
    if wanted is None:
        for name in (BEST, LAST):
            if (folder / name).is_file():
                return folder / name
        raise UsageError(f"RUN_DIR {folder}: neither {BEST} nor {LAST} in it, expected a run with a finished epoch")
    named = {"best": folder / BEST, "last": folder / LAST}
    return named.get(wanted, Path(wanted))


def _build(args: argparse.Namespace) -> nn.Module:
    """The architecture alone: weights come from the checkpoint, so none are looked for elsewhere."""
    plain = argparse.Namespace(
        **vars(args)
        | {
            "pretrained": False,
            "pretrained_path": "",
            "initial_checkpoint": "",
            "grad_checkpointing": False,
            "head_init_scale": None,
            "head_init_bias": None,
        }
    )
    if plain.num_classes is None:
        plain.num_classes = default_class_count(plain)
    return build_model(plain)


def _read_test(folder: Path) -> dict[str, Any]:
    path = folder / TEST_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"RUN_DIR {path}: cannot be read ({error})") from error
