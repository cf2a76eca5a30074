"""Loaders of a training run: timm's own, from flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import create_loader
from timm.data.transforms import MaybePILToTensor
from torch.utils.data import IterableDataset
from torchvision.transforms import RandomCrop

from ...errors import UsageError
from ...utils.text import mistakes_in_one_line
from ..checkpoints.random_state import randomness_kept
from .cache import BatchAugmentation, CachedLoader
from .check import dataset_kind
from .streams import check_workers
from .unlabeled_images import JoinedLoader

__all__ = ["check_first_image", "create_loaders"]


def create_loaders(
    args: argparse.Namespace,
    data_config: dict[str, Any],
    dataset_train: Any,
    dataset_eval: Any | None,
    dataset_test: Any | None = None,
    dataset_unlabeled: Any | None = None,
    *,
    device: torch.device,
    img_dtype: torch.dtype | None,
    collate_fn: Callable[..., Any] | None,
) -> tuple[Any, Any | None, Any | None]:
    """Create the loaders with their transforms, set on the datasets, by ``timm.data.create_loader``.

    Workers start anew every epoch, so that what they draw follows from the main process's random state alone and a run
    can be resumed exactly; with --use-multi-epochs-loader they persist, as in timm. With --cache-images training and
    validation images are read here, once.

    Args:
        args: Parsed flags, with ``prefetcher`` and ``distributed`` set.
        data_config: ``timm.data.resolve_data_config``'s result.
        dataset_train: Training images.
        dataset_eval: Validation images, or None.
        dataset_test: Test images, or None.
        dataset_unlabeled: Images without labels that join the training batches, or None.
        device: Where batches go.
        img_dtype: Dtype of the batches; None is float32.
        collate_fn: Mixup's collate for the training loader, or None.

    Returns:
        Training, validation and test loader; None where there is no such data.

    Raises:
        UsageError: timm refuses the augmentation or loader flags, the training set does not fill one batch, or its
            images do not have the size that --crop-padding and --cache-images need.
    """
    common = {
        "input_size": data_config["input_size"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "device": device,
        "img_dtype": img_dtype or torch.float32,
        "distributed": args.distributed,
        "use_prefetcher": args.prefetcher,
        "pin_memory": args.pin_mem and device.type != "cpu",  # torch warns when there is nothing to pin for
        "persistent_workers": args.use_multi_epochs_loader,
    }
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config["interpolation"]
    padded = args.crop_padding is not None and not args.no_aug
    if padded:
        with mistakes_in_one_line("--train-split: its first image cannot be used"):
            _check_image_size(dataset_train, data_config["input_size"])
    if dataset_kind(args) == "wds":
        check_workers(
            f"--train-split {args.train_split}",
            dataset_train.reader,
            workers=args.workers,
            processes=args.world_size if args.distributed else 1,
        )
    with mistakes_in_one_line("augmentation and loader flags (--aa, --remode, --train-img-sizes, ...)"):
        create_train_loader: Callable[..., Any] = partial(
            create_loader,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            num_aug_repeats=args.aug_repeats,
            interpolation=interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            num_workers=args.workers,
            worker_seeding=args.worker_seeding,
            use_multi_epochs_loader=args.use_multi_epochs_loader,
            **_scheduled_size_arguments(args),
            **common,
        )
        loader_train = create_train_loader(dataset_train, collate_fn=collate_fn)
        if dataset_unlabeled is not None:
            loader_train = JoinedLoader(loader_train, create_train_loader(dataset_unlabeled))
    if len(loader_train) == 0:
        raise UsageError(
            f"--batch-size {args.batch_size}: more than the training set has for one process "
            f"({len(dataset_train)} images in all), so there is no full batch"
        )
    # more workers than shards would pad the validation set of a distributed run
    sharded = args.distributed and dataset_kind(args) in ("tfds", "wds")
    per_batch = args.validation_batch_size or args.batch_size
    with mistakes_in_one_line("validation transforms (--interpolation, --crop-pct, ...)"):
        loader_eval, loader_test = (
            None
            if dataset is None
            else create_loader(
                dataset,
                batch_size=per_batch,
                is_training=False,
                interpolation=data_config["interpolation"],
                crop_pct=data_config["crop_pct"],
                num_workers=min(2, args.workers) if sharded else args.workers,
                **common,
            )
            for dataset in (dataset_eval, dataset_test)
        )
    if args.tta > 1 and dataset_eval is not None and (per_batch % args.tta or len(dataset_eval) % args.tta):
        raise UsageError(f"--tta {args.tta}: must divide the validation batch size, {per_batch}, and the images")
    splits = {
        "--train-split": dataset_train,
        "--val-split": dataset_eval,
        "--test-split": dataset_test,
        "--unlabeled-dir": dataset_unlabeled,
    }
    for flag, dataset in splits.items():
        check_first_image(args, dataset, flag, data_config["input_size"][0])
    if args.cache_images:
        augment = None
        if padded:
            dataset_train.transform = MaybePILToTensor()  # the rest is done to batches
            augment = BatchAugmentation(args.crop_padding, args.hflip, args.vflip)
        loader_train = CachedLoader(loader_train, augment)
        loader_eval = None if loader_eval is None else CachedLoader(loader_eval)
    elif padded:
        # timm's first training transform is the crop
        for dataset in (dataset_train, dataset_unlabeled):
            if dataset is not None:
                dataset.transform.transforms[0] = RandomCrop(data_config["input_size"][1:], padding=args.crop_padding)
    return loader_train, loader_eval, loader_test


def _scheduled_size_arguments(args: argparse.Namespace) -> dict[str, Any]:
    progressive = args.train_size_schedule == "progressive"
    return {
        "input_size_choices": args.train_img_sizes,
        "batch_size_choices": args.train_batch_sizes,
        "batch_choice_weights": args.train_size_probs,
        "batch_choice_seed": args.seed,
        "batch_choice_schedule": args.train_size_schedule,
        "batch_schedule_epochs": args.epochs if progressive else None,
        "batch_schedule_spread": args.train_size_schedule_spread,
        "batch_schedule_random_mix": args.train_size_random_mix,
        "num_batches": args.train_batches_per_epoch,
    }


def check_first_image(args: argparse.Namespace, dataset: Any, split_flag: str, channels: int) -> None:
    """Try the transforms on one image, drawing nothing: many a value is found wrong only there.

    Raises:
        UsageError: The image cannot be read or transformed, or does not have so many channels.
    """
    if isinstance(dataset, IterableDataset) or dataset is None or args.train_img_sizes is not None:
        return
    with randomness_kept(), mistakes_in_one_line(f"{split_flag}: its first image cannot be used"):
        shape: Sequence[int] = getattr(dataset[0][0], "shape", ())
    if len(shape) == 3 and shape[0] != channels:
        raise UsageError(
            f"--input-img-mode {args.input_img_mode}: gives images of {shape[0]} channels, expected "
            f"the model's {channels} (--in-chans)"
        )


def _check_image_size(dataset: Any, input_size: Sequence[int]) -> None:
    """Look at one image: --crop-padding pads and crops, it does not resize."""
    width, height = dataset[0][0].size
    if (height, width) != tuple(input_size[1:]):
        raise UsageError(
            f"--crop-padding: the images are {height}x{width}, expected the model's input size, "
            f"{input_size[1]}x{input_size[2]} (--img-size)"
        )
