"""``python -m timm_alfa.robust --initial-checkpoint FILE --model NAME``: robust accuracy of any checkpoint.

Takes the flags of the training command for the model, its weights, the data and the device, and attacks the validation
images with l_inf PGD.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError, data_problem
from ..export import CONFIG_FILE
from ..run_folder.checkpoint import read_checkpoint, recorded_label_names
from ..tasks.flags import add_flags, fill_flags
from ..train.arguments.command_line import build_parser, parse_args
from ..train.arguments.parser import TrainParser
from ..train.build import create_seeded_model
from ..train.data.classes import check_trained_classes, label_names
from ..train.data.datasets import check_class_count, check_data_arguments, create_evaluation_set, default_class_count
from ..train.data.loaders import check_first_image
from ..train.device import create_precision
from ..train.log import setup_logging
from ..train.model import check_forward, place_model
from . import evaluation
from .evaluation import describe, evaluate

FLAGS = (dataclasses.replace(evaluation.FLAGS[0], default=20), *evaluation.FLAGS[1:])  # PGD-20, as in the paper


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Robust accuracy for checked flags.

    Raises:
        UsageError: The model, its weights or the data cannot be had.
    """
    args.prefetcher = True
    if args.task == "multilabel":
        raise UsageError("--task multilabel: robust accuracy is that of one class per image")
    if args.num_classes is None:
        args.num_classes = default_class_count(args)
    flag, split = ("--test-split", args.test_split) if args.test_split else ("--val-split", args.val_split)
    if not split:
        raise UsageError("--val-split: is empty, expected the split whose images are attacked")
    args.train_split = split  # the one that is looked at, all of it
    args.val_fraction = args.train_fraction = None
    args.val_split = args.test_split = ""
    check_data_arguments(args)
    model, data_config, device = create_seeded_model(args)
    if args.distributed:
        raise UsageError("WORLD_SIZE: robust accuracy is measured in one process; start it without torchrun")
    precision = create_precision(args, device)
    model = place_model(args, model, device, precision.model_dtype)
    check_forward(args, model, data_config["input_size"], precision)
    dataset: Any = create_evaluation_set(args, data_config, flag, split)
    check_class_count(args, dataset, None)
    check_trained_classes(f"--initial-checkpoint {args.initial_checkpoint}", _trained_names(args), label_names(dataset))
    check_first_image(args, dataset, flag, data_config["input_size"][0])
    result = evaluate(
        args, model, dataset, data_config, device=device, dtype=precision.model_dtype, autocast=precision.autocast
    )
    print(describe(result))
    return result


def _trained_names(args: argparse.Namespace) -> list[str] | dict[int, str] | None:
    """What the weights say of the classes that they were trained on, in the file or, of an export, beside it."""
    path = Path(args.initial_checkpoint)
    with contextlib.suppress(UsageError, OSError, ValueError):
        if path.suffix != ".safetensors":
            return recorded_label_names(read_checkpoint(path))
        config = json.loads((path.parent / CONFIG_FILE).read_text(encoding="utf-8"))
        return recorded_label_names(config) if isinstance(config, dict) else None
    return None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: 2 after a user's mistake, 1 when images cannot be read.
    """
    setup_logging(primary=True)
    own = TrainParser(prog="python -m timm_alfa.robust", add_help=False, allow_abbrev=False)
    add_flags(own, "Robust accuracy", FLAGS)
    try:
        given, others = own.parse_known_args(sys.argv[1:] if argv is None else argv)
        if {"-h", "--help"} & set(others):
            print(own.format_help() + "\nBesides these, the training command's flags for model, data and device:\n")
            build_parser().print_help()
            sys.exit(0)
        fill_flags(given, FLAGS)
        args = parse_args(others)
        for name, value in vars(given).items():
            setattr(args, name, value)
        if args.pretrained_path:
            raise UsageError(
                f"--pretrained-path {args.pretrained_path}: timm leaves the classifier in it out; "
                "use --initial-checkpoint"
            )
        if not (args.initial_checkpoint or args.pretrained):
            raise UsageError("--initial-checkpoint: name the checkpoint to evaluate, such as model_best.pth.tar")
        return run(args)
    except UsageError as error:
        print(f"timm_alfa.robust: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except DataError as error:
        print(f"timm_alfa.robust: error: {data_problem(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
