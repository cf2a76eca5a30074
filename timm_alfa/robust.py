"""Robust accuracy of any checkpoint: ``python -m timm_alfa.robust --initial-checkpoint FILE --model NAME``.

Takes the flags of the training command for the model, its weights, the data and the device, and attacks the validation
images with l_inf PGD. The defaults of the attack are those of the paper's section 4.3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.data import create_loader
from torch import Tensor, nn

from .attack import INITS
from .errors import UsageError
from .flags import Flag, above_zero, add_flags, at_least_zero, fill_flags, number
from .peers.pixels import PixelAttack
from .trace import evaluating
from .train.args import build_parser, parse_args
from .train.assemble import create_seeded_model
from .train.data import check_class_count, check_data_arguments, create_datasets, default_class_count
from .train.device import create_precision
from .train.log import setup_logging
from .train.model import check_forward, place_model
from .train.parser import TrainParser

FLAGS = (
    Flag("eval_pgd", 20, "steps of the attack", int, expected="a whole number of at least 1",
         valid=lambda value: value >= 1),
    Flag("eval_pgd_eps", 8.0, "largest change of a pixel, in 1/255", number, expected="at least 0",
         valid=at_least_zero),
    Flag("eval_pgd_alpha", 2.0, "step size, in 1/255", number, expected="a finite step above 0", valid=above_zero),
    Flag("eval_pgd_init", "uniform", "where the attack starts: at the image, or uniformly within eps", choices=INITS),
)


def robust_accuracy(
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        attack: PixelAttack,
        *,
        seed: int = 0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Accuracy in evaluation mode on images as they are and attacked, the attack raising the cross-entropy.

    Args:
        model: On the device of the batches; its mode, weights and gradients are left as they were.
        batches: Of normalised images [B, C, H, W] and class indices [B].
        attack: Of the images.
        seed: Of the attack's random starts.
        autocast: Makes the context of a forward.

    Returns:
        ``top1`` and ``robust_top1`` in percent, and the number of ``images``.

    Raises:
        ValueError: There are no images.
    """
    clean, robust, images = 0, 0, 0
    generator: torch.Generator | None = None
    with evaluating(model):
        for input, target in batches:
            if generator is None:
                generator = torch.Generator(input.device).manual_seed(seed)
            with torch.enable_grad(), autocast():
                perturbed = attack(model, nn.functional.cross_entropy, input, target, generator)
            with torch.no_grad(), autocast():
                clean += _correct(model(input), target)
                robust += _correct(model(perturbed), target)
            images += len(target)
    if not images:
        raise ValueError("batches: expected at least one image, found none")
    return {"top1": 100 * clean / images, "robust_top1": 100 * robust / images, "images": images}


def _correct(output: Any, target: Tensor) -> int:
    output = output[0] if isinstance(output, (tuple, list)) else output
    return int((output.argmax(dim=1) == target).sum())


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Robust accuracy for checked flags.

    Raises:
        UsageError: The model, its weights or the data cannot be had.
    """
    args.prefetcher = True
    if args.num_classes is None:
        args.num_classes = default_class_count(args)
    args.train_split = args.test_split or args.val_split  # the one that is looked at, all of it
    args.val_fraction = args.train_fraction = None
    args.val_split = args.test_split = ""
    check_data_arguments(args)
    model, data_config, device = create_seeded_model(args)
    if args.distributed:
        raise UsageError("WORLD_SIZE: robust accuracy is measured in one process; start it without torchrun")
    precision = create_precision(args, device)
    model = place_model(args, model, device, precision.model_dtype)
    check_forward(args, model, data_config["input_size"], precision)
    dataset: Any = create_datasets(args, data_config)[0]
    check_class_count(args, dataset, None)
    loader = create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        num_workers=args.workers,
        img_dtype=precision.model_dtype or torch.float32,
        device=device,
        pin_memory=False,
        persistent_workers=False,
    )
    attack = PixelAttack(
        eps=args.eval_pgd_eps, alpha=args.eval_pgd_alpha, steps=args.eval_pgd, init=args.eval_pgd_init,
        mean=tuple(data_config["mean"]), std=tuple(data_config["std"]),
    )
    result = robust_accuracy(model, loader, attack, seed=args.seed, autocast=precision.autocast)
    print(f"{attack.describe()}: clean {result['top1']:.2f}, robust {result['robust_top1']:.2f} "
          f"(top-1 in percent, {result['images']} images)")
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: 2 after a user's mistake.
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
        if not (args.initial_checkpoint or args.pretrained or args.pretrained_path):
            raise UsageError("--initial-checkpoint: name the checkpoint to evaluate, such as model_best.pth.tar")
        return evaluate(args)
    except UsageError as error:
        print(f"timm_alfa.robust: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
