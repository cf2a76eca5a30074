"""Datasets of a training run: timm's own, with a user's mistakes found early and said in one line."""

from __future__ import annotations

import argparse
import functools
import logging
import os
from typing import Any

from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder

from ..errors import UsageError
from .class_map import class_names, read_class_map, some
from .data_check import check_data_arguments, data_root, dataset_kind, split_folder
from .digits import Digits
from .folders import FolderReader, image_extensions, label_tar
from .images import NamedImageDataset, NamedStream, load_image
from .split import Part, split_training_set
from .text import mistakes_in_one_line

__all__ = [
    "check_class_count",
    "check_class_map",
    "check_data_arguments",
    "create_datasets",
    "create_test_set",
    "default_class_count",
    "describe_split",
    "label_names",
]

_logger = logging.getLogger(__name__)


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
    kind = dataset_kind(args)
    if kind == "digits":
        return Digits(split, input_img_mode=mode)
    what = f"{split_flag} {split}"
    class_map = read_class_map(args.class_map, data_root(args)) if args.class_map and kind else None
    if kind == "":
        return _create_folder_dataset(args, what, split, mode, is_training=split_flag == "--train-split")
    training_only = {"seed": args.seed, "repeats": args.epoch_repeats} if is_training else {}
    with mistakes_in_one_line(f"--dataset {args.dataset} {data_root(args) or ''} {what}"):
        dataset = create_dataset(
            args.dataset,
            root=data_root(args),
            split=split,
            is_training=is_training,
            class_map=class_map,  # type: ignore[arg-type]  # None is timm's default
            download=args.dataset_download,
            batch_size=args.batch_size,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            input_img_mode=mode,
            input_key=args.input_key,
            target_key=args.target_key,
            trust_remote_code=args.dataset_trust_remote_code,
            **training_only,
        )
    if isinstance(dataset, ImageDataset):
        return NamedImageDataset(dataset)
    if isinstance(dataset, IterableImageDataset):
        return NamedStream(dataset, what, outputs=args.num_classes)
    if isinstance(dataset, DatasetFolder):
        dataset.loader = functools.partial(load_image, mode=mode)
    return dataset


def _create_folder_dataset(
        args: argparse.Namespace,
        what: str,
        split: str,
        mode: str,
        *,
        is_training: bool,
) -> Dataset[Any]:
    """The dataset of a folder of class folders, or of a .tar file of them."""
    root = data_root(args)
    assert root is not None
    if os.path.isfile(root):
        class_map = read_class_map(args.class_map) if args.class_map else None
        with mistakes_in_one_line(f"--data-dir {root} {what}"):
            reader: Any = ReaderImageInTar(root)
        label_tar(reader, what, class_map=class_map, class_map_file=args.class_map)
    else:
        folder = split_folder(root, split, is_training=is_training)
        if folder is None:
            raise UsageError(f"{what}: no such folder in {root}")
        class_map = read_class_map(args.class_map, folder) if args.class_map else None
        reader = FolderReader(
            folder, what, class_map=class_map, class_map_file=args.class_map,
            extensions=image_extensions(args.input_key),
        )
    return NamedImageDataset(ImageDataset(root, reader=reader, input_img_mode=mode))


def check_class_map(args: argparse.Namespace, datasets: dict[str, Any]) -> None:
    """Check that every name of --class-map is a folder of some split, and tell which classes a split lacks.

    Args:
        args: Parsed flags.
        datasets: The splits, by flag and value; None is left out.

    Raises:
        UsageError: A name that no split has.
    """
    readers = {what: _reader(dataset) for what, dataset in datasets.items() if dataset is not None}
    present = {what: reader.present for what, reader in readers.items() if hasattr(reader, "present")}
    if not args.class_map or not present:
        return
    names = _class_to_index(next(dataset for dataset in datasets.values() if dataset is not None))
    unknown = [repr(name) for name in names if not any(name in classes for classes in present.values())]
    if unknown:
        raise UsageError(f"--class-map {args.class_map}: {some(unknown)} in no folder of {', '.join(present)}; "
                         "expected the names of class folders")
    for what, classes in present.items():
        lacking = [repr(name) for name in names if name not in classes]
        if lacking:
            _logger.warning(f"{what}: no images of {some(lacking)}, which --class-map has")


def describe_split(what: str, dataset: Any) -> str:
    """How many images and classes a split has, for the log.

    Args:
        what: The flag and its value.
        dataset: The split; a stream may not know.
    """
    classes = len(set(_class_to_index(dataset).values()))
    images = len(dataset) if hasattr(dataset, "__len__") else 0
    counted = f"{images:,} images" if images else "an unknown number of images"
    return f"{what}: {counted}" + (f", {classes:,} classes" if classes else "")


def label_names(dataset: Any, outputs: int) -> list[str] | dict[int, str] | None:
    """What the model's outputs mean, as timm's ``label_names`` has it; None where the dataset does not say.

    Args:
        dataset: The training set.
        outputs: Number of the model's outputs.
    """
    return class_names(_class_to_index(dataset), outputs)


def _class_to_index(dataset: Any) -> dict[Any, int]:
    """Class names and indices as the kinds of datasets keep them; empty where they keep none."""
    source = _reader(dataset)
    return getattr(source, "class_to_idx", None) or getattr(source, "class_name_to_idx", None) or {}


def _reader(dataset: Any) -> Any:
    """What knows the classes of a dataset, or of a part of one."""
    if isinstance(dataset, Part):
        dataset = dataset.dataset
    return getattr(dataset, "reader", dataset)
