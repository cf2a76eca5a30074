from __future__ import annotations

import importlib.util
import tarfile

import pytest
from PIL import Image

from timm_alfa.errors import UsageError
from timm_alfa.train.arguments.command_line import build_parser
from timm_alfa.train.data.check import check_data_arguments, data_root, dataset_kind


def parse(*flags):
    return build_parser().parse_args([str(flag) for flag in flags])


def add_images(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / path)
    return root


def check_fails(*flags):
    with pytest.raises(UsageError) as caught:
        check_data_arguments(parse(*flags))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("", ""), ("digits", "digits"), ("torch/CIFAR10", "torch"), ("HFDS/owner/name", "hfds"), ("wds/", "wds")],
)
def test_kind(name, kind):
    assert dataset_kind(parse("--dataset", name)) == kind


def test_root_is_either_flag():
    assert data_root(parse("folder")) == "folder"
    assert data_root(parse("folder", "--data-dir", "other")) == "other"
    assert data_root(parse()) is None


@pytest.mark.parametrize(
    "splits", [("train", "val"), ("train", "validation"), ("training", "valid"), ("train", "eval")]
)
def test_split_folders_that_timm_finds(tmp_path, splits):
    add_images(tmp_path, *(f"{split}/cat/1.png" for split in splits))
    check_data_arguments(parse("--data-dir", tmp_path))


def test_named_split_folders(tmp_path):
    add_images(tmp_path, "fold0/cat/1.png", "test/cat/1.JPEG")
    check_data_arguments(parse("--data-dir", tmp_path, "--train-split", "fold0", "--val-split", "test"))
    assert "--train-split train: no such folder" in check_fails("--data-dir", tmp_path, "--val-split", "test")


def test_missing_split_folder_is_not_replaced_by_the_root(tmp_path):
    add_images(tmp_path, "train/cat/1.png", "test/cat/1.png")
    message = check_fails("--data-dir", tmp_path)
    assert message == (
        f"--val-split validation: no such folder in {tmp_path}, expected one of test, train "
        "(or '' to train without validation)"
    )
    assert check_fails("--data-dir", tmp_path, "--train-split", "") == (
        "--train-split: is empty, expected one of test, train"
    )
    message = check_fails("--data-dir", tmp_path, "--train-split", "trian", "--val-split", "test")
    assert message == f"--train-split trian: no such folder in {tmp_path}, expected one of test, train"


def test_folder_of_classes_without_splits(tmp_path):
    add_images(tmp_path, "cat/1.png", "dog/1.png")
    check_data_arguments(parse("--data-dir", tmp_path, "--val-split", ""))
    assert "--val-split validation: no such folder" in check_fails("--data-dir", tmp_path)


def test_missing_root(tmp_path):
    assert "--data-dir is missing" in check_fails()
    assert "--data-dir is missing" in check_fails("--dataset", "torch/cifar10")
    assert f"--data-dir {tmp_path / 'none'}: no such folder" in check_fails("--data-dir", tmp_path / "none")


def test_no_images(tmp_path):
    for folder in ("train/cat", "val/cat"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "readme.txt").touch()
    assert f"no images in {tmp_path / 'train'}, expected files such as" in check_fails("--data-dir", tmp_path)
    add_images(tmp_path, "train/cat/1.png")
    assert f"no images in {tmp_path / 'val'}" in check_fails("--data-dir", tmp_path)
    add_images(tmp_path, "val/cat/1.png")
    check_data_arguments(parse("--data-dir", tmp_path))
    assert "expected files such as .bmp" in check_fails("--data-dir", tmp_path, "--input-key", ".bmp")
    assert "expected one of its folders (it has none)" in check_fails("--data-dir", tmp_path / "val" / "cat")


def test_hidden_images_are_none(tmp_path):
    add_images(tmp_path, "train/cat/1.png", "val/cat/._1.png", "val/.ipynb_checkpoints/1.png", "val/__MACOSX/cat/1.png")
    assert f"no images in {tmp_path / 'val'}" in check_fails("--data-dir", tmp_path)
    assert "expected one of train, val (or" in check_fails("--data-dir", tmp_path, "--val-split", "none")


def test_torchvisions_folders_have_splits_too(tmp_path):
    add_images(tmp_path, "train/cat/1.tif", "test/cat/1.tif")
    flags = ("--dataset", "torch/image_folder", "--data-dir", tmp_path)
    check_data_arguments(parse(*flags, "--val-split", "test"))
    assert "--val-split validation: no such folder in" in check_fails(*flags)


def test_files(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert "a file, expected a folder of images or a .tar file" in check_fails("--data-dir", tmp_path / "notes.txt")
    with tarfile.open(tmp_path / "images.tar", "w"):
        pass
    flags = ("--data-dir", tmp_path / "images.tar")
    for more in (("--val-split", ""), ("--val-fraction", 0.1)):
        check_data_arguments(parse(*flags, *more))
    assert check_fails(*flags) == (
        f"--val-split validation: --data-dir {tmp_path / 'images.tar'} has no splits, these would be the images that "
        "are trained on; expected a folder of splits, --val-fraction, or '' to train without validation"
    )
    assert "--test-split test: --data-dir" in check_fails(*flags, "--val-split", "", "--test-split", "test")
    assert "expected a folder of images" in check_fails(*flags, "--dataset", "torch/image_folder")


def test_class_map(tmp_path):
    add_images(tmp_path, "train/cat/1.png", "val/cat/1.png")
    flags = ("--data-dir", tmp_path, "--class-map")
    assert "--class-map none.txt: no such file" in check_fails(*flags, "none.txt")
    (tmp_path / "map.csv").touch()
    assert "expected a .txt file" in check_fails(*flags, tmp_path / "map.csv")
    (tmp_path / "map.txt").write_text("cat\n\ncat\n")
    assert "line 2 is empty" in check_fails(*flags, tmp_path / "map.txt")
    for source in ("digits", "torch/cifar10", "torch/image_folder"):
        message = check_fails(*flags, tmp_path / "map.txt", "--dataset", source)
        assert message == f"--class-map {tmp_path / 'map.txt'}: has no effect with --dataset {source}"
    for split in ("train", "val"):
        (tmp_path / split / "map.txt").write_text("cat\n")
    check_data_arguments(parse(*flags, "map.txt"))


@pytest.mark.parametrize("name", ["cifar10", "Digits", "imagenet/val", "torch", "/data"])
def test_unknown_kind(name):
    message = f"--dataset {name}: unknown kind, expected digits, torch/NAME, hfds/NAME"
    assert message in check_fails("--dataset", name, "--data-dir", ".")


@pytest.mark.parametrize(
    ("name", "package"),
    [("hfds/x", "datasets"), ("hfids/x", "datasets"), ("tfds/x", "tensorflow-datasets"), ("wds/", "webdataset")],
)
def test_missing_packages(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    message = check_fails("--dataset", name, "--data-dir", ".")
    assert message == f"--dataset {name} needs the package {package}: pip install {package}"


def test_digits(monkeypatch):
    check_data_arguments(parse("--dataset", "digits"))
    check_data_arguments(parse("--dataset", "digits", "--val-split", ""))
    message = check_fails("--dataset", "digits", "--val-split", "holdout")
    assert "--val-split holdout: --dataset digits has no such split, expected one of train" in message
    assert "--train-split : --dataset digits" in check_fails("--dataset", "digits", "--train-split", "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert 'pip install "timm-alfa[digits]"' in check_fails("--dataset", "digits")
