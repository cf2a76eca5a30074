"""Class maps, folders and streams: no class, image or name is lost without a word, and exports know the names."""

from __future__ import annotations

import io
import json
import logging
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import CONFIG, make_folder, parse

from timm_alfa.errors import DataError, UsageError
from timm_alfa.train import main
from timm_alfa.train.class_map import class_names, read_class_map
from timm_alfa.train.data import check_class_map, create_datasets, describe_split, label_names
from timm_alfa.train.data_check import check_data_arguments


@pytest.mark.parametrize("content", [
    b"cat\ndog\neel\n", b"\xef\xbb\xbfcat\ndog\neel\n", b"cat\r\ndog\r\neel", b" cat \ndog\t\neel\n\n\n",
])
def test_a_map_is_read_whatever_wrote_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "map.txt").write_bytes(content)
    assert read_class_map("map.txt", str(tmp_path)) == {"cat": 0, "dog": 1, "eel": 2}


@pytest.mark.parametrize(("content", "message"), [
    (b"cat\ndog\ncat\n", "'cat' twice, in lines 1 and 3"), (b"cat\n\ndog\n", "line 2 is empty"), (b"\n", "empty"),
    (b"\xff\xfec\x00a\x00t\x00", "cannot be read as UTF-8"),
])
def test_a_map_that_would_lose_a_class(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "map.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_class_map(str(tmp_path / "map.txt"))


@pytest.mark.parametrize("value", [{"cat": "0"}, {"": 0}, {"cat": -1}, ["cat"], {"cat": True}])
def test_a_pickled_map_of_something_else(tmp_path: Path, value: Any) -> None:
    (tmp_path / "map.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(UsageError, match=r"--class-map .*map\.pkl"):
        read_class_map(str(tmp_path / "map.pkl"))


def _with_map(root: Path, names: str, *flags: Any) -> Any:
    (root / "map.txt").write_text(names)
    args = parse("--data-dir", root, "--class-map", root / "map.txt", *flags, num_classes=9)
    check_data_arguments(args)
    train, held_out = create_datasets(args, CONFIG)
    check_class_map(args, {"--train-split train": train, "--val-split validation": held_out})
    return train, held_out


def test_names_of_the_map_and_of_the_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, images=1)
    train, _ = _with_map(tmp_path, "eel\ndog\ncat\n")
    assert [train[index][1] for index in range(3)] == [2, 1, 0]
    with pytest.raises(UsageError, match=r"map\.txt: has no 'eel', of which --train-split train has images"):
        _with_map(tmp_path, "cat\ndog\neels\n")
    with pytest.raises(UsageError, match=r"map\.txt: has no 'dog'"):
        _with_map(tmp_path, "cat\neel\n")
    with pytest.raises(UsageError, match=r"map\.txt: 'emu' in no folder of --train-split train, --val-split val"):
        _with_map(tmp_path, "cat\ndog\neel\nemu\n")
    make_folder(tmp_path, classes=("emu",), splits=("val",), images=1)
    with caplog.at_level(logging.WARNING):
        _with_map(tmp_path, "cat\ndog\neel\nemu\n")
    assert caplog.messages == ["--train-split train: no images of 'emu', which --class-map has"]


def test_hidden_folders_and_files_are_neither_classes_nor_images(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, images=2)
    image = tmp_path / "train/cat/0.png"
    for place in ("train/.ipynb_checkpoints/0-checkpoint.png", "train/cat/.ipynb_checkpoints/0.png",
                  "train/cat/._0.png", "train/__MACOSX/cat/0.png", "train/.git/x.png", "train/.DS_Store"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(image.read_bytes())
    args = parse("--data-dir", tmp_path, num_classes=3)
    with caplog.at_level(logging.WARNING):
        train, _ = create_datasets(args, CONFIG)
    assert len(train) == 6
    assert train.reader.class_to_idx == {"cat": 0, "dog": 1, "eel": 2}
    assert describe_split("train", train) == "train: 6 images, 3 classes"
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("--train-split train: 5 hidden images are not read (.")


def test_files_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, images=1)
    for name in ("1.tif", "2.TIF", "notes.txt"):
        (tmp_path / "train/dog" / name).touch()
    (tmp_path / "train/empty").mkdir()
    with caplog.at_level(logging.WARNING):
        create_datasets(parse("--data-dir", tmp_path), CONFIG)
    assert caplog.messages == [
        "--train-split train: 3 files are not read (2 .tif, 1 .txt), only .jpeg, .jpg, .png; --input-key lists others",
        "--train-split train: 1 folders without images are no classes (empty)",
    ]


def test_images_outside_of_class_folders(tmp_path: Path) -> None:
    make_folder(tmp_path, images=1)
    Image.new("RGB", (4, 4)).save(tmp_path / "train/loose.png")
    with pytest.raises(UsageError, match=r"--train-split train: 1 images outside of class folders in .*\(loose\.png\)"):
        create_datasets(parse("--data-dir", tmp_path), CONFIG)


def test_a_tar_file_with_what_macs_add(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", splits=("all",), images=1)
    for place in ("__MACOSX/cat/._0.png", "cat/._0.png"):
        (tmp_path / "images/all" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images/all" / place).write_bytes(b"x")
    with tarfile.open(tmp_path / "images.tar", "w") as file:
        file.add(tmp_path / "images/all", ".")
    args = parse("--data-dir", tmp_path / "images.tar", "--val-split", "", num_classes=3)
    train, _ = create_datasets(args, CONFIG)
    assert len(train) == 3
    assert sorted(train[index][1] for index in range(3)) == [0, 1, 2]
    assert label_names(train, 3) == ["cat", "dog", "eel"]
    train.reader.tar_state.tf.close()


def test_names_by_index() -> None:
    assert class_names({"b": 1, "a": 0}) == ["a", "b"]
    assert class_names({"a": 0, "c": 2}) == {0: "a", 2: "c"}
    assert class_names({"a": 0, "b": 0}) == ["a, b"]
    assert class_names({"a": 0, "b": 1}, outputs=1) == ["a"]
    assert class_names({0: 0}) is None
    assert class_names({}) is None


def test_checkpoints_and_exports_say_what_the_outputs_mean(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "images", images=2)
    output = tmp_path / "output"
    command = (f"--data-dir {tmp_path / 'images'} --model resnet20s --img-size 16 --num-classes 3 -b 2 --workers 0 "
               f"--epochs 1 --output {output} --experiment run")
    with caplog.at_level(logging.INFO):
        main(command.split())
    assert {"--train-split train: 6 images, 3 classes", "--val-split validation: 6 images, 3 classes"} <= set(
        caplog.messages)
    config = json.loads((output / "run/config.json").read_text())
    assert config["label_names"] == ["cat", "dog", "eel"]
    content = torch.load(output / "run/last.pth.tar", weights_only=False)
    assert content["label_names"] == ["cat", "dog", "eel"]
    from timm_alfa.export.command import main as export

    export([str(output / "run"), "--no-onnx"])
    assert json.loads((output / "run/export/config.json").read_text())["label_names"] == ["cat", "dog", "eel"]
    capsys.readouterr()


def _shard(path: Path, labels: list[int], extension: str = "png", dtype: Any = np.uint8) -> None:
    with tarfile.open(path, "w") as file:
        for index, label in enumerate(labels):
            image = io.BytesIO()
            Image.fromarray(np.full((8, 8), np.iinfo(dtype).max // 2, dtype=dtype)).save(image, "png")
            for name, data in ((extension, image.getvalue()), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{index:04}.{name}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def _stream(root: Path, *flags: Any, outputs: int = 3) -> Any:
    pytest.importorskip("webdataset", reason="part of the test extra")
    args = parse("--dataset", "wds/x", "--data-dir", root, "--train-split", "train-0.tar|4", "--val-split",
                 "val-0.tar|4", *flags, num_classes=outputs)
    check_data_arguments(args)
    return create_datasets(args, CONFIG)


WDS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")


@WDS
def test_a_stream(tmp_path: Path) -> None:
    for split in ("train", "val"):
        _shard(tmp_path / f"{split}-0.tar", [0, 1, 2, 1], dtype=np.uint16)
    _, held_out = _stream(tmp_path)
    found = list(held_out)
    assert [target for _, target in found] == [0, 1, 2, 1]
    assert np.asarray(found[0][0]).tolist() == np.full((8, 8, 3), 127).tolist()  # 16 bits, scaled


@WDS
@pytest.mark.parametrize(("labels", "flags", "message"), [
    ([0, 1, 7], (), "a sample of class 7, but the model has 3 outputs"),
    ([0, 1], ("--input-key", "tif"), r"--val-split val-0\.tar\|4: .*tif"),
    ([0, 1], ("--target-key", "label"), r"--val-split val-0\.tar\|4: .*label"),
    ([0, 1], ("--class-map", "names.txt"), r"--val-split val-0\.tar\|4: 0 is a class or key that --class-map"),
    (None, (), r"--val-split val-0\.tar\|4: no sample in the stream"),
])
def test_a_stream_that_does_not_fit(
        tmp_path: Path, labels: list[int] | None, flags: tuple[str, ...], message: str) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    if labels is not None:
        for split in ("train", "val"):
            _shard(tmp_path / f"{split}-0.tar", labels)
    _, held_out = _stream(tmp_path, *flags)
    with pytest.raises(DataError, match=message):
        list(held_out)
