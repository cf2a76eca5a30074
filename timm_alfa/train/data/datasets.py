"""Datasets of a training run: timm's own, with a user's mistakes found early and said in one line."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from timm.data import ImageDataset, IterableImageDataset, MultiLabelTarget, create_dataset
from torch.utils.data import Dataset

from ...errors import UsageError
from ...utils.text import mistakes_in_one_line
from .check import check_data_arguments, data_root, dataset_kind, is_torch_folder
from .class_map import read_class_map
from .classes import check_class_count, check_parts, check_source_labels, log_size
from .digits import Digits
from .folder_sets import open_folder, open_torch_folder
from .image_modes import MODES
from .images import NamedImageDataset, TorchImages
from .split import split_training_set
from .streams import StreamedImages, check_shards
from .unlabeled_images import open_unlabeled

_logger = logging.getLogger(__name__)

__all__ = [
    "check_class_count",
    "check_data_arguments",
    "create_datasets",
    "create_evaluation_set",
    "create_test_set",
    "create_unlabeled_set",
    "default_class_count",
]


def default_class_count(args: argparse.Namespace) -> int | None:
    """What --num-classes is when it is left out: 10 for ``--dataset digits``, else None (the model's own default)."""
    return len(Digits.classes) if dataset_kind(args) == "digits" else None


def create_datasets(args: argparse.Namespace, data_config: dict[str, Any]) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Create the training dataset and, unless --val-split is empty, the validation dataset, without transforms.

    With --val-fraction the latter is a part of the training split. How many images and classes there are is logged.

    Args:
        args: Parsed flags of the dataset group, batch size, seed and epoch repeats.
        data_config: ``timm.data.resolve_data_config``'s result; ``input_size`` [C, H, W] decides between RGB and grey.

    Raises:
        UsageError: The dataset or split does not exist, is empty or has images without a class or classes without an
            image, its package is missing, or --class-map names other classes.
    """
    whole = _create_dataset(args, data_config, "--train-split", args.train_split, is_training=True)
    train, held_out = split_training_set(args, whole)
    log_size(f"--train-split {args.train_split}", whole)
    if train is not whole:
        check_parts(args, whole, train, held_out)
    if held_out is None and args.val_split:
        return train, create_evaluation_set(args, data_config, "--val-split", args.val_split)
    return train, held_out


def create_test_set(args: argparse.Namespace, data_config: dict[str, Any]) -> Dataset[Any] | None:
    """Create the dataset of --test-split, without transforms, as ``create_datasets`` does; None without the flag."""
    if not args.test_split:
        return None
    return create_evaluation_set(args, data_config, "--test-split", args.test_split)


def create_unlabeled_set(args: argparse.Namespace, data_config: dict[str, Any]) -> Dataset[Any] | None:
    """Create the dataset of --unlabeled-dir, without transforms; its targets mean nothing. None without the flag."""
    if not args.unlabeled_dir:
        return None
    dataset = open_unlabeled(args, _image_mode(args, data_config["input_size"][0]))
    _logger.info(f"--unlabeled-dir {args.unlabeled_dir}: {len(dataset):,} images without labels")
    return dataset


def create_evaluation_set(args: argparse.Namespace, data_config: dict[str, Any], flag: str, split: str) -> Dataset[Any]:
    """Create the dataset of any split, each of its images once, without transforms, as ``create_datasets`` does.

    Args:
        args: As for ``create_datasets``.
        data_config: The same.
        flag: What names the split; errors start with it.
        split: Its name.
    """
    dataset = _create_dataset(args, data_config, flag, split, is_training=False)
    log_size(f"{flag} {split}", dataset)
    return dataset


def _create_dataset(
    args: argparse.Namespace, data_config: dict[str, Any], split_flag: str, split: str, *, is_training: bool
) -> Dataset[Any]:
    mode = _image_mode(args, data_config["input_size"][0])
    where = f"{split_flag} {split}"
    kind = dataset_kind(args)
    if kind == "digits":
        return Digits(split, input_img_mode=mode)
    with mistakes_in_one_line(f"--dataset {args.dataset or 'folder'} {data_root(args) or ''} {where}"):
        if kind == "":
            return open_folder(args, where, split, mode)
        if is_torch_folder(args):
            return open_torch_folder(args, where, split, mode)
        training_only = {"seed": args.seed, "repeats": args.epoch_repeats} if is_training else {}
        class_map: Any = read_class_map(args.class_map) if args.class_map else None
        dataset: Any = create_dataset(
            args.dataset,
            root=data_root(args),
            split=split,
            is_training=is_training,
            class_map=class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            input_img_mode=mode,
            input_key=args.input_key,
            target_key=args.target_key,
            target_format=args.target_format if args.task == "multilabel" else None,
            trust_remote_code=args.dataset_trust_remote_code,
            **training_only,
        )
    if args.task == "multilabel":
        dataset.target_transform = MultiLabelTarget(args.num_classes, dense=args.target_format == "multihot")
    if isinstance(dataset, IterableImageDataset):
        dataset = StreamedImages(dataset, mode=mode, num_classes=args.num_classes, where=where)
        if kind == "wds":
            check_shards(dataset)
        return dataset
    if not isinstance(dataset, ImageDataset):
        return TorchImages(dataset, mode)
    if args.class_map and args.task != "multilabel":  # whose lists are held against the map as they are read
        check_source_labels(args.class_map, where, dataset.reader)
    return NamedImageDataset(dataset)


def _image_mode(args: argparse.Namespace, channels: int) -> str:
    mode = args.input_img_mode or ("RGB" if channels == 3 else "L")
    if mode not in MODES:
        raise UsageError(f"--input-img-mode {mode}: must be one of {', '.join(MODES)}, which have 8 bits a channel")
    if MODES[mode] != channels:
        fitting = [name for name, count in MODES.items() if count == channels]
        remedy = f"expected {' or '.join(fitting)}" if fitting else "no mode of images has as many"
        raise UsageError(
            f"--input-img-mode {mode}: gives images of {MODES[mode]} channels, the model takes {channels} "
            f"(--in-chans); {remedy}"
        )
    return mode
