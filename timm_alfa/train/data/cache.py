"""``--cache-images``: decoded images kept in memory, and augmentation of whole batches on the device.

At 32x32 pixels decoding and transforming image by image takes longer than a training step. Here every image is decoded
once, by the ordinary dataset, and a batch costs a few operations on one tensor.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from ...errors import UsageError
from ...tasks.flags import flag_name, flag_text
from .check import STREAMS, dataset_kind

__all__ = ["BatchAugmentation", "CachedLoader", "check_cache_arguments", "read_images"]

_logger = logging.getLogger(__name__)

READ_BATCH = 256


class BatchAugmentation:
    """Random crops of padded images, and random flips, drawn for each image of a batch.

    The distribution is that of torchvision's ``RandomCrop(size, padding=padding)``, ``RandomHorizontalFlip(hflip)`` and
    ``RandomVerticalFlip(vflip)``. Draws come from torch's generator of the CPU, whatever the device is.

    Args:
        padding: Zero pixels around the image before the crop of the image's size; 0 for no crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
    """

    def __init__(self, padding: int, hflip: float, vflip: float) -> None:
        self.padding = padding
        self.hflip = hflip
        self.vflip = vflip

    def __call__(self, images: Tensor) -> Tensor:
        """Augment ``images`` [B, C, H, W] of any type."""
        if self.padding:
            images = self._crop(images)
        if self.hflip:
            images = _flip(images, self.hflip, dim=3)
        if self.vflip:
            images = _flip(images, self.vflip, dim=2)
        return images

    def _crop(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        corner = torch.randint(2 * self.padding + 1, (2, len(images))).to(images.device, non_blocking=True)
        windows = functional.pad(images, (self.padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(len(images), device=images.device), :, corner[0], corner[1]]


def _flip(images: Tensor, probability: float, dim: int) -> Tensor:
    chosen = (torch.rand(len(images)) < probability).to(images.device, non_blocking=True)
    return torch.where(chosen[:, None, None, None], images.flip(dim), images)


class CachedLoader:
    """Yields what one of timm's loaders with prefetcher would, from images in memory.

    Batches, their order and the share of each process are the loader's own; it is read once, here. All that is random
    is drawn in this process, so that restoring its random state resumes a run exactly.

    Args:
        loader: timm's loader, its transforms giving ``uint8`` tensors [C, H, W], all of one size.
        augment: Applied to batches [B, C, H, W] on the device; None for validation.
    """

    def __init__(self, loader: PrefetchLoader, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.loader = loader
        self.augment = augment
        self.images, self.targets = read_images(loader.dataset, loader.loader.num_workers)
        # a loader of numbers, so that the order is drawn as the loader of images draws it
        numbers: Any = range(len(self.images))
        self.indices: Any = DataLoader(numbers, batch_sampler=loader.batch_sampler, collate_fn=torch.tensor)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = self.loader
        for index in self.indices:
            images = self.images.index_select(0, index).to(source.device, non_blocking=True)
            target = self.targets.index_select(0, index).to(source.device, non_blocking=True)
            if self.augment is not None:
                images = self.augment(images)
            images = images.to(source.img_dtype).sub_(source.mean).div_(source.std)
            if source.random_erasing is not None:
                images = source.random_erasing(images)
            yield images, target

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self) -> Any:
        """What was read."""
        return self.loader.dataset

    @property
    def sampler(self) -> Any:
        """The loader's; its epoch is set for distributed training."""
        return self.loader.sampler

    @property
    def batch_sampler(self) -> Any:
        """The loader's."""
        return self.loader.batch_sampler


def read_images(dataset: Dataset[Any], workers: int) -> tuple[Tensor, Tensor]:
    """Read a whole dataset, in order.

    Args:
        dataset: Items ``(image, target)``, the image a ``uint8`` tensor or array [C, H, W].
        workers: Processes that decode.

    Returns:
        Images [N, C, H, W] of type ``uint8`` and class indices [N], or labels [N, num_classes] in floating point.

    Raises:
        UsageError: The images differ in size, or do not fit in this machine's memory.
    """
    start = time.monotonic()
    count = len(dataset)  # type: ignore[arg-type]  # a map-style dataset has a length
    loader: Any = DataLoader(dataset, batch_size=READ_BATCH, num_workers=workers, collate_fn=_stack)
    images: np.ndarray | None = None
    targets: list[np.ndarray] = []
    filled = 0
    for batch, labels in loader:
        for image in batch if isinstance(batch, list) else [batch[0]]:
            if images is None:
                images = np.empty((count, *image.shape), dtype=np.uint8)
                _check_memory(images.nbytes)
            if image.shape != images.shape[1:]:
                sizes = " and ".join(f"{shape[1]}x{shape[2]}" for shape in (images.shape[1:], image.shape))
                raise UsageError(f"--cache-images: the images must have one size, found {sizes} (height x width)")
        assert images is not None  # an empty dataset is refused where it is created
        images[filled : filled + len(labels)] = batch
        targets.append(labels)
        filled += len(labels)
    assert images is not None
    _logger.info(
        f"Keeping {count:,} images in memory ({images.nbytes / 2**20:,.0f} MiB), "
        f"read in {time.monotonic() - start:.1f} s."
    )
    return torch.from_numpy(images), torch.from_numpy(np.concatenate(targets))


def _stack(batch: list[tuple[Any, ...]]) -> tuple[np.ndarray | list[np.ndarray], np.ndarray]:
    """One array where all images have one size, else the list of them; arrays travel between processes as they are.

    And the class indices, or the labels in floating point.
    """
    labels = np.stack([np.asarray(item[1]) for item in batch])
    images = [np.asarray(item[0]) for item in batch]
    same = len({image.shape for image in images}) == 1
    return np.stack(images) if same else images, labels if labels.dtype == np.float32 else labels.astype(np.int64)


def _check_memory(needed: int) -> None:
    if os.name != "posix":
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise UsageError(
            f"--cache-images: the images need {needed / 2**30:.0f} GiB, this machine has "
            f"{memory / 2**30:.0f} GiB of memory"
        )


def check_cache_arguments(args: argparse.Namespace) -> None:
    """Check that --cache-images can do what the other flags ask for.

    Raises:
        UsageError: Naming the flag that does not go with it.
    """
    if not args.cache_images:
        return
    if args.crop_padding is None and not args.no_aug:
        raise UsageError("--cache-images: cannot resize images anew each time; add --crop-padding, or --no-aug")
    unless_off = ["train_img_sizes", "use_multi_epochs_loader", "no_prefetcher", "aug_repeats"]
    if not args.no_aug:
        unless_off += ["aa", "color_jitter", "grayscale_prob", "gaussian_blur_prob"]
    for name in unless_off:
        value = getattr(args, name)
        if value:
            remedy = f"; add {flag_name(name)} 0" if isinstance(value, float) else ""
            raise UsageError(f"{flag_text(name, value)}: does not go with --cache-images{remedy}")
    if dataset_kind(args) in STREAMS:
        raise UsageError(f"--cache-images: --dataset {args.dataset} is a stream, which is not read into memory")
