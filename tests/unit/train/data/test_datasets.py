from __future__ import annotations

import io
import logging
import os
import pickle
import random
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_loader

from timm_alfa.errors import UsageError
from timm_alfa.train.arguments.command_line import build_parser
from timm_alfa.train.checkpoints.random_state import gather_random_states, restore_random_state
from timm_alfa.train.data.classes import check_source_labels, label_names
from timm_alfa.train.data.datasets import (
    check_class_count,
    check_data_arguments,
    create_datasets,
    create_test_set,
    default_class_count,
)
from timm_alfa.train.data.loaders import create_loaders

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


@pytest.mark.parametrize(
    ("flags", "channels", "mode"),
    [
        ((), 3, "RGB"),
        ((), 1, "L"),
        (("--input-img-mode", "L"), 1, "L"),
        (("--input-img-mode", "HSV"), 3, "HSV"),
        (("--input-img-mode", "RGBA"), 4, "RGBA"),
    ],
)
def test_image_mode_follows_the_input_size(flags, channels, mode, folder):
    for source in (("--dataset", "digits"), ("--data-dir", folder)):
        train, _ = create_datasets(parse(*source, *flags), {**CONFIG, "input_size": (channels, 16, 16)})
        assert train[0][0].mode == mode


@pytest.mark.parametrize(("mode", "channels", "message"), [
    ("L", 3, "--input-img-mode L: gives images of 1 channels, the model takes 3 (--in-chans); expected RGB or YCbCr or "
             "HSV or LAB"),
    (None, 4, "--input-img-mode L: gives images of 1 channels, the model takes 4 (--in-chans); expected RGBA or CMYK"),
    ("RGB", 5, "--input-img-mode RGB: gives images of 3 channels, the model takes 5 (--in-chans); no mode of images "
               "has as many"),
    *((mode, 1, f"--input-img-mode {mode}: must be one of L, LA, RGB, RGBA, CMYK, YCbCr, HSV, LAB, which have 8 "
                "bits a channel") for mode in ("I;16", "I", "F", "1", "P", "grey")),
])  # fmt: skip
def test_modes_that_do_not_fit_the_model(mode, channels, message, folder):
    for source in (("--dataset", "digits"), ("--data-dir", folder)):
        flags = ("--input-img-mode", mode) if mode else ()
        with pytest.raises(UsageError) as caught:
            create_datasets(parse(*source, *flags), {**CONFIG, "input_size": (channels, 16, 16)})
        assert str(caught.value) == message


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
    theirs = batches(
        create_loader(
            create_datasets(args, CONFIG)[0],
            (3, 16, 16),
            4,
            is_training=True,
            auto_augment="rand-m9-mstd0.5",
            re_prob=0.5,
            re_mode="pixel",
            scale=[0.5, 1.0],
            ratio=[3 / 4, 4 / 3],
            interpolation="random",
            mean=CONFIG["mean"],
            std=CONFIG["std"],
            num_workers=0,
            collate_fn=collate,
            device=torch.device("cpu"),
            grayscale_prob=None,
            gaussian_blur_prob=None,
        )
    )
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--aa", "nonsense"), "augmentation and loader flags .*nonsense"),
        (("--aug-repeats", 3), "RepeatAugment"),
        (("--train-img-sizes", 8, 16, "--train-batch-sizes", 4), "batch_size_choices"),
        (("--batch-size", 13), r"--batch-size 13: more than the training set has .*12 images"),
    ],
)
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
    args = parse("--data-dir", tmp_path, "--val-split", "", "--test-split", "val", num_classes=2)
    train, test = create_datasets(args, CONFIG)[0], create_test_set(args, CONFIG)
    with pytest.raises(UsageError, match=r"--test-split val: .*'dog' only in --train-split; 'emu' only in --test"):
        check_class_count(args, train, test, "--test-split")


