"""Datasets of a training run: timm's own, with a user's mistakes found early and said in one line."""

from __future__ import annotations

import argparse
from typing import Any

from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset

from ..errors import UsageError
from .data_check import check_data_arguments, data_root, dataset_kind
from .digits import Digits
from .images import NamedImageDataset
from .split import Part, split_training_set
from .text import mistakes_in_one_line

__all__ = [
    "check_class_count",
    "check_data_arguments",
    "create_datasets",
    "create_test_set",
    "default_class_count",
]


def default_class_count(args: argparse.Namespace) -> int | None:
    """What --num-classes is when it is left out: 10 for ``--dataset digits``, else None (the model's own default)."""
    return len(Digits.classes) if dataset_kind(args) == "digits" else None


def create_datasets(args: argparse.Namespace, data_config: dict[str, Any]) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Create the training dataset and, unless --val-split is empty, the validation dataset, without transforms.

    With --val-fraction the latter is a part of the training split.

    Args:
        args: Parsed flags of the dataset group, batch size, seed and epoch repeats.
        data_config: ``timm.data.resolve_data_config``'s result; ``input_size`` [C, H, W] decides between RGB and grey.

    Raises:
        UsageError: The dataset or split does not exist, is empty, or its package is missing.
    """
    whole = _create_dataset(args, data_config, "--train-split", args.train_split, is_training=True)
    train, held_out = split_training_set(args, whole)
    if held_out is None and args.val_split:
        return train, _create_dataset(args, data_config, "--val-split", args.val_split, is_training=False)
    return train, held_out


def create_test_set(args: argparse.Namespace, data_config: dict[str, Any]) -> Dataset[Any] | None:
    """Create the dataset of --test-split as ``create_datasets`` does; None without the flag."""
    if not args.test_split:
        return None
    return _create_dataset(args, data_config, "--test-split", args.test_split, is_training=False)


def check_class_count(
        args: argparse.Namespace,
        dataset_train: Dataset[Any],
        dataset_eval: Dataset[Any] | None,
        flag: str = "--val-split",
) -> None:
    """Check that the model has an output for every class, and that both splits number their classes alike.

    Args:
        args: Parsed flags; ``num_classes`` is the model's number of outputs by now.
        dataset_train: The training set.
        dataset_eval: Validation or test set.
        flag: Which of the two it is.

    Raises:
        UsageError: Fewer outputs than classes, or splits whose classes differ (the same target would mean two things).
    """
    classes = _class_to_index(dataset_train)
    if classes.keys() == {""}:
        raise UsageError(f"--data-dir {data_root(args)}: images but no class folders, expected a folder per class")
    if classes and args.num_classes < (needed := max(classes.values()) + 1):
        raise UsageError(f"--num-classes {args.num_classes}: the training set has {needed} classes, expected {needed}")
    eval_classes = _class_to_index(dataset_eval)
    if classes and eval_classes and classes != eval_classes:
        where = dict.fromkeys(classes.keys() - eval_classes.keys(), "--train-split")
        where |= dict.fromkeys(eval_classes.keys() - classes.keys(), flag)
        only = "; ".join(f"'{name}' only in {where[name]}" for name in sorted(where, key=str)[:3])
        split = args.test_split if flag == "--test-split" else args.val_split
        raise UsageError(
            f"{flag} {split}: {len(eval_classes)} classes, {len(classes)} in --train-split "
            f"{args.train_split} ({only or 'numbered differently'}); expected the same, or --class-map for both"
        )


def _create_dataset(
        args: argparse.Namespace,
        data_config: dict[str, Any],
        split_flag: str,
        split: str,
        *,
        is_training: bool,
) -> Dataset[Any]:
    mode = args.input_img_mode or ("RGB" if data_config["input_size"][0] == 3 else "L")
    if dataset_kind(args) == "digits":
        return Digits(split, input_img_mode=mode)
    training_only = {"seed": args.seed, "repeats": args.epoch_repeats} if is_training else {}
    with mistakes_in_one_line(f"--dataset {args.dataset or 'folder'} {data_root(args) or ''} {split_flag} {split}"):
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


def _class_to_index(dataset: Any) -> dict[Any, int]:
    """Class names and indices as the kinds of datasets keep them; empty where they keep none."""
    if isinstance(dataset, Part):
        dataset = dataset.dataset
    source = getattr(dataset, "reader", dataset)
    return getattr(source, "class_to_idx", None) or getattr(source, "class_name_to_idx", None) or {}
