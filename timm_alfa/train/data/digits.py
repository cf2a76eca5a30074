"""``--dataset digits``: real images that come with scikit-learn, so that a first run needs no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ...errors import UsageError
from .image_modes import convert_image

__all__ = ["HELD_OUT_SPLITS", "TRAIN_SPLITS", "Digits"]

TRAIN_SPLITS = ("train", "training")
HELD_OUT_SPLITS = ("validation", "val", "valid", "eval", "evaluation", "test")

IMAGE_SIZE = 32  # pixels a side; timm's crops are cut in whole pixels, too coarse a grid on the original 8


class Digits(Dataset[tuple[Any, int]]):
    """The 1,797 handwritten digits of scikit-learn (scanned by NIST, 8x8 pixels in 17 grey levels), in 10 classes.

    Every fifth image of the set, sorted by class, is held out: 1,437 images to train on and 360 to test on, each class
    in both to within one image of its share. The split depends on no seed.

    Items are ``(image, target)``: a 32x32 PIL image, enlarged once by bicubic interpolation, or whatever ``transform``
    makes of it, and a class index in 0..9.

    Args:
        split: ``train`` (or ``training``), or a name of the held-out part: ``validation``, ``val``, ``test``, ...
        input_img_mode: PIL mode of the images, ``RGB``, ``L`` for one channel, or another 8-bit mode.
        transform: Applied to the image; ``timm.data.create_loader`` sets it.

    Raises:
        UsageError: Unknown split, or scikit-learn is not installed.
    """

    classes = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        split: str = "train",
        *,
        input_img_mode: str = "RGB",
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        if split not in TRAIN_SPLITS + HELD_OUT_SPLITS:
            raise UsageError(
                f"split '{split}' of --dataset digits: expected one of {', '.join(TRAIN_SPLITS + HELD_OUT_SPLITS)}"
            )
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UsageError('--dataset digits needs scikit-learn: pip install "timm-alfa[digits]"') from error
        pixels, targets = load_digits(return_X_y=True)

        by_class = np.argsort(targets, kind="stable")
        held_out = np.arange(len(by_class)) % 5 == 0
        chosen = np.sort(by_class[~held_out if split in TRAIN_SPLITS else held_out])
        grey = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)

        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        self.images = [
            convert_image(Image.fromarray(image).resize((IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC), input_img_mode)
            for image in grey
        ]
        self.targets: list[int] = targets[chosen].tolist()
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def __len__(self) -> int:
        return len(self.images)
