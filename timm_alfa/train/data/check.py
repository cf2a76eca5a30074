"""Checks of the dataset flags that need no model and read no image, so that a mistake costs seconds, not minutes."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from ...errors import UsageError
from .class_map import read_class_map
from .digits import HELD_OUT_SPLITS, TRAIN_SPLITS
from .folder import image_types, is_hidden
from .metadata import METADATA_FILES, find_metadata

__all__ = ["STREAMS", "check_data_arguments", "data_root", "dataset_kind", "find_split_folder", "is_torch_folder"]

_PACKAGES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
}
_KINDS = ("torch", *_PACKAGES)
STREAMS = ("hfids", "tfds", "wds")  # kinds that are read in order, their images have no numbers
_TWO_PARTS = (
    "digits",
    *(f"torch/{name}" for name in ("cifar10", "cifar100", "mnist", "kmnist", "qmnist", "fashion_mnist")),
)
# names that timm takes for one another when it looks for the folder of a split
_SYNONYMS = (TRAIN_SPLITS, ("val", "valid", "validation", "eval", "evaluation"))


def dataset_kind(args: argparse.Namespace) -> str:
    """What --dataset names: ``digits``, ``torch``, ``hfds``, ``hfids``, ``tfds``, ``wds``, or '' for folders."""
    prefix, slash, _ = args.dataset.partition("/")
    return prefix.lower() if prefix and slash else args.dataset


def data_root(args: argparse.Namespace) -> str | None:
    """The folder of --data-dir, or of timm's deprecated positional argument."""
    return args.data_dir or args.data or None


def is_torch_folder(args: argparse.Namespace) -> bool:
    """Whether --dataset is torchvision's reader of image folders."""
    return args.dataset.lower() in ("torch/image_folder", "torch/folder")


def check_data_arguments(args: argparse.Namespace) -> None:
    """Check what can be checked of the dataset flags before a model is built.

    Raises:
        UsageError: Unknown kind of dataset, its package is not installed, --data-dir is missing or has no images, a
            split has no folder in it, --test-split is what is trained or validated on, --class-map cannot be read or
            has no effect, or the images have one class each where --task multilabel asks for labels.
    """
    kind = dataset_kind(args)
    if args.task == "multilabel" and kind in ("digits", "torch"):
        raise UsageError(
            f"--dataset {args.dataset}: its images have one class each; --task multilabel takes hfds/, hfids/, tfds/, "
            f"wds/, or a folder with {' or '.join(METADATA_FILES)} in every split"
        )
    if args.val_fraction is not None and args.val_split not in ("", "validation"):  # the default
        raise UsageError(
            f"--val-split {args.val_split}: has no effect with --val-fraction; leave one of the two out "
            "(--test-split names images for the final test)"
        )
    for flag, split in _splits(args).items():
        if args.test_split and flag != "--test-split" and _same_images(args, split, args.test_split):
            raise UsageError(
                f"--test-split {args.test_split}: the same images as {flag} {split}; expected others, "
                "or --val-fraction to validate on a part of the training images"
            )
    if args.class_map and kind in ("digits", "torch"):
        raise UsageError(f"--class-map {args.class_map}: has no effect with --dataset {args.dataset}")
    if kind == "digits":
        _check_digits(args)
    elif kind == "":
        _check_folder(args)
    elif kind not in _KINDS or "/" not in args.dataset:
        names = ", ".join(f"{name}/NAME" for name in _KINDS)
        raise UsageError(f"--dataset {args.dataset}: unknown kind, expected digits, {names}, or none for a folder")
    elif kind in _PACKAGES:
        module, package = _PACKAGES[kind]
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"--dataset {args.dataset} needs the package {package}: pip install {package}")
    if kind in ("torch", "wds") and data_root(args) is None:
        raise UsageError(f"--data-dir is missing, expected the folder of --dataset {args.dataset}")
    if is_torch_folder(args):
        _check_folder(args)
    if args.class_map and kind in _PACKAGES:
        read_class_map(args.class_map)


