"""``--unlabeled-dir``: images without labels that join every training batch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import ImageDataset
from torch import Tensor

from ...errors import UsageError
from ...tasks.flags import flag_text
from .folder import FolderReader, image_types, list_images
from .images import NamedImageDataset

__all__ = ["JoinedLoader", "check_unlabeled_arguments", "open_unlabeled"]


def check_unlabeled_arguments(args: argparse.Namespace) -> None:
    """Check that the other flags make use of images without labels.

    Args:
        args: Parsed flags, with the method's filled in.

    Raises:
        UsageError: Naming the flag, and what would be right.
    """
    if not args.unlabeled_dir:
        return
    flag = f"--unlabeled-dir {args.unlabeled_dir}"
    if args.method != "alfa" or args.alfa_objective != "kl":
        raise UsageError(f"{flag}: needs a loss without labels; add --alfa-objective kl (and --alfa-blocks)")
    if args.alfa_init != "uniform":
        raise UsageError(
            f"{flag}: without a label there is no direction at zero; add --alfa-init uniform and a bound, such as "
            "--alfa-eps 2%"
        )
    for name in ("mixup", "cutmix", "cutmix_minmax", "cache_images", "train_img_sizes", "aug_repeats"):
        if getattr(args, name):
            raise UsageError(f"{flag_text(name, getattr(args, name))}: does not go with --unlabeled-dir")
    if not os.path.isdir(args.unlabeled_dir):
        raise UsageError(f"{flag}: no such folder")


def open_unlabeled(args: argparse.Namespace, mode: str) -> NamedImageDataset:
    """Every image of the folder and of all folders in it.

    Args:
        args: Parsed flags.
        mode: PIL mode of the images.

    Raises:
        UsageError: There are no images, or fewer than a batch has.
    """
    images = list_images(args.unlabeled_dir, image_types(args.input_key)).images
    if len(images) < args.batch_size * args.world_size:
        raise UsageError(
            f"--unlabeled-dir {args.unlabeled_dir}: has {len(images)} images, expected at least one batch, "
            f"{args.batch_size * args.world_size} (--batch-size)"
        )
    reader = FolderReader(args.unlabeled_dir, images)
    return NamedImageDataset(ImageDataset(root=None, reader=reader, input_img_mode=mode))


class JoinedLoader:
    """Batches (images [B + U, C, H, W], target [B]): those of a training loader, and as many images without labels.

    An epoch is one of the training loader. The other starts anew with it, and again whenever it has ended, so that an
    epoch follows from the random state at its start, as in a run without unlabelled images.

    Args:
        labelled: timm's training loader; its attributes are this one's.
        unlabelled: A loader whose targets mean nothing.
    """

    def __init__(self, labelled: Any, unlabelled: Any) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if hasattr(self.unlabelled.sampler, "set_epoch"):
            self.unlabelled.sampler.set_epoch(self.labelled.sampler.epoch)
        others = self._endless()
        for images, target in self.labelled:
            yield torch.cat([images, next(others)]), target

    def _endless(self) -> Iterator[Tensor]:
        while True:
            for images, _ in self.unlabelled:
                yield images

    def __len__(self) -> int:
        return len(self.labelled)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.labelled, name)
