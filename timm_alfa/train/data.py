"""Datasets and loaders of a training run: timm's own, with a user's mistakes found early and said in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.data import ImageDataset, create_dataset, create_loader
from torch.utils.data import Dataset

from timm_alfa.errors import UsageError
from timm_alfa.train.data_check import check_data_arguments, data_root, dataset_kind
from timm_alfa.train.digits import Digits
from timm_alfa.train.images import NamedImageDataset

__all__ = [
    "check_class_count",
    "check_data_arguments",
    "create_datasets",
    "create_loaders",
    "default_class_count",
]


def default_class_count(args: argparse.Namespace) -> int | None:
    """What --num-classes is when it is left out: 10 for `--dataset digits`, else None (the model's own default)."""
    return len(Digits.classes) if dataset_kind(args) == "digits" else None


def create_datasets(args: argparse.Namespace, data_config: dict[str, Any]) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Create the training dataset and, unless --val-split is empty, the validation dataset, without transforms.

    Args:
        args: parsed flags of the dataset group, batch size, seed and epoch repeats.
        data_config: `timm.data.resolve_data_config`'s result; `input_size` [C, H, W] decides between RGB and grey.

    Raises:
        UsageError: the dataset or split does not exist, is empty, or its package is missing.
    """
    mode = args.input_img_mode or ("RGB" if data_config["input_size"][0] == 3 else "L")
    train = _create_dataset(args, "--train-split", mode, is_training=True)
    return train, _create_dataset(args, "--val-split", mode, is_training=False) if args.val_split else None


def check_class_count(
        args: argparse.Namespace,
        dataset_train: Dataset[Any],
        dataset_eval: Dataset[Any] | None,
) -> None:
    """Check that the model has an output for every class, and that both splits number their classes alike.

    Args:
        args: parsed flags; `num_classes` is the model's number of outputs by now.

    Raises:
        UsageError: fewer outputs than classes, or splits whose classes differ (the same target would mean two things).
    """
    classes = _class_to_index(dataset_train)
    if classes.keys() == {""}:
        raise UsageError(f"--data-dir {data_root(args)}: images but no class folders, expected a folder per class")
    if classes and args.num_classes < (needed := max(classes.values()) + 1):
        raise UsageError(f"--num-classes {args.num_classes}: the training set has {needed} classes, expected {needed}")
    eval_classes = _class_to_index(dataset_eval)
    if classes and eval_classes and classes != eval_classes:
        where = dict.fromkeys(classes.keys() - eval_classes.keys(), "--train-split")
        where |= dict.fromkeys(eval_classes.keys() - classes.keys(), "--val-split")
        only = "; ".join(f"'{name}' only in {where[name]}" for name in sorted(where, key=str)[:3])
        raise UsageError(
            f"--val-split {args.val_split}: {len(eval_classes)} classes, {len(classes)} in --train-split "
            f"{args.train_split} ({only or 'numbered differently'}); expected the same, or --class-map for both"
        )


def create_loaders(
        args: argparse.Namespace,
        data_config: dict[str, Any],
        dataset_train: Any,
        dataset_eval: Any | None,
        *,
        device: torch.device,
        img_dtype: torch.dtype | None,
        collate_fn: Callable[..., Any] | None,
) -> tuple[Any, Any | None]:
    """Create the loaders with their transforms, set on the datasets, by `timm.data.create_loader`.

    Workers start anew every epoch, so that what they draw follows from the main process's random state alone and a run
    can be resumed exactly; with --use-multi-epochs-loader they persist, as in timm.

    Args:
        args: parsed flags, with `prefetcher` and `distributed` set.
        data_config: `timm.data.resolve_data_config`'s result.
        device: where batches go.
        img_dtype: dtype of the batches; None is float32.
        collate_fn: Mixup's collate for the training loader, or None.

    Returns:
        Training loader and validation loader (None without validation data).

    Raises:
        UsageError: timm refuses the augmentation or loader flags, or the training set does not fill one batch.
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
    with _one_line("augmentation and loader flags (--aa, --remode, --train-crop-mode, --train-img-sizes, ...)"):
        loader_train = create_loader(
            dataset_train,
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
            collate_fn=collate_fn,
            num_workers=args.workers,
            worker_seeding=args.worker_seeding,
            use_multi_epochs_loader=args.use_multi_epochs_loader,
            **_scheduled_size_arguments(args),
            **common,
        )
    if len(loader_train) == 0:
        raise UsageError(
            f"--batch-size {args.batch_size}: more than the training set has for one process "
            f"({len(dataset_train)} images in all), so there is no full batch"
        )
    if dataset_eval is None:
        return loader_train, None
    # more workers than shards would pad the validation set of a distributed run
    sharded = args.distributed and dataset_kind(args) in ("tfds", "wds")
    loader_eval = create_loader(
        dataset_eval,
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        num_workers=min(2, args.workers) if sharded else args.workers,
        **common,
    )
    return loader_train, loader_eval


def _create_dataset(args: argparse.Namespace, split_flag: str, mode: str, is_training: bool) -> Dataset[Any]:
    split = args.train_split if is_training else args.val_split
    if dataset_kind(args) == "digits":
        return Digits(split, input_img_mode=mode)
    training_only = {"seed": args.seed, "repeats": args.epoch_repeats} if is_training else {}
    with _one_line(f"--dataset {args.dataset or 'folder'} {data_root(args) or ''} {split_flag} {split}"):
        dataset = create_dataset(
            args.dataset,
            root=data_root(args),
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            input_img_mode=mode,
            input_key=args.input_key,
            target_key=args.target_key,
            trust_remote_code=args.dataset_trust_remote_code,
            **training_only,
        )
    return NamedImageDataset(dataset) if isinstance(dataset, ImageDataset) else dataset


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


def _class_to_index(dataset: Any) -> dict[Any, int]:
    """Class names and indices as the kinds of datasets keep them; empty where they keep none."""
    source = getattr(dataset, "reader", dataset)
    return getattr(source, "class_to_idx", None) or getattr(source, "class_name_to_idx", None) or {}


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what timm and the dataset packages raise about wrong names and values into one line that says where."""
    try:
        yield
    except UsageError:
        raise
    except (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise UsageError(f"{what.strip()}: {lines[0] if lines else type(error).__name__}") from error
