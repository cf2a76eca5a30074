"""What is minimised: Mixup and CutMix, and the loss that goes with them."""

from __future__ import annotations

import argparse

from timm.data import FastCollateMixup, Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn


def is_mixing(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on, so that targets are distributions over classes."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


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
    }
    if args.prefetcher and not args.cache_images:
        return FastCollateMixup(**settings), None
    return None, Mixup(**settings)


def create_criterion(args: argparse.Namespace) -> nn.Module:
    """Return the training loss; Mixup's targets are smoothed already."""
    mixing = is_mixing(args)
    if args.bce_loss and (mixing or args.smoothing):
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
