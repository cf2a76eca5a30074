"""What is minimised: Mixup and CutMix, and the loss that goes with them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from timm.data import FastCollateMixup, Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, create_classification_loss
from torch import nn

from ..errors import UsageError
from ..tasks.flags import flag_name, flag_text

_logger = logging.getLogger(__name__)

_MIXING_DEFAULTS: dict[str, Any] = {
    "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "mixup_off_epoch": 0,
}  # fmt: skip


def is_mixing(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on, so that targets are distributions over classes."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def uses_bce(args: argparse.Namespace) -> bool:
    """Whether the loss is binary cross-entropy: timm takes ``--bce-loss`` only where targets are softened."""
    return args.task == "multilabel" or (args.bce_loss and (is_mixing(args) or args.smoothing > 0))


def check_objective(args: argparse.Namespace) -> None:
    """Check the flags of the loss and of mixing.

    Raises:
        UsageError: Where timm would fail: an odd batch to mix, a CutMix area or a smoothing out of range.
    """
    if is_mixing(args):
        name, sizes = _batch_sizes(args)
        odd = [size for size in sizes if size % 2]
        if odd:
            raise UsageError(f"{flag_name(name)} {odd[0]}: Mixup and CutMix need an even batch size")
    elif args.smoothing == 1:
        raise UsageError("--smoothing 1: must be below 1 without Mixup and CutMix, nothing of a label would be left")
    area = args.cutmix_minmax
    if area is not None and not (len(area) == 2 and 0 <= area[0] < area[1] <= 1):
        raise UsageError(
            f"{flag_text('cutmix_minmax', area)}: must be two shares of the image's side, the smallest and "
            "a larger one, between 0 and 1"
        )


def _batch_sizes(args: argparse.Namespace) -> tuple[str, list[int]]:
    """The sizes of the batches that are trained on, and the flag that says so."""
    if args.train_img_sizes is None or args.train_batch_sizes is None:
        return "batch_size", [args.batch_size]
    weights = args.train_size_probs or [1.0] * len(args.train_batch_sizes)
    pairs = zip(args.train_batch_sizes, weights, strict=False)  # their numbers are compared elsewhere
    return "train_batch_sizes", [size for size, weight in pairs if weight]


def unused_flags(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Flags of the loss and of mixing that are given and change nothing, as in timm, each with the reason."""
    found: list[tuple[str, str]] = []
    mixing, both = is_mixing(args), args.mixup > 0 and (args.cutmix > 0 or args.cutmix_minmax is not None)
    if args.bce_loss and args.task == "multilabel":
        found.append(("--bce-loss", "has no effect with --task multilabel, whose loss is binary cross-entropy anyway"))
    if args.bce_loss and not uses_bce(args):
        found.append(
            (
                "--bce-loss",
                (
                    "has no effect with --smoothing 0 and neither Mixup nor CutMix, as in timm's train.py: this trains "
                    "with cross-entropy; a very small --smoothing, such as 1e-6, gives binary cross-entropy"
                ),
            )
        )
    for name in ("bce_sum", "bce_target_thresh", "bce_pos_weight"):
        value = getattr(args, name)
        if value is not None and value is not False and not uses_bce(args):
            found.append((flag_text(name, value), "has no effect, the loss is not binary cross-entropy (--bce-loss)"))
    for name, default in _MIXING_DEFAULTS.items():
        value = getattr(args, name)
        if value != default and not mixing:
            found.append((flag_text(name, value), "has no effect without --mixup or --cutmix"))
        elif value != default and name == "mixup_switch_prob" and not both:
            found.append((flag_text(name, value), "has no effect unless both --mixup and --cutmix are on"))
    if args.cutmix_minmax is not None and args.cutmix not in (0, 1):
        found.append((flag_text("cutmix", args.cutmix), "has no effect with --cutmix-minmax, as in timm"))
    if mixing and args.mixup_prob == 0:
        found.append((flag_text("mixup_prob", args.mixup_prob), "no batch is mixed"))
    in_workers = not args.no_prefetcher and not args.cache_images and args.workers > 0
    if mixing and args.mixup_off_epoch and args.use_multi_epochs_loader and in_workers:
        found.append(
            (
                flag_text("mixup_off_epoch", args.mixup_off_epoch),
                ("has no effect with --use-multi-epochs-loader, as in timm: its workers, which mix, do not hear of it"),
            )
        )
    return found


def check_cut(args: argparse.Namespace, input_size: Sequence[int]) -> None:
    """Raise ``UsageError`` where no CutMix area of ``--cutmix-minmax`` fits the images in whole pixels.

    Args:
        args: Checked before.
        input_size: [C, H, W] of the model's input.
    """
    if args.cutmix_minmax is None:
        return
    least, most = args.cutmix_minmax
    for side in args.train_img_sizes or input_size[1:]:
        if int(side * least) == int(side * most):
            raise UsageError(
                f"{flag_text('cutmix_minmax', args.cutmix_minmax)}: no whole number of pixels lies "
                f"between these shares of {side}; expected shares further apart"
            )


def create_mixup(args: argparse.Namespace) -> tuple[FastCollateMixup | None, Mixup | None]:
    """Return ``(collate_fn, mixup_fn)``: mixing belongs to the loader where it collates for the prefetcher."""
    if not is_mixing(args):
        return None, None
    settings = {
        "mixup_alpha": args.mixup,
        "cutmix_alpha": args.cutmix,
        "cutmix_minmax": args.cutmix_minmax,
        "prob": args.mixup_prob,
        "switch_prob": args.mixup_switch_prob,
        "mode": args.mixup_mode,
        "label_smoothing": args.smoothing,
        "num_classes": args.num_classes,
        "multi_label": args.task == "multilabel",
    }
    if args.prefetcher and not args.cache_images:
        return FastCollateMixup(**settings), None
    return None, Mixup(**settings)


def create_criterion(args: argparse.Namespace) -> nn.Module:
    """Return the training loss; Mixup's targets are smoothed already."""
    mixing = is_mixing(args)
    if args.task == "multilabel":
        return create_classification_loss(
            multi_label=True,
            smoothing=args.smoothing,
            soft_targets=mixing,
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    if uses_bce(args):
        _warn_of_threshold(args)
        smoothing = {} if mixing else {"smoothing": args.smoothing}
        return BinaryCrossEntropy(
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
            **smoothing,
        )
    if mixing:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    return nn.CrossEntropyLoss()


def _warn_of_threshold(args: argparse.Namespace) -> None:
    """A threshold outside the targets makes all of them alike."""
    lowest = args.smoothing / args.num_classes
    highest = 1 - args.smoothing + lowest
    threshold = args.bce_target_thresh
    if threshold is not None and not lowest <= threshold < highest:
        what = "absent: no" if threshold >= highest else "present: every"
        _logger.warning(
            f"--bce-target-thresh {threshold}: trains every class as {what} target lies above it "
            f"(they lie between {lowest:.4g} and {highest:.4g})"
        )