def _check_digits(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError('--dataset digits needs scikit-learn: pip install "timm-alfa[digits]"')
    for flag, split in _splits(args).items():
        known = TRAIN_SPLITS + HELD_OUT_SPLITS
        if split not in known:
            raise UsageError(f"{flag} {split}: --dataset digits has no such split, expected one of {', '.join(known)}")


def _splits(args: argparse.Namespace) -> dict[str, str]:
    """The splits that are read, by flag."""
    splits = {"--train-split": args.train_split}
    if args.val_split and args.val_fraction is None:
        splits["--val-split"] = args.val_split
    if args.test_split:
        splits["--test-split"] = args.test_split
    return splits


def _same_images(args: argparse.Namespace, split: str, other: str) -> bool:
    """Whether two names of splits are known to mean the same images."""
    if split == other or any(split in names and other in names for names in _SYNONYMS):
        return True
    return args.dataset.lower() in _TWO_PARTS and split not in TRAIN_SPLITS and other not in TRAIN_SPLITS


def _check_folder(args: argparse.Namespace) -> None:
    root = data_root(args)
    if root is None:
        raise UsageError("--data-dir is missing, expected a folder of images (or --dataset digits, which needs none)")
    if not os.path.exists(root):
        raise UsageError(f"--data-dir {root}: no such folder, expected one with a folder of images per split and class")
    if os.path.isfile(root):
        _check_tar(args, root)
        return
    if not args.train_split:
        raise UsageError(f"--train-split: is empty, expected one of {_subfolders(root)}")
    splits = _splits(args)
    folders = {flag: find_split_folder(root, split) for flag, split in splits.items()}
    extensions = set(IMG_EXTENSIONS) if is_torch_folder(args) else image_types(args.input_key)
    for flag, folder in folders.items():
        if folder is None:
            empty = " (or '' to train without validation)" if flag == "--val-split" else ""
            raise UsageError(
                f"{flag} {splits[flag]}: no such folder in {root}, expected one of {_subfolders(root)}{empty}"
            )
        if not _has_image(folder, extensions):
            suffixes = ", ".join(sorted(extensions)[:6])
            raise UsageError(f"--data-dir {root}: no images in {folder}, expected files such as {suffixes}")
        if args.task == "multilabel":
            find_metadata(f"{flag} {splits[flag]}", folder)
        if args.class_map:
            read_class_map(args.class_map, folder)


def _check_tar(args: argparse.Namespace, root: str) -> None:
    if args.task == "multilabel":
        raise UsageError(
            f"--data-dir {root}: a file, --task multilabel expects a folder, or --dataset wds/ for .tar files"
        )
    if Path(root).suffix.lower() != ".tar" or is_torch_folder(args):
        raise UsageError(
            f"--data-dir {root}: a file, expected a folder of images"
            + ("" if is_torch_folder(args) else " or a .tar file")
        )
    for flag, split in _splits(args).items():
        if flag != "--train-split":
            remedy = ", --val-fraction, or '' to train without validation" if flag == "--val-split" else ""
            raise UsageError(
                f"{flag} {split}: --data-dir {root} has no splits, these would be the images that are "
                f"trained on; expected a folder of splits{remedy}"
            )
    if args.class_map:
        read_class_map(args.class_map, os.path.dirname(root))


def find_split_folder(root: str, split: str) -> str | None:
    """The folder that timm takes for a split, which is ``root`` for training images in a folder without splits.

    None where there is none, and timm would take all splits together.
    """
    folder = _split_folder(root, split)
    split_names = {name for group in _SYNONYMS for name in group} | {"test"}
    if folder is None and split in TRAIN_SPLITS and split_names.isdisjoint(os.listdir(root)):
        return root  # as in timm: a folder of classes without splits is the training set
    return folder


def _split_folder(root: str, split: str) -> str | None:
    """The folder that timm takes for the split; None where it would take ``root`` itself, all splits together."""
    name = split.split("[")[0]
    names = (name, *next((group for group in _SYNONYMS if name in group), ()))
    return next((path for path in (os.path.join(root, n) for n in names) if os.path.exists(path)), None)


def _has_image(folder: str, extensions: set[str]) -> bool:
    for _, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        if any(os.path.splitext(name)[1].lower() in extensions and not is_hidden(name) for name in files):
            return True
    return False


def _subfolders(root: str) -> str:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "its folders (it has none)"
