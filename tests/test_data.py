from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_loader

from timm_alfa.errors import UsageError
from timm_alfa.train.args import build_parser
from timm_alfa.train.data import (
    check_class_count,
    check_data_arguments,
    create_datasets,
    default_class_count,
)
from timm_alfa.train.loaders import create_loaders
from timm_alfa.train.random_state import gather_random_states, restore_random_state

CONFIG = {
    "input_size": (3, 16, 16),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.2),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def make_folder(root, classes=("cat", "dog", "eel"), splits=("train", "val"), images=4):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


def parse(*flags, **known):
    args = build_parser().parse_args(["--workers", "0", "--batch-size", "4", *map(str, flags)])
    args.prefetcher, args.distributed = not args.no_prefetcher, False
    for name, value in known.items():
        setattr(args, name, value)
    return args


def loaders_of(args, datasets, **kwargs):
    options = {"device": torch.device("cpu"), "img_dtype": torch.float32, "collate_fn": None, **kwargs}
    return create_loaders(args, CONFIG, *datasets, **options)


def test_folder_goes_through_to_batches(folder):
    args = parse("--data-dir", folder, "--num-classes", 3)
    check_data_arguments(args)
    train, held_out = create_datasets(args, CONFIG)
    check_class_count(args, train, held_out)
    assert (len(train), len(held_out)) == (12, 12)
    loader_train, loader_eval, _ = loaders_of(args, (train, held_out))
    images, target = next(iter(loader_train))
    assert (images.shape, images.dtype, target.dtype) == ((4, 3, 16, 16), torch.float32, torch.int64)
    assert torch.cat([target for _, target in loader_eval]).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_digits_need_no_other_data_flag():
    args = parse("--dataset", "digits")
    check_data_arguments(args)
    assert default_class_count(args) == 10
    args.num_classes = default_class_count(args)
    datasets = create_datasets(args, CONFIG)
    check_class_count(args, *datasets)
    assert [len(dataset) for dataset in datasets] == [1437, 360]
    loader_train, loader_eval, _ = loaders_of(args, datasets)
    assert next(iter(loader_train))[0].shape == (4, 3, 16, 16)
    assert len(loader_eval) == 90


@pytest.mark.parametrize(("flags", "channels", "mode"), [
    ((), 3, "RGB"),
    ((), 1, "L"),
    (("--input-img-mode", "L"), 3, "L"),
])
def test_image_mode_follows_the_input_size(flags, channels, mode, folder):
    for source in (("--dataset", "digits"), ("--data-dir", folder)):
        train, _ = create_datasets(parse(*source, *flags), {**CONFIG, "input_size": (channels, 16, 16)})
        assert train[0][0].mode == mode


def test_no_validation(folder):
    args = parse("--data-dir", folder, "--val-split", "")
    check_data_arguments(args)
    train, held_out = create_datasets(args, CONFIG)
    assert held_out is None
    assert loaders_of(args, (train, None))[1] is None


def test_batches_are_those_of_timm(folder):
    flags = ("--data-dir", folder, "--aa", "rand-m9-mstd0.5", "--reprob", 0.5, "--mixup", 0.2, "--scale", 0.5, 1.0)
    args = parse(*flags, num_classes=3)
    collate = FastCollateMixup(mixup_alpha=0.2, num_classes=3, label_smoothing=0.1)
    datasets = create_datasets(args, CONFIG)
    ours, *_ = loaders_of(args, datasets, collate_fn=collate)

    def batches(loader):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return [batch for _ in range(2) for batch in loader]

    ours = batches(ours)
    theirs = batches(create_loader(
        create_datasets(args, CONFIG)[0], (3, 16, 16), 4, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.5,
        re_mode="pixel", scale=[0.5, 1.0], ratio=[3 / 4, 4 / 3], interpolation="random", mean=CONFIG["mean"],
        std=CONFIG["std"], num_workers=0, collate_fn=collate, device=torch.device("cpu"), grayscale_prob=None,
        gaussian_blur_prob=None,
    ))
    assert len(ours) == 6
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_workers_restart_unless_the_multi_epochs_loader_is_asked_for(folder):
    for flags, persistent in (((), False), (("--use-multi-epochs-loader",), True)):
        args = parse("--data-dir", folder, *flags, workers=1)
        for loader in loaders_of(args, create_datasets(args, CONFIG))[:2]:
            assert loader.loader.persistent_workers is persistent


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # python 3.12 on the loader's workers
def test_a_restart_between_epochs_changes_nothing_that_workers_draw(folder):
    args = parse("--data-dir", folder, "--aa", "rand-m9-mstd0.5", workers=1)

    def epochs(loaders, count):
        return [batch for _ in range(count) for loader in loaders for batch in loader]

    def new_loaders():
        return loaders_of(args, create_datasets(args, CONFIG))[:2]

    torch.manual_seed(0)
    loaders = new_loaders()
    epochs(loaders, 1)
    checkpoint = {"random_states": gather_random_states()}
    expected = epochs(loaders, 2)
    assert restore_random_state(checkpoint, 0)
    torch.testing.assert_close(epochs(new_loaders(), 2), expected, rtol=0, atol=0)


