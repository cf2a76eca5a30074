"""Images of any mode become 8 bits by the range of their values, in every reader, or are refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import CONFIG, loaders_of, parse
from torchvision.transforms import ToTensor

from timm_alfa.errors import DataError
from timm_alfa.train.data import create_datasets
from timm_alfa.train.images import RangeError, to_mode

VALUES = np.array([[0, 257, 25700], [32768, 65278, 65535]])
EXPECTED = [[0, 1, 100], [128, 254, 255]]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("image", [
    Image.fromarray(VALUES.astype(np.uint16)),
    Image.fromarray(VALUES.astype(np.int32)),
    Image.fromarray((VALUES / 65535).astype(np.float32)),
    Image.frombytes("I;16B", (3, 2), VALUES.astype(">u2").tobytes()),
], ids=lambda image: image.mode)
def test_wide_values_are_scaled_by_their_range(image: Image.Image, mode: str) -> None:
    found = np.asarray(to_mode(image, mode))
    assert found.reshape(2, 3, -1)[..., 0].tolist() == EXPECTED
    assert found.shape == ((2, 3, 3) if mode == "RGB" else (2, 3))


@pytest.mark.parametrize(("values", "message"), [
    (np.array([[-5, 3]], dtype=np.int32), "32-bit integers from -5 to 3"),
    (np.array([[0, 70000]], dtype=np.int32), "32-bit integers from 0 to 70000"),
    (np.array([[0, 255]], dtype=np.float32), "floating-point values from 0 to 255"),
    (np.array([[0, np.nan]], dtype=np.float32), "floating-point values from nan to nan"),
])
def test_values_without_a_known_range(values: np.ndarray, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        to_mode(Image.fromarray(values), "RGB")


def _palette(transparent: bool) -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "L").convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    if transparent:
        image.info["transparency"] = bytes([0, 128, 255])
    return image


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes_are_their_colours(transparent: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(to_mode(_palette(transparent), "RGB")).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


def test_other_modes() -> None:
    one = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert np.asarray(to_mode(one, "L")).tolist() == [[0, 255]]
    ink = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert np.asarray(to_mode(ink, "RGB")).tolist() == [[[255, 0, 0]]]
    seen_through = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert np.asarray(to_mode(seen_through, "RGB")).tolist() == [[[10, 20, 30]]]
    assert np.asarray(to_mode(Image.new("LA", (1, 1), (7, 0)), "L")).tolist() == [[7]]
    white = to_mode(Image.new("LAB", (1, 1), (255, 128, 128)), "RGB")
    assert np.asarray(white).min() > 250
    assert to_mode(one, "") is one


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_8_bits_are_pillows_own(mode: str) -> None:
    for image in (Image.effect_noise((5, 4), 50), Image.effect_noise((5, 4), 50).convert("RGB"), _palette(False)):
        assert np.array_equal(np.asarray(to_mode(image, mode)), np.asarray(image.convert(mode)))


def _folder(root: Path, image: Image.Image, name: str) -> Path:
    for split in ("train", "val"):
        for label in ("a", "b"):
            (root / split / label).mkdir(parents=True, exist_ok=True)
            image.save(root / split / label / name)
    return root


@pytest.mark.parametrize("flags", [(), ("--cache-images", "--no-aug"), ("--dataset", "torch/image_folder")])
@pytest.mark.parametrize("channels", [3, 1])
def test_16_bits_in_training_and_validation(tmp_path: Path, channels: int, flags: tuple[str, ...]) -> None:
    values = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    root = _folder(tmp_path, Image.fromarray(values), "x.png")
    args = parse("--data-dir", root, "--no-aug", *flags, batch_size=2)
    config = {**CONFIG, "input_size": (channels, 20, 20), "mean": (0.0,) * channels, "std": (1.0,) * channels}
    train, held_out = create_datasets(args, config)
    expected = torch.from_numpy(values / 65535).float()
    for dataset in (train, held_out):
        dataset.transform = ToTensor()
        image = dataset[0][0]
        assert image.shape == (channels, 20, 20)
        assert (image - expected).abs().max() < 0.003
    _, loader, _ = loaders_of(args, create_datasets(args, config), config=config)
    images, _ = next(iter(loader))
    assert (images - expected).abs().max() < 0.003


@pytest.mark.parametrize("kind", ["", "torch/image_folder"])
def test_a_file_whose_range_is_not_known_is_named(tmp_path: Path, kind: str) -> None:
    root = _folder(tmp_path, Image.fromarray(np.full((20, 20), 1e6, dtype=np.float32)), "x.tif")
    args = parse("--data-dir", root, "--dataset", kind, *(() if kind else ("--input-key", ".tif")))
    train, _ = create_datasets(args, CONFIG)
    with pytest.raises(DataError, match=r"train/a/x\.tif: floating-point values from 1e\+06 to 1e\+06"):
        train[0]