@pytest.mark.parametrize(
    ("lines", "difference"),
    [
        ("cat\ndog\neel\n", None),
        ("\ufeffeel\r\ndog  \r\ncat\r\n\r\n", None),  # as Windows writes it
        ("cat\ndog\n", "'eel' only in the folder"),
        ("cat\ndog\neel\nemu\n", "'emu' only in the map"),
        ("cat\ndgo\neel\n", "'dgo' only in the map; 'dog' only in the folder"),
        ("ant\nbee\n", "'ant', 'bee' only in the map; 'cat', 'dog', 'eel' only in the folder"),
    ],
)
def test_a_class_map_has_the_classes_of_every_split(folder, tmp_path, lines, difference):
    (tmp_path / "map.txt").write_text(lines, encoding="utf-8", newline="")
    args = parse("--data-dir", folder, "--class-map", tmp_path / "map.txt", num_classes=3)
    check_data_arguments(args)
    if difference is None:
        datasets = create_datasets(args, CONFIG)
        check_class_count(args, *datasets)
        names = lines.removeprefix("\ufeff").split()
        for dataset in datasets:
            assert [dataset[index][1] for index in (0, 4, 8)] == [names.index(name) for name in ("cat", "dog", "eel")]
        return
    with pytest.raises(UsageError) as caught:
        create_datasets(args, CONFIG)
    assert str(caught.value) == (
        f"--class-map {tmp_path / 'map.txt'}: not the class folders of --train-split train: "
        f"{difference}; expected the same classes"
    )


def test_a_class_that_validation_lacks_ends_the_run_with_a_class_map_too(tmp_path):
    make_folder(tmp_path, classes=("cat", "dog"), splits=("train",), images=1)
    make_folder(tmp_path, classes=("cat",), splits=("val",), images=1)
    (tmp_path / "map.txt").write_text("cat\ndog\n")
    args = parse("--data-dir", tmp_path, "--class-map", tmp_path / "map.txt", num_classes=2)
    with pytest.raises(UsageError, match=r"not the class folders of --val-split validation: 'dog' only in the map"):
        create_datasets(args, CONFIG)
    (tmp_path / "val" / "dog").mkdir()
    args = parse("--data-dir", tmp_path, num_classes=2)
    with pytest.raises(UsageError, match=r"--val-split validation: no images in the class folders 'dog' of .*; fill"):
        create_datasets(args, CONFIG)


def test_classes_can_share_an_index(folder, tmp_path):
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"cat": 1, "dog": 1, "eel": 0}))
    args = parse("--data-dir", folder, "--class-map", tmp_path / "map.pkl", num_classes=2)
    check_data_arguments(args)
    train, held_out = create_datasets(args, CONFIG)
    check_class_count(args, train, held_out)
    assert [train[index][1] for index in (0, 4, 8)] == [1, 1, 0]
    assert label_names(train) == ["eel", "cat, dog"]


def test_hidden_folders_and_files_are_neither_classes_nor_images(tmp_path, caplog):
    make_folder(tmp_path, images=2)
    for name in (".ipynb_checkpoints", ".git", "__MACOSX", "cat/.ipynb_checkpoints"):
        make_folder(tmp_path, classes=(name,), splits=("train",), images=1)
    (tmp_path / "train" / "dog" / "._1.png").write_bytes(b"of macOS")
    for kind in ("", "torch/image_folder"):
        args = parse("--data-dir", tmp_path, "--dataset", kind, num_classes=3)
        check_data_arguments(args)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train, held_out = create_datasets(args, CONFIG)
        check_class_count(args, train, held_out)
        assert label_names(train) == label_names(held_out) == ["cat", "dog", "eel"]
        assert [train[index][1] for index in range(len(train))] == [0, 0, 1, 1, 2, 2]
        assert "--train-split train: 5 hidden images are not read, such as " in caplog.text
        assert "--train-split train: 6 images in 3 classes." in caplog.text


def test_keys_of_records_have_no_effect_on_folders(folder, tmp_path):
    tar = write_tar(tmp_path / "images.tar", ["cat/1.png"])
    for root, flags in (
        (folder, ("--target-key", "label")), (tar, ("--target-key", "label")), (tar, ("--input-key", ".gif")),
        (folder, ("--input-key", ".gif", "--dataset", "torch/image_folder")),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"^{flags[0]} {flags[1]}: has no effect with .* {root}$"):
            create_datasets(parse("--data-dir", root, *flags), CONFIG)


def test_other_files_are_counted(tmp_path, caplog):
    make_folder(tmp_path, images=1)
    for name in ("1.tif", "2.TIF", "notes.txt", "Makefile"):
        (tmp_path / "val" / "cat" / name).touch()
    args = parse("--data-dir", tmp_path)
    with caplog.at_level(logging.WARNING):
        create_datasets(args, CONFIG)
    assert caplog.messages == [
        "--val-split validation: not all files are read (not as images: 2 .tif, 1 .txt, 1 without an ending; "
        "--input-key names other endings)"
    ]


