"""Which classes the splits of a dataset have, and whether they are the same in all of them and in the model."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ...errors import UsageError
from ...tasks.flags import flag_text
from .class_map import check_same_names
from .split import Part, class_indices

__all__ = [
    "check_class_count",
    "check_parts",
    "check_source_labels",
    "check_trained_classes",
    "class_to_index",
    "label_names",
    "log_size",
]

_logger = logging.getLogger(__name__)


def check_class_count(
    args: argparse.Namespace, dataset_train: Dataset[Any], dataset_eval: Dataset[Any] | None, flag: str = "--val-split"
) -> None:
    """Check that the model has an output for every class, and that both splits have the same classes, numbered alike.

    Args:
        args: Parsed flags; ``num_classes`` is the model's number of outputs by now.
        dataset_train: The training set.
        dataset_eval: Validation or test set.
        flag: Which of the two it is.

    Raises:
        UsageError: Fewer outputs than classes, or splits whose classes differ (the same target would mean two things).
    """
    classes = class_to_index(dataset_train)
    if classes and args.num_classes < (needed := max(classes.values()) + 1):
        raise UsageError(f"--num-classes {args.num_classes}: the training set has {needed} classes, expected {needed}")
    eval_classes = class_to_index(dataset_eval)
    split = args.test_split if flag == "--test-split" else args.val_split
    if classes and eval_classes and classes != eval_classes:
        check_same_names(
            f"{flag} {split}: {len(eval_classes)} classes, {len(classes)} in --train-split {args.train_split}",
            ("in --train-split", classes),
            (f"in {flag}", eval_classes),
        )
        raise UsageError(
            f"{flag} {split}: its classes are numbered differently than those of --train-split "
            f"{args.train_split}; expected one --class-map for both"
        )
    for name, value, dataset in (("--train-split", args.train_split, dataset_train), (flag, split, dataset_eval)):
        if dataset is not None and not class_to_index(dataset):
            _check_labels(args, f"{name} {value}", dataset)


def class_to_index(dataset: Any) -> dict[Any, int]:
    """Class names and indices as the kinds of datasets keep them; empty where they keep none."""
    if isinstance(dataset, Part):
        dataset = dataset.dataset
    source = getattr(dataset, "reader", dataset)
    return getattr(source, "class_to_idx", None) or getattr(source, "class_name_to_idx", None) or {}


def _check_labels(args: argparse.Namespace, where: str, dataset: Any) -> None:
    """Look at the labels themselves, of a dataset that does not name its classes."""
    labels = class_indices(dataset)
    if labels is None or not len(labels):
        return
    if not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"{where}: a label is {labels.tolist()[0]!r}, expected the index of a class")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= args.num_classes:
        raise UsageError(
            f"{where}: has labels from {low} to {high}, --num-classes {args.num_classes} has 0 to "
            f"{args.num_classes - 1}"
        )


def label_names(dataset: Any) -> list[str] | dict[int, str]:
    """What the outputs of a model trained on a dataset mean, as timm's ``config.json`` has it.

    Returns:
        Class names in the order of their indices, or by index where some have no name; of several names of an index all
        of them. Empty where the dataset does not name its classes.
    """
    names: dict[int, str] = {}
    dataset = dataset.dataset if isinstance(dataset, Part) else dataset
    listed = getattr(getattr(dataset, "reader", dataset), "classes", None)  # torchvision's, in which names can repeat
    if listed:
        return [name if isinstance(name, str) else ", ".join(name) for name in listed]
    for name, index in class_to_index(dataset).items():
        if not isinstance(name, str):
            return []
        names[int(index)] = f"{names[index]}, {name}" if index in names else name
    if names.keys() == set(range(len(names))):
        return [names[index] for index in range(len(names))]
    return dict(sorted(names.items()))


def check_trained_classes(
    what: str, trained: list[str] | dict[int, str] | None, names: list[str] | dict[int, str]
) -> None:
    """Check that a checkpoint was trained on the classes of the data at hand, in their order, where both say.

    Args:
        what: The flag that names the checkpoint, and its value.
        trained: What the checkpoint says, see :func:`~timm_alfa.run_folder.checkpoint.recorded_label_names`.
        names: What ``label_names`` says of the data.

    Raises:
        UsageError: Their classes or the numbers of these differ, so that outputs and labels mean different things.
    """
    if not trained or not names or trained == names:
        return
    there, here = (list(found.values() if isinstance(found, dict) else found) for found in (trained, names))
    check_same_names(
        f"{what}: was trained on {len(there)} classes, the data has {len(here)}",
        ("in the checkpoint", there),
        ("in the data", here),
    )
    raise UsageError(f"{what}: numbers its classes differently than the data; expected the same --class-map")


def log_size(what: str, dataset: Any) -> None:
    """Log how many images and classes a split has.

    Args:
        what: Its flag and name.
        dataset: The split, or a part of one.
    """
    classes, names = class_indices(dataset), class_to_index(dataset)
    if classes is None:
        found = f"in {len(names):,} classes" if names else "whose classes are not listed"
        _logger.info(f"{what}: {len(dataset):,} images, {found}.")
        return
    count, known = len(np.unique(classes)), len(set(names.values()))
    of_known = f" of {known:,}" if count < known else ""
    _logger.info(f"{what}: {len(dataset):,} images in {count:,} classes{of_known}.")


def check_parts(args: argparse.Namespace, whole: Any, train: Any, held_out: Any | None) -> None:
    """Log the sizes of what --val-fraction and --train-fraction leave of a training set.

    A class without validation images is warned about.

    Raises:
        UsageError: A class has no training images left.
    """
    flags = [flag_text(name, getattr(args, name)) for name in ("val_fraction", "train_fraction")
             if getattr(args, name) is not None]  # fmt: skip
    log_size(f"{' '.join(flags)}, to train on", train)
    missing = _missing(whole, train)
    if missing:
        raise UsageError(f"{' '.join(flags)}: leaves no training images of {missing}; expected some of every class")
    if held_out is not None:
        log_size(f"{flags[0]}, held out", held_out)
        missing = _missing(whole, held_out)
        if missing:
            _logger.warning(f"{flags[0]}: holds out no images of {missing}, which have too few")


def _missing(whole: Any, part: Any) -> str:
    """Classes of a dataset that a part of it lacks, in words; '' where it lacks none."""
    all_classes, classes = class_indices(whole), class_indices(part)
    if all_classes is None or classes is None:
        return ""
    names = {index: name for name, index in class_to_index(whole).items()}
    lost = sorted(set(all_classes.tolist()) - set(classes.tolist()))
    shown = ", ".join(repr(names.get(index, index)) for index in lost[:3])
    return shown + (f" and {len(lost) - 3} more classes" if len(lost) > 3 else "") if lost else ""


def check_source_labels(class_map: str, where: str, reader: Any) -> None:
    """Hold a class map against the labels of a dataset that lists them, by name or by index.

    Args:
        class_map: The file.
        where: The flag that names the split, and its value.
        reader: timm's of a Hugging Face dataset, with the map in it.

    Raises:
        UsageError: The map has a class that the dataset lacks, or the other way round.
    """
    names = getattr(reader, "_source_names", None) or {}
    indices = set(names) or set(map(_plain, reader.dataset[reader.label_key]))
    mapped = set(reader.class_to_idx)
    by_name = names and not mapped & set(names)
    check_same_names(
        f"--class-map {class_map}: not the classes of {where}",
        ("in the map", mapped),
        ("in the dataset", names.values() if by_name else indices),
    )


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label
