"""A folder of small random images, for tests that run the training command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def make_image_folder(root: Path, *, train: int = 10, validation: int = 2, size: tuple[int, int] = (40, 36)) -> Path:
    """Write ``train`` and ``validation`` images for each of three classes under ``root``; returns ``root``."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("validation", validation)):
        for name in ("a", "b", "c"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root
