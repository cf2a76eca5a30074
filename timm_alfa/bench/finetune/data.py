"""Small labelled sets for fine-tuning: images in memory, drawn by seed, augmented in whole batches on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ...errors import UsageError
from ...train.data.cache import BatchAugmentation
from ...train.data.folder import FolderReader, check_listing, image_types, list_images
from ...train.data.image_modes import convert_image


@dataclass(frozen=True)
class Images:
    """Labelled images of one size.

    Args:
        pixels: [N, 3, S, S], ``uint8``.
        labels: [N].
        classes: Names by index.
    """

    pixels: Tensor
    labels: Tensor
    classes: list[str]

    def take(self, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Some of them, on a device."""
        chosen = torch.from_numpy(indices)
        return self.pixels[chosen].to(device), self.labels[chosen].to(device)


def read_folder(folder: Path) -> Images:
    """Every image of a folder of class folders, its middle square.

    Raises:
        UsageError: No images, or images of different sizes.
    """
    if not folder.is_dir():
        raise UsageError(f"--data-dir {folder}: no such folder")
    listing = list_images(str(folder), image_types(None))
    check_listing(f"--data-dir {folder}", str(folder), listing)
    reader = FolderReader(str(folder), listing.images)
    pixels: list[np.ndarray] = []
    for path, _ in reader.samples:
        with Image.open(path) as image:
            array = np.asarray(convert_image(image, "RGB"))
        side = min(array.shape[:2])
        top, left = (array.shape[0] - side) // 2, (array.shape[1] - side) // 2
        pixels.append(array[top : top + side, left : left + side])
        if pixels[-1].shape != pixels[0].shape:
            raise UsageError(
                f"--data-dir {folder}: {path} is {side} pixels wide, the first image "
                f"{pixels[0].shape[0]}; expected one size"
            )
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Images(stacked, torch.tensor([target for _, target in reader.samples]), list(reader.class_to_idx))


def draw(labels: Tensor, count: int, seed: int, *, spare: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a training draw, and of others that are not in it; both have every class in its share.

    Args:
        labels: [N].
        count: Images to train on, or fewer where a class has not enough.
        seed: Of the draw.
        spare: How many of the others, if all images were others; 0 takes all.
    """
    random = np.random.RandomState(seed)  # the one generator that numpy promises never to change
    classes = [random.permutation(np.flatnonzero(labels.numpy() == label)) for label in np.unique(labels.numpy())]
    shares = [max(1, round(count * len(members) / len(labels))) for members in classes]
    chosen = np.concatenate([members[:share] for members, share in zip(classes, shares, strict=True)])
    others = [members[share:] for members, share in zip(classes, shares, strict=True)]
    if spare:
        others = [members[: max(1, round(spare * len(members) / len(labels)))] for members in others]
    return chosen, np.concatenate(others)


class Batches:
    """Augmented batches of one epoch after another: a padded crop, a flip, the input size, normalised.

    Order and augmentation are drawn from torch's generator of the CPU, so that arms with one seed see the same.

    Args:
        images: [N, 3, S, S], ``uint8``, on the device.
        labels: [N].
        size: Input size of the model.
        mean: Per channel, of pixels in 0 to 1.
        std: Per channel.
    """

    def __init__(self, images: Tensor, labels: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images, self.labels, self.size = images, labels, size
        self.augment = BatchAugmentation(padding=images.shape[-1] // 8, hflip=0.5, vflip=0.0)
        self.mean = torch.tensor(mean, device=images.device).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(std, device=images.device).view(1, 3, 1, 1) * 255

    def draw(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """One batch.

        Args:
            index: [B], on the CPU.
        """
        index = index.to(self.images.device)
        return self.prepare(self.augment(self.images[index])), self.labels[index]

    def prepare(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] of type ``uint8`` as the model takes it, [B, 3, size, size]."""
        values = pixels.float()
        if values.shape[-1] != self.size:
            values = functional.interpolate(values, size=self.size, mode="bicubic", align_corners=False).clamp(0, 255)
        return ((values - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
