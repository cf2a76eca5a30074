from __future__ import annotations

import sys

import numpy as np
import pytest

from timm_alfa.errors import UsageError
from timm_alfa.train.data.digits import HELD_OUT_SPLITS, Digits


@pytest.fixture(scope="module")
def train() -> Digits:
    return Digits("train")


@pytest.fixture(scope="module")
def held_out() -> Digits:
    return Digits("validation")


def test_split_is_a_partition_with_every_class_in_its_share(train, held_out):
    from sklearn.datasets import load_digits

    assert (len(train), len(held_out)) == (1437, 360)
    totals = np.bincount(load_digits().target)
    assert (np.bincount(train.targets) + np.bincount(held_out.targets) == totals).all()
    assert (abs(np.bincount(held_out.targets) - totals / 5) < 1).all()
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in held_out.images) == 0


@pytest.mark.parametrize("split", HELD_OUT_SPLITS)
def test_held_out_part_has_many_names(split, held_out):
    assert Digits(split).targets == held_out.targets


def test_split_ignores_seeds(train):
    np.random.seed(123)
    assert Digits("training").targets == train.targets


def test_items_are_images_at_cifar_size(train):
    image, target = train[0]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert isinstance(target, int)
    assert np.asarray(image).max() > 200  # the scan's 16 grey steps span the whole range


def test_grey_mode_and_transform():
    dataset = Digits("test", input_img_mode="L", transform=lambda image: image.mode)
    assert dataset[3] == ("L", dataset.targets[3])


def test_images_are_the_scans_of_their_class(train):
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = np.stack([np.asarray(image.convert("L").reduce(4)).ravel() for image in train.images]) * (16 / 255)
    nearest = [((scan - digits.data) ** 2).sum(axis=1).argmin() for scan in small]
    assert digits.target[nearest].tolist() == train.targets


def test_unknown_split():
    with pytest.raises(UsageError, match="split 'tset' of --dataset digits: expected one of train"):
        Digits("tset")


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r'pip install "timm-alfa\[digits\]"'):
        Digits("train")
