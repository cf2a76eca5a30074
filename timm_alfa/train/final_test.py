"""``--test-split``: the checkpoint that validation chose, evaluated once on other images when training is complete."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from timm import utils
from timm.models import clean_state_dict
from torch import nn

from ..run_folder.checkpoint import read_checkpoint
from ..utils.files import write_file
from .evaluate import validate
from .loop import Training

_logger = logging.getLogger(__name__)

TEST_FILE = "test.json"


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that validation chose, the last one where nothing was validated, None where there is none."""
    paths = (folder / f"{name}.pth.tar" for name in ("model_best", "last"))
    return next((path for path in paths if path.exists()), None)


def test_best_checkpoint(run: Training, model: nn.Module, loader: Any, folder: Path | None) -> dict[str, Any]:
    """Evaluates the best checkpoint of a run and writes ``test.json``; every rank calls it.

    Args:
        run: The parts of the run.
        model: Gets the checkpoint's weights (the averaged ones with ``--model-ema``), so training must be over.
        loader: Of ``--test-split``.
        folder: Of the run; the primary rank's counts.

    Returns:
        ``split``, ``checkpoint``, ``epoch`` and ``validation`` (its metric there), then what :func:`validate` returns
        of the test split. Only the primary rank's knows where the checkpoint is from.
    """
    args = run.args
    result: dict[str, Any] = {"split": args.test_split}
    weights: list[Any] = [None]
    if utils.is_primary(args):
        path = best_checkpoint(folder) if folder is not None else None
        assert path is not None  # the last epoch was saved
        checkpoint = read_checkpoint(path, flag="checkpoint")
        result |= {"checkpoint": path.name, "epoch": checkpoint["epoch"], "validation": checkpoint.get("metric")}
        weights = [clean_state_dict(checkpoint["state_dict_ema" if args.model_ema else "state_dict"])]
    if args.distributed:
        dist.broadcast_object_list(weights, src=0)
    utils.unwrap_model(model).load_state_dict(weights[0])
    label = f"Test split '{args.test_split}'"
    metrics = validate(args, run.task, model, loader, device=run.device, precision=run.precision, label=label)
    result |= metrics
    if utils.is_primary(args) and folder is not None:
        write_file(folder / TEST_FILE, lambda file: file.write((json.dumps(result, indent=4) + "\n").encode()))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name != "loss")
        _logger.info(
            f"*** {label}: {shown}, loss {metrics['loss']:.4f} ({result['checkpoint']}, epoch {result['epoch']})"
        )
    return result
