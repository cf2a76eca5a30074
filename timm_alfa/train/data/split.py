"""Fixed, stratified parts of a training set: held-out validation images, and a share to train on."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import numpy as np
from timm.data import MultiLabelTarget
from torch.utils.data import Dataset

from ...errors import UsageError
from .check import STREAMS, dataset_kind

__all__ = ["Part", "check_split_arguments", "class_indices", "split_indices", "split_training_set"]


class Part(Dataset[Any]):
    """Some items of a dataset, with transforms of their own.

    Args:
        dataset: Images, decoded and transformed by its attribute ``transform``; it is copied (not its images), so that
            two parts of a dataset can have different transforms.
        indices: Which items, in this order.
    """

    def __init__(self, dataset: Any, indices: np.ndarray) -> None:
        self.dataset = copy.copy(dataset)
        self.indices: list[int] = indices.tolist()

    @property
    def transform(self) -> Any:
        """What makes a tensor of an image; ``timm.data.create_loader`` sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)


def check_split_arguments(args: argparse.Namespace) -> None:
    """Check the two shares.

    Raises:
        UsageError: A share out of range, or of a dataset that has no numbered images.
    """
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        raise UsageError(f"--val-fraction {args.val_fraction}: expected a share between 0 and 1, such as 0.1")
    if args.train_fraction is not None and not 0 < args.train_fraction <= 1:
        raise UsageError(f"--train-fraction {args.train_fraction}: expected a share above 0 and up to 1, such as 0.1")
    for name in ("val_fraction", "train_fraction"):
        if getattr(args, name) is not None and dataset_kind(args) in STREAMS:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: --dataset {args.dataset} is a stream, "
                "whose images cannot be picked; name splits with --train-split and --val-split"
            )


def split_training_set(args: argparse.Namespace, dataset: Any) -> tuple[Any, Part | None]:
    """Do what --val-fraction and --train-fraction ask for.

    Args:
        args: Parsed flags; which images are picked depends on --split-seed alone, never on --seed.
        dataset: The whole training set, without transforms.

    Returns:
        The training set (``dataset`` itself where neither flag is given) and the held-out images, or None.

    Raises:
        UsageError: The dataset does not list its labels, or a part would be empty. Images of independent labels are
            picked at random, whatever their labels.
    """
    if args.val_fraction is None and args.train_fraction is None:
        return dataset, None
    classes = np.zeros(len(dataset), dtype=int) if _has_labels(dataset) else class_indices(dataset)
    if classes is None:
        flag = "--val-fraction" if args.val_fraction is not None else "--train-fraction"
        raise UsageError(
            f"{flag}: --dataset {args.dataset} does not list its labels, which a split by class needs; "
            "name splits with --train-split and --val-split"
        )
    train, held_out = split_indices(classes, args.val_fraction or 0.0, args.train_fraction or 1.0, args.split_seed)
    if args.val_fraction is not None and not len(held_out):
        raise UsageError(f"--val-fraction {args.val_fraction}: holds out none of {len(classes)} images")
    if not len(train):
        raise UsageError(f"--train-fraction {args.train_fraction}: keeps none of {len(classes)} images")
    return Part(dataset, train), Part(dataset, held_out) if args.val_fraction is not None else None


def split_indices(
    classes: np.ndarray, val_fraction: float, train_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the held-out items and those to train on, class by class.

    Args:
        classes: Class of every item, shape [N].
        val_fraction: Share of each class that is held out, rounded to the nearest number of items.
        train_fraction: Share of the rest of each class that is trained on. Of two shares with the same seed the smaller
            is a part of the larger.
        seed: What the draw depends on, and nothing else.

    Returns:
        Training items and held-out items, each increasing.
    """
    draw = np.random.RandomState(seed)  # the one generator that numpy promises never to change
    train, held_out = [], []
    for name in np.unique(classes):
        shuffled = draw.permutation(np.flatnonzero(classes == name))
        border = round(val_fraction * len(shuffled))
        rest = shuffled[border:]
        held_out.append(shuffled[:border])
        train.append(rest[: round(train_fraction * len(rest))])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))


def class_indices(dataset: Any) -> np.ndarray | None:
    """Class of every item [N] as timm's readers and torchvision's datasets list them; None where they do not.

    Nor where an item has labels in place of a class.
    """
    if _has_labels(dataset):
        return None
    if isinstance(dataset, Part):
        whole = class_indices(dataset.dataset)
        return None if whole is None else whole[dataset.indices]
    source = getattr(dataset, "reader", dataset)
    labels = getattr(source, "targets", None)  # torchvision, timm's folders of .tar files, digits
    if labels is None and hasattr(source, "samples"):  # timm's folders: (file, class)
        labels = [label for _, label in source.samples]
    if labels is None and isinstance(getattr(source, "label_key", None), str):  # Hugging Face datasets
        labels = source.dataset[source.label_key]
    classes = None if labels is None else np.asarray(labels)
    return classes if classes is not None and classes.ndim == 1 and len(classes) == len(dataset) else None


def _has_labels(dataset: Any) -> bool:
    """Whether an item has independent labels (``--task multilabel``) rather than one class."""
    source = dataset.dataset if isinstance(dataset, Part) else dataset
    return isinstance(getattr(source, "target_transform", None), MultiLabelTarget)