@pytest.mark.parametrize("kind", ["", "torch/image_folder"])
def test_images_beside_the_class_folders_are_refused(tmp_path, kind):
    make_folder(tmp_path, images=1)
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "0.png")
    with pytest.raises(UsageError, match=r"--val-split validation: 1 images lie in .*val itself, such as 0\.png; "):
        create_datasets(parse("--data-dir", tmp_path, "--dataset", kind), CONFIG)


@pytest.mark.parametrize("kind", ["", "torch/image_folder"])
def test_a_class_without_images_is_refused(tmp_path, kind):
    make_folder(tmp_path, images=1)
    (tmp_path / "train" / "emu").mkdir()
    (tmp_path / "train" / "emu" / "1.jp2").touch()
    with pytest.raises(UsageError, match=r"--train-split train: no images in the class folders 'emu' of .*1 \.jp2"):
        create_datasets(parse("--data-dir", tmp_path, "--dataset", kind), CONFIG)


def test_sizes_are_logged_for_every_part(folder, caplog):
    args = parse("--data-dir", folder, "--val-fraction", 0.25, "--test-split", "val")
    with caplog.at_level(logging.INFO):
        create_datasets(args, CONFIG)
        create_test_set(args, CONFIG)
        create_datasets(parse("--dataset", "digits"), CONFIG)
    assert caplog.messages == [
        "--train-split train: 12 images in 3 classes.",
        "--val-fraction 0.25, to train on: 9 images in 3 classes.",
        "--val-fraction 0.25, held out: 3 images in 3 classes.",
        "--test-split val: 12 images in 3 classes.",
        "--train-split train: 1,437 images in 10 classes.",
        "--val-split validation: 360 images in 10 classes.",
    ]


def test_shares_that_leave_a_class_out(tmp_path, caplog):
    make_folder(tmp_path, classes=("cat", "dog"), splits=("train",), images=20)
    make_folder(tmp_path, classes=("eel",), splits=("train",), images=2)
    with caplog.at_level(logging.WARNING):
        create_datasets(parse("--data-dir", tmp_path, "--val-fraction", 0.2), CONFIG)
    assert caplog.messages == ["--val-fraction 0.2: holds out no images of 'eel', which have too few"]
    with pytest.raises(UsageError, match=r"--train-fraction 0\.1: leaves no training images of 'eel'; expected some"):
        create_datasets(parse("--data-dir", tmp_path, "--train-fraction", 0.1), CONFIG)


