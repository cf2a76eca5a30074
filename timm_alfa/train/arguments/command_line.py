"""The whole command line: timm's flags, a few of timm 1.0.31's newer ones, and ALFA's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ...robust import evaluation as robust
from ...tasks import registry
from ...tasks.flags import add_flags
from ..data.unlabeled_images import check_unlabeled_arguments
from ..device import check_device
from . import data_flags as flags_data
from . import optim_flags as flags_optim
from . import task_flags
from .checks import check_arguments, warn_of_unused
from .config import load_config
from .parser import HelpFormatter, TrainParser, add_refused_arguments, check_refused


def build_parser() -> TrainParser:
    """Return the parser of every flag, without values from a ``--config`` file."""
    parser = TrainParser(
        prog="train_alfa.py",
        description="Train an image classifier as timm's train.py does, with adversarial feature augmentation (ALFA).",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "-c",
        "--config",
        default="",
        type=str,
        metavar="FILE",
        help="YAML file of flag names and values, which replace the defaults, or a recipe's name",
    )
    registry.add_arguments(parser)
    flags_data.add_data_arguments(parser)
    task_flags.add_task_arguments(parser)
    flags_data.add_model_arguments(parser)
    flags_data.add_device_arguments(parser)
    flags_optim.add_optimizer_arguments(parser)
    flags_optim.add_schedule_arguments(parser)
    flags_optim.add_augmentation_arguments(parser)
    flags_data.add_batchnorm_arguments(parser)
    flags_data.add_ema_arguments(parser)
    flags_data.add_run_arguments(parser)
    add_flags(parser, "Robust accuracy of the exported model, once training has ended", robust.FLAGS)
    flags_optim.add_resolution_arguments(parser)
    add_refused_arguments(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line and the ``--config`` file it names, and checks every value.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Raises:
        UsageError: A flag, value or combination that cannot be run.
        SystemExit: After ``--help``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.config:
        parser.set_defaults(**load_config(args.config, parser))
        args = parser.parse_args(argv)
    del args.config  # its values are in `args` now, and the saved configuration must not depend on the file
    if args.data and not args.data_dir:
        args.data_dir = args.data
    check_refused(args)
    task_flags.fill_task_defaults(args)
    check_arguments(args)
    task_flags.check_task_arguments(args)
    registry.check_arguments(args)
    robust.check_arguments(args)
    check_unlabeled_arguments(args)
    # no abbreviation of --device is unambiguous, so this finds it in every spelling
    given = any(item.split("=", 1)[0] == "--device" for item in argv)
    check_device(args.device, given=given, modules=args.device_modules or ())
    warn_of_unused(args)
    return args
