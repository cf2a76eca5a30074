from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageDataset
from torchvision.datasets import DatasetFolder, FakeData, ImageFolder

from timm_alfa.errors import DataError
from timm_alfa.train.data.images import NamedImageDataset, TorchImages


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(8):
            Image.effect_noise((32, 32), index).convert("RGB").save(tmp_path / name / f"{index}.jpg")
    return tmp_path


def damage(path, kind):
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no image", "truncated": data[: len(data) // 2]}[kind])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves its files to the garbage collector
def test_reads_what_timm_reads(folder):
    plain = ImageDataset(folder, input_img_mode="L", target_transform=lambda target: target + 5)
    named = NamedImageDataset(plain)
    assert len(named) == len(plain) == 16
    expected = [(image.tobytes(), target) for image, target in map(plain.__getitem__, range(16))]
    assert [(image.tobytes(), target) for image, target in map(named.__getitem__, range(16))] == expected
    named.transform = lambda image: image.size
    assert named[9] == ((32, 32), 6)


@pytest.mark.parametrize("kind", ["empty", "text", "truncated"])
def test_a_damaged_image_is_named_and_passed_over(folder, caplog, kind):
    dataset = NamedImageDataset(ImageDataset(folder))
    damage(folder / "dog" / "7.jpg", kind)
    with caplog.at_level(logging.WARNING):
        image, target = dataset[15]
    assert f"{folder / 'dog' / '7.jpg'} does not decode as an image" in caplog.text
    assert (image.tobytes(), target) == (dataset[0][0].tobytes(), 0)


def test_many_damaged_images_end_the_run_with_a_name(folder):
    dataset = NamedImageDataset(ImageDataset(folder))
    for name in ("cat", "dog"):
        for index in range(8):
            damage(folder / name / f"{index}.jpg", "truncated")
    with pytest.raises(RuntimeError, match=r"dog.1\.jpg does not decode as an image .*, nor do the 9 before it"):
        dataset[0]


def test_an_image_that_has_gone_is_named(folder, caplog):
    dataset = NamedImageDataset(ImageDataset(folder))
    (folder / "cat" / "0.jpg").unlink()
    dataset[0]
    assert f"{folder / 'cat' / '0.jpg'} does not decode" in caplog.text


def add_wide(folder, name="wide.png", high=65535, dtype=np.uint16):
    path = folder / "cat" / name
    Image.fromarray(np.array([[0, 257, high]], dtype=dtype)).save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_16_bits_are_scaled(folder, mode):
    add_wide(folder, "0-.png")  # the first
    timms = ImageDataset(folder, input_img_mode=mode)
    for dataset in (NamedImageDataset(timms), TorchImages(ImageFolder(folder), mode)):
        image, target = dataset[0]
        assert (image.mode, target) == (mode, 0)
        assert np.asarray(image.convert("L")).tolist() == [[0, 1, 255]]


def test_an_image_without_a_known_range_ends_the_run_with_its_name(folder):
    path = add_wide(folder, "0-.tif", 70_000, np.int32)
    (folder / "cat" / "0.jpg").rename(folder / "cat" / "0.tif")
    reader = ImageDataset(folder, input_key=".tif;.jpg")
    for dataset in (NamedImageDataset(reader), TorchImages(ImageFolder(folder), "RGB")):
        with pytest.raises(DataError, match="a 32-bit image with values from 0 to 70000") as caught:
            dataset[0]
        assert str(caught.value).startswith(f"{path}: ")


def test_an_image_without_a_path_has_a_number(folder, caplog):
    dataset = NamedImageDataset(ImageDataset(folder))
    dataset.filename = lambda *args, **kwargs: None  # as of Hugging Face datasets that hold the bytes
    damage(folder / "cat" / "0.jpg", "text")
    dataset[0]
    assert "image 0 does not decode" in caplog.text


def test_torchvisions_images_are_those_of_torchvision(folder):
    plain, ours = ImageFolder(folder), TorchImages(ImageFolder(folder), "RGB")
    assert len(ours) == len(plain) == 16
    for index in range(16):
        assert (ours[index][0].tobytes(), ours[index][1]) == (plain[index][0].tobytes(), plain[index][1])
    ours.transform = lambda image: image.size
    assert pickle.loads(pickle.dumps(ours.reader))[0][0].mode == "RGB"  # for workers that are spawned
    assert ours[9] == ((32, 32), 1)
    assert TorchImages(ImageFolder(folder), "L")[0][0].mode == "L"
    assert TorchImages(FakeData(2, (3, 8, 8)), "L")[1][0].mode == "L"  # which has no files


def test_torchvisions_damaged_files_are_named(folder):
    damage(folder / "dog" / "7.jpg", "truncated")
    with pytest.raises(DataError, match=r"dog.7\.jpg does not decode as an image \("):
        TorchImages(ImageFolder(folder), "RGB")[15]


def test_torchvision_images_that_are_opened_by_themselves(folder):
    add_wide(folder, "0-.png")

    class AsTheyAre(DatasetFolder):
        """Opens images without converting them, as torchvision's INaturalist does."""

        def __init__(self):
            super().__init__(folder, loader=None, extensions=(".png", ".jpg"))
            del self.loader

        def __getitem__(self, index):
            path, target = self.samples[index]
            image = Image.open(path)
            image.load()
            return image, target

    assert np.asarray(TorchImages(AsTheyAre(), "L")[0][0]).tolist() == [[0, 1, 255]]
