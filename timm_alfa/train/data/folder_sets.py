"""Datasets of image folders: timm's, and torchvision's, whose classes are the outermost folders."""

from __future__ import annotations

import argparse
import os
from typing import Any

from timm.data import ImageDataset, MultiLabelTarget
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from ...errors import UsageError
from ...tasks.flags import flag_text
from .check import data_root, find_split_folder
from .class_map import check_same_names, read_class_map
from .folder import FolderReader, check_listing, image_types, is_hidden, list_images
from .images import NamedImageDataset, TorchImages
from .metadata import LabelledReader, find_metadata
from .tar import TarReader

__all__ = ["VisibleImageFolder", "open_folder", "open_torch_folder"]


def open_folder(args: argparse.Namespace, where: str, split: str, mode: str) -> Dataset[Any]:
    """timm's dataset of a split's folder, or of a .tar file, without what is hidden in it.

    Args:
        args: Parsed flags.
        where: The flag that names the split, and its value; errors start with it.
        split: Name of the split.
        mode: PIL mode of the images.

    Raises:
        UsageError: There is no such folder, it has images without a class or classes without an image, or --class-map
            names other classes.
    """
    root, tell = _root(args), _tells(args)
    if args.task == "multilabel":
        return _open_labelled(args, where, _folder(where, root, split), mode)
    _refuse_keys(args, "target_key", *(["input_key"] if os.path.isfile(root) else []))
    if os.path.isfile(root):
        class_map = read_class_map(args.class_map, os.path.dirname(root)) if args.class_map else None
        reader: Any = TarReader(where, root, class_map, tell=tell)
    else:
        folder = _folder(where, root, split)
        listing = list_images(folder, image_types(args.input_key))
        check_listing(where, folder, listing, remedy="--input-key names other endings", tell=tell)
        class_map = read_class_map(args.class_map, folder) if args.class_map else None
        if class_map is not None:
            check_same_names(
                f"--class-map {args.class_map}: not the class folders of {where}",
                ("in the map", class_map),
                ("in the folder", {label for _, label in listing.images}),
            )
        reader = FolderReader(folder, listing.images, class_map)
    return NamedImageDataset(ImageDataset(root=None, reader=reader, input_img_mode=mode))


def _open_labelled(args: argparse.Namespace, where: str, folder: str, mode: str) -> Dataset[Any]:
    """Images and their labels in ``metadata.csv`` or ``metadata.jsonl``."""
    _refuse_keys(args, "input_key")
    dense = args.target_format == "multihot"
    reader = LabelledReader(
        where,
        find_metadata(where, folder),
        num_classes=args.num_classes,
        target_key=args.target_key,
        dense=dense,
        class_map=read_class_map(args.class_map, folder) if args.class_map else None,
        tell=_tells(args),
    )
    encode = MultiLabelTarget(args.num_classes, dense=dense)
    return NamedImageDataset(ImageDataset(root=None, reader=reader, input_img_mode=mode, target_transform=encode))


def open_torch_folder(args: argparse.Namespace, where: str, split: str, mode: str) -> Dataset[Any]:
    """``--dataset torch/image_folder``, as ``open_folder`` does it."""
    _refuse_keys(args, "input_key", "target_key")
    folder = _folder(where, _root(args), split)
    listing = list_images(folder, set(IMG_EXTENSIONS))
    listing.empty = [path for path in listing.empty if os.sep not in path]  # others are no classes of torchvision's
    check_listing(where, folder, listing, tell=_tells(args))
    return TorchImages(VisibleImageFolder(folder), mode)


class VisibleImageFolder(ImageFolder):
    """torchvision's dataset of a folder, without hidden files and folders.

    Args:
        folder: Holds a folder per class.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, is_valid_file=lambda path: _is_image(os.path.relpath(path, folder)))

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The visible folders, in torchvision's order."""
        names = [name for name in super().find_classes(directory)[0] if not is_hidden(name)]
        return names, {name: index for index, name in enumerate(names)}


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMG_EXTENSIONS) and not any(map(is_hidden, path.split(os.sep)))


def _refuse_keys(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name):
            raise UsageError(
                f"{flag_text(name, getattr(args, name))}: has no effect with "
                f"{args.dataset or 'images in'} {data_root(args)}"
            )


def _root(args: argparse.Namespace) -> str:
    root = data_root(args)
    if root is None:
        raise UsageError("--data-dir is missing, expected a folder of images")
    return root


def _folder(where: str, root: str, split: str) -> str:
    folder = find_split_folder(root, split)
    if folder is None:
        raise UsageError(f"{where}: no such folder in {root}")
    return folder


def _tells(args: argparse.Namespace) -> bool:
    """Whether this process gives warnings, of several that see the same files."""
    return getattr(args, "rank", 0) == 0
