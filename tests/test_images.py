from __future__ import annotations

import logging

import pytest
from PIL import Image
from timm.data import ImageDataset

from timm_alfa.train.images import NamedImageDataset


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(8):
            Image.effect_noise((32, 32), index).convert("RGB").save(tmp_path / name / f"{index}.jpg")
    return tmp_path


def damage(path, kind):
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no image", "truncated": data[:len(data) // 2]}[kind])


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