def test_scheduled_sizes(folder):
    args = parse("--data-dir", folder, "--train-img-sizes", 8, 16, "--train-batch-sizes", 6, 2)
    loader, *_ = loaders_of(args, create_datasets(args, CONFIG))
    assert {tuple(images.shape) for images, _ in loader} <= {(6, 3, 8, 8), (2, 3, 16, 16)}


@pytest.mark.parametrize(("flags", "message"), [
    (("--aa", "nonsense"), "augmentation and loader flags .*nonsense"),
    (("--aug-repeats", 3), "RepeatAugment"),
    (("--train-img-sizes", 8, 16, "--train-batch-sizes", 4), "batch_size_choices"),
    (("--batch-size", 13), r"--batch-size 13: more than the training set has .*12 images"),
])
def test_loader_flags_that_timm_refuses(folder, flags, message):
    args = parse("--data-dir", folder, *flags)
    datasets = create_datasets(args, CONFIG)
    with pytest.raises(UsageError, match=message) as caught:
        loaders_of(args, datasets)
    assert "\n" not in str(caught.value)


def test_too_few_outputs(folder):
    args = parse("--data-dir", folder, num_classes=2)
    with pytest.raises(UsageError, match="--num-classes 2: the training set has 3 classes, expected 3"):
        check_class_count(args, *create_datasets(args, CONFIG))
    args.num_classes = 1000
    check_class_count(args, *create_datasets(args, CONFIG))  # spare outputs are harmless, and timm's default


def test_splits_with_other_classes(tmp_path):
    make_folder(tmp_path, classes=("cat", "dog"), splits=("train",), images=1)
    make_folder(tmp_path, classes=("cat", "emu"), splits=("val",), images=1)
    args = parse("--data-dir", tmp_path, num_classes=2)
    with pytest.raises(UsageError, match=r"'dog' only in --train-split; 'emu' only in --val-split"):
        check_class_count(args, *create_datasets(args, CONFIG))
    (tmp_path / "map.txt").write_text("cat\ndog\nemu\n")
    args = parse("--data-dir", tmp_path, "--class-map", tmp_path / "map.txt", num_classes=3)
    check_data_arguments(args)
    datasets = create_datasets(args, CONFIG)
    check_class_count(args, *datasets)
    assert [dataset[1][1] for dataset in datasets] == [1, 2]


def test_class_map_without_these_classes(tmp_path):
    make_folder(tmp_path, images=1)
    (tmp_path / "map.txt").write_text("ant\nbee\n")
    args = parse("--data-dir", tmp_path, "--class-map", tmp_path / "map.txt")
    with pytest.raises(UsageError, match=r"--train-split train: Found 0 images"):
        create_datasets(args, CONFIG)


def test_images_without_class_folders(tmp_path):
    make_folder(tmp_path, classes=(".",), images=1)
    args = parse("--data-dir", tmp_path, num_classes=10)
    with pytest.raises(UsageError, match="images but no class folders"):
        check_class_count(args, *create_datasets(args, CONFIG))


@pytest.mark.parametrize(("flags", "message"), [
    (("--dataset", "torch/cifar10"), r"--dataset torch/cifar10 .* --train-split train: Dataset not found or corrupted"),
    (("--dataset", "torch/cifar99"), "Unknown torchvision dataset cifar99"),
    (("--dataset", "torch/imagenet"), "ILSVRC2012_devkit"),
    (("--dataset", "torch/cifar10", "--input-key", "image"), "unexpected keyword argument 'input_key'"),
])
def test_torchvision_datasets_that_cannot_be_had(tmp_path, flags, message):
    args = parse("--data-dir", tmp_path, *flags)
    check_data_arguments(args)
    with pytest.raises(UsageError, match=message) as caught:
        create_datasets(args, CONFIG)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_torchvision_image_folder(folder):
    args = parse("--dataset", "torch/image_folder", "--data-dir", folder, num_classes=2)
    train, held_out = create_datasets(args, CONFIG)
    with pytest.raises(UsageError, match="has 3 classes"):
        check_class_count(args, train, held_out)
    assert loaders_of(args, (train, held_out))[0].dataset is train


def test_a_reader_that_fails_to_import(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "timm.data.readers.reader_hfds", None)
    args = parse("--dataset", "hfds/someone/something", "--data-dir", tmp_path)
    with pytest.raises(UsageError, match=r"--dataset hfds/someone/something .*--train-split train: "):
        create_datasets(args, CONFIG)