def write_tar(path, names):
    with tarfile.open(path, "w") as archive:
        for name in names:
            file = io.BytesIO()
            Image.new("RGB", (20, 20), (len(name), 0, 0)).save(file, "PNG")
            item = tarfile.TarInfo(name)
            item.size = file.tell()
            file.seek(0)
            archive.addfile(item, file)
    return path


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves its files to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_tar_file_is_read_as_a_folder_is(tmp_path, caplog):
    names = ["./cat/1.png", "dog/2.png", "dog/10.png", "._cat/1.png", "dog/._2.png", "__MACOSX/dog/2.png", "dog/a.gif"]
    root = write_tar(tmp_path / "images.tar", names)
    args = parse("--data-dir", root, "--val-split", "", num_classes=2)
    check_data_arguments(args)
    with caplog.at_level(logging.INFO):
        train, _ = create_datasets(args, CONFIG)
    check_class_count(args, train, None)
    assert label_names(train) == ["cat", "dog"]
    assert [(train.filename(index), train[index][1]) for index in range(3)] == [
        ("./cat/1.png", 0),
        ("dog/2.png", 1),
        ("dog/10.png", 1),
    ]
    assert train[2][0].getpixel((0, 0)) == (len("dog/10.png"), 0, 0)
    assert len(train) == 3
    ours = [message for message in caplog.messages if message.startswith("--train-split")]
    assert ours == [
        "--train-split train: not all files are read (not as images: 1 .gif)",
        "--train-split train: 3 hidden images are not read, such as ._cat/1.png",
        "--train-split train: 3 images in 2 classes.",
    ]
    (tmp_path / "map.txt").write_text("dog\ncat\n")
    train, _ = create_datasets(parse("--data-dir", root, "--val-split", "", "--class-map", "map.txt"), CONFIG)
    assert [train[index][1] for index in range(3)] == [1, 0, 0]
    (tmp_path / "map.txt").write_text("dog\ncot\n")
    with pytest.raises(UsageError, match=r"--train-split train: 'cot' only in the map; 'cat' only in the file"):
        create_datasets(parse("--data-dir", root, "--val-split", "", "--class-map", "map.txt"), CONFIG)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat/1.png", "2.png"], "1 images lie in .* itself, such as 2.png"),
        (["cat/1.png", "./2.png"], "1 images lie in .* itself, such as 2.png"),
        (["1.png", "2.png"], "images but no class folders"),
        (["cat/1.gif"], "no images in"),
        (["cat/._1.png"], "no images in"),
        (None, r"cannot be read as a \.tar file"),
    ],
)
def test_tar_files_that_cannot_be_used(tmp_path, names, message):
    root = tmp_path / "images.tar"
    if names is None:
        root.write_bytes(b"not a tar file, for all that it is called one" * 100)
    else:
        write_tar(root, names)
    with pytest.raises(UsageError, match=f"--train-split train: .*{message}") as caught:
        create_datasets(parse("--data-dir", root, "--val-split", ""), CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2], "--train-split train: has labels from 0 to 2, --num-classes 2 has 0 to 1"),
        ([-1, 1], "--train-split train: has labels from -1 to 1, --num-classes 2 has 0 to 1"),
        (["cat", "dog"], "--train-split train: a label is 'cat', expected the index of a class"),
    ],
)
def test_labels_of_datasets_that_do_not_name_their_classes(labels, message):
    dataset = Labelled(labels)
    with pytest.raises(UsageError, match=message):
        check_class_count(parse("--dataset", "hfds/x", num_classes=2), dataset, None)
    with pytest.raises(UsageError, match=message.replace("--train-split train", "--val-split validation")):
        check_class_count(parse("--dataset", "hfds/x", num_classes=2), Labelled([0, 1]), dataset)


class Labelled(list):
    """A Hugging Face dataset as timm's reader holds it."""

    def __init__(self, labels, class_map=None, names=()):
        super().__init__(labels)
        self.reader = SimpleNamespace(
            label_key="label", dataset={"label": labels}, class_to_idx=class_map or {},
            _source_names=dict(enumerate(names)))  # fmt: skip


@pytest.mark.parametrize(
    ("class_map", "names", "difference"),
    [
        ({"cat": 1, "dog": 0}, ("cat", "dog"), None),
        ({0: 1, 1: 0}, ("cat", "dog"), None),
        ({0: 1, 1: 0}, (), None),
        ({"cat": 1, "dgo": 0}, ("cat", "dog"), "'dgo' only in the map; 'dog' only in the dataset"),
        ({0: 1, 2: 0}, (), "2 only in the map; 1 only in the dataset"),
        ({"cat": 0, "dog": 1}, (), "'cat', 'dog' only in the map; 0, 1 only in the dataset"),
    ],
)
def test_a_class_map_of_a_dataset_with_labels(class_map, names, difference):
    dataset = Labelled([0, 1, 1], class_map, names)
    if difference is None:
        check_source_labels("map.pkl", "--train-split train", dataset.reader)
        return
    with pytest.raises(UsageError, match=f"--class-map map.pkl: not the classes of --train-split train: {difference}"):
        check_source_labels("map.pkl", "--train-split train", dataset.reader)


def test_images_without_class_folders(tmp_path):
    make_folder(tmp_path, classes=(".",), images=1)
    args = parse("--data-dir", tmp_path, num_classes=10)
    with pytest.raises(UsageError, match="images but no class folders"):
        create_datasets(args, CONFIG)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--dataset", "torch/cifar10"),
            r"--dataset torch/cifar10 .* --train-split train: Dataset not found or corrupted",
        ),
        (("--dataset", "torch/cifar99"), "Unknown torchvision dataset cifar99"),
        (("--dataset", "torch/imagenet"), "ILSVRC2012_devkit"),
        (("--dataset", "torch/cifar10", "--input-key", "image"), "unexpected keyword argument 'input_key'"),
    ],
)
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
