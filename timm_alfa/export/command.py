"""``timm-alfa-export RUN_DIR``: a run as a folder to publish, with timm weights, ONNX and a model card."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..train.log import setup_logging
from ..utils.files import write_file
from ..utils.text import one_line
from .card import CARD_FILE, model_card
from .onnx_file import ONNX_DATA_FILE, ONNX_FILE, export_onnx, largest_difference, missing_packages
from .trained import TrainedRun, read_trained_run
from .weights import CONFIG_FILE, export_model

__all__ = ["export_run", "main"]

_logger = logging.getLogger(__name__)


def export_run(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    checkpoint: str | None = None,
    ema: bool | None = None,
    onnx: bool = True,
    license: str | None = None,
    name: str | None = None,
) -> list[Path]:
    """Write ``model.safetensors``, ``config.json``, ``model.onnx`` and ``README.md``, each replacing an older one.

    It is the layout of a model on the Hugging Face hub, and timm loads it from there or with
    ``timm.create_model("local-dir:" + output, pretrained=True)``.

    Args:
        folder: Of the run, with ``args.yaml`` and checkpoints.
        output: Where to write, ``folder/export`` if None.
        checkpoint: ``best``, ``last`` or a path; None takes the best where there is one, else the last.
        ema: Take the averaged weights; None takes them if the run averaged.
        onnx: Whether to write ``model.onnx``; without the packages for it the rest is written and a warning logged.
            One of an earlier export never stays, for it may be of other weights.
        license: Identifier for the model card, such as ``apache-2.0``.
        name: Of the model in the card; None takes the folder's.

    Returns:
        Paths of the files.

    Raises:
        UsageError: The folder is not that of a run, has no such weights, or the output cannot be written.
        RuntimeError: The model cannot be exported to ONNX; the other files are written.
    """
    folder = Path(folder)
    output = folder / "export" if output is None else Path(output)
    run = read_trained_run(folder, checkpoint, ema)
    failure: RuntimeError | None = None
    try:
        written = [
            export_model(
                run.model, output, state_dict=run.weights, data_config=run.data_config, label_names=run.label_names
            ),
            output / CONFIG_FILE,
        ]
        for stale in (ONNX_FILE, ONNX_DATA_FILE):
            (output / stale).unlink(missing_ok=True)
        if onnx:
            try:
                written += _write_onnx(run, output)
            except RuntimeError as error:
                failure = error
        has_onnx = output / ONNX_FILE in written
        card = model_card(run, name=name or folder.resolve().name, license=license, onnx=has_onnx)
        write_file(output / CARD_FILE, lambda file: file.write(card.encode()))
    except OSError as error:
        raise UsageError(f"--output {output}: cannot be written ({error.strerror or error})") from error
    if license is None:
        _logger.warning(f"{CARD_FILE} names no licence: --license ID does, such as --license apache-2.0")
    if failure is not None:
        raise failure
    return [*written, output / CARD_FILE]


def _write_onnx(run: TrainedRun, output: Path) -> list[Path]:
    missing = missing_packages()
    if missing:
        _logger.warning(f"{ONNX_FILE} is left out, it needs {' and '.join(missing)}: pip install {shlex.join(missing)}")
        return []
    size = run.data_config["input_size"]
    path = export_onnx(run.model, size, output)
    difference = largest_difference(path, run.model, size)
    if difference is not None:
        _logger.info(f"{ONNX_FILE} run by onnxruntime differs from the model by {difference:.1e} of the largest logit.")
    return [path]


def main(argv: Sequence[str] | None = None) -> None:
    """Export a run and print the files' paths.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: 2 after a user's mistake, 1 when the model cannot be exported to ONNX.
    """
    parser = argparse.ArgumentParser(
        prog="timm-alfa-export",
        description=(
            "Write the model of a training run as timm weights, ONNX and a model card, ready for the Hugging Face hub."
        ),
    )
    parser.add_argument("run", metavar="RUN_DIR", help="folder of a training run")
    parser.add_argument("--output", metavar="DIR", help="where to write (default: RUN_DIR/export)")
    parser.add_argument(
        "--checkpoint",
        metavar="best|last|PATH",
        help="which weights (default: best, or last where nothing was validated)",
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the averaged weights (default: those of a run with --model-ema)",
    )
    parser.add_argument("--onnx", action=argparse.BooleanOptionalAction, default=True, help="with model.onnx")
    parser.add_argument("--license", metavar="ID", help="licence for the model card, such as apache-2.0")
    parser.add_argument("--name", help="the model's name in the card (default: that of RUN_DIR)")
    args = parser.parse_args(argv)
    setup_logging(primary=True)
    for exporter in ("onnx_ir", "onnxscript"):
        logging.getLogger(exporter).setLevel(logging.WARNING)  # they tell every step of theirs
    try:
        paths = export_run(
            args.run,
            args.output,
            checkpoint=args.checkpoint,
            ema=args.ema,
            onnx=args.onnx,
            license=args.license,
            name=args.name,
        )
        print(*paths, sep="\n")
    except (UsageError, RuntimeError) as error:
        print(f"timm-alfa-export: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
