"""Labels in metadata.csv or metadata.jsonl beside the images: as timm's readers give labels, or refused by line."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from timm_alfa import UsageError
from timm_alfa.errors import DataError
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.data.check import check_data_arguments
from timm_alfa.train.data.classes import label_names
from timm_alfa.train.data.datasets import check_class_count, create_datasets
from timm_alfa.train.data.images import NamedImageDataset
from timm_alfa.train.data.metadata import LabelledReader

NAMES = ("a.png", "deep/b.png", "c.png")
DATA = {"input_size": (3, 8, 8)}


def _images(folder: Path, names: tuple[str, ...] = NAMES) -> Path:
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 10 * index, dtype=np.uint8)).save(path)
    return folder


def _csv(folder: Path, text: str) -> Path:
    _images(folder)
    path = folder / "metadata.csv"
    path.write_text(text)
    return path


def _jsonl(folder: Path, rows: list[Any]) -> Path:
    _images(folder)
    path = folder / "metadata.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


GOOD = "file_name,cat,dog,big\nc.png,1,0,0\na.png,0,0,0\ndeep/b.png,1,0.5,1\n"


def test_columns_are_labels_in_the_order_of_the_file(tmp_path: Path):
    reader = LabelledReader("--train-split train", _csv(tmp_path, GOOD), num_classes=3)
    assert reader.labels == [[0], [], [0, 1, 2]]
    assert [reader.filename(index) for index in range(3)] == ["c.png", "a.png", "deep/b.png"]
    assert reader.filename(2, basename=True) == "b.png"
    assert reader.class_to_idx == {"cat": 0, "dog": 1, "big": 2}
    with reader[2][0] as file:
        assert np.asarray(Image.open(file))[0, 0, 0] == 10


def test_some_columns_can_be_picked_and_ordered(tmp_path: Path):
    reader = LabelledReader("x", _csv(tmp_path, GOOD), num_classes=2, target_key="big, cat")
    assert reader.labels == [[1], [], [0, 1]]
    assert reader.class_to_idx == {"big": 0, "cat": 1}


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path):
    reader = LabelledReader("x", _csv(tmp_path, "\ufeff" + GOOD), num_classes=3)
    assert len(reader) == 3


def test_lists_of_classes_and_numbers_per_class(tmp_path: Path):
    rows = [
        {"file_name": "a.png", "of": {"labels": [2, 0]}, "dense": [1, 0, 0.5], "names": ["x", "z"], "cat": 1, "big": 0},
        {"file_name": "c.png", "of": {"labels": []}, "dense": [False, True, 0], "names": [], "cat": False, "big": True},
    ]
    path = _jsonl(tmp_path, rows)
    assert LabelledReader("x", path, num_classes=3, target_key="of/labels").labels == [[2, 0], []]
    assert LabelledReader("x", path, num_classes=3, target_key="dense", dense=True).labels == [[1, 0, 0.5], [0, 1, 0]]
    named = LabelledReader("x", path, num_classes=3, target_key="names", class_map={"x": 1, "y": 0, "z": 2})
    assert named.labels == [[1, 2], []]
    assert LabelledReader("x", path, num_classes=2, target_key="big,cat").labels == [[1], [0]]


WRONG_CSV = {
    "name,cat\n": "has no column file_name",
    "file_name,cat\n": "has no lines with images",
    "file_name,cat\na.png,1\na.png,0\n": "line 3: 'a.png' is there a second time",
    "file_name,cat\nlost.png,1\n": "line 2: file_name is 'lost.png', which is no file",
    "file_name,cat\n,1\n": "line 2: file_name is ''",
    "file_name,cat\na.png,yes\n": "line 2: cat is 'yes', expected a number, above 0 for a label that is present",
    "file_name,cat\na.png,\n": "line 2: cat is ''",
    "file_name,cat\na.png,nan\n": "line 2: cat is 'nan'",
    "file_name,cat\na.png\n": "line 2: has more or fewer columns",
    "file_name,cat\na.png,1,1\n": "line 2: has more or fewer columns",
    "file_name,cat,dog\na.png,1,1\n": "--num-classes 1: metadata.csv of --train-split train has 2 fields of labels",
    'file_name,cat\n"a.png,1\n': "cannot be read",
}


@pytest.mark.parametrize("text", WRONG_CSV)
def test_a_line_that_cannot_be_used_is_named(text: str, tmp_path: Path):
    with pytest.raises(UsageError) as caught:
        LabelledReader("--train-split train", _csv(tmp_path, text), num_classes=1)
    assert WRONG_CSV[text] in str(caught.value)
    assert "--train-split train" in str(caught.value)


WRONG_ROWS: list[tuple[Any, dict[str, Any], str]] = [
    ({"file_name": "a.png", "labels": [0]}, {}, "--target-key is missing, expected one of 'labels' in metadata.jsonl"),
    ({"file_name": "a.png", "labels": [3]}, {"target_key": "labels"}, "line 1: labels has 3, expected class indices"),
    ({"file_name": "a.png", "labels": [-1]}, {"target_key": "labels"}, "labels has -1"),
    ({"file_name": "a.png", "labels": [True]}, {"target_key": "labels"}, "labels has True"),
    ({"file_name": "a.png", "labels": [0.5]}, {"target_key": "labels"}, "read with --target-format multihot"),
    ({"file_name": "a.png", "labels": 1}, {"target_key": "labels"}, "labels is 1, expected a list"),
    ({"file_name": "a.png"}, {"target_key": "labels"}, "line 1: has no field 'labels'"),
    ({"file_name": "a.png", "v": [1, 0]}, {"target_key": "v", "dense": True}, "expected 3 numbers from 0 to 1"),
    ({"file_name": "a.png", "v": [1, 0, 2]}, {"target_key": "v", "dense": True}, "expected 3 numbers from 0 to 1"),
    ({"file_name": "a.png", "v": ["q"]}, {"target_key": "v", "class_map": {"x": 0}}, "--class-map does not know: 'q'"),
    ({"file_name": "a.png", "x": 1, "y": 0}, {"target_key": "x,q,y"}, "line 1: has no field 'q'"),
    ([1], {"target_key": "labels"}, "line 1: expected an object"),
]


@pytest.mark.parametrize(("row", "options", "message"), WRONG_ROWS)
def test_an_object_that_cannot_be_used_is_named(row: Any, options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UsageError) as caught:
        LabelledReader("--train-split train", _jsonl(tmp_path, [row]), num_classes=3, **options)
    assert message in str(caught.value)


def test_images_without_a_line_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = _csv(tmp_path, "file_name,cat\na.png,1\n")
    (tmp_path / "notes.txt").touch()
    with caplog.at_level(logging.WARNING):
        LabelledReader("--train-split train", path, num_classes=1)
    assert "--train-split train: 2 images are not in metadata.csv and not read, such as" in caplog.text
    caplog.clear()
    LabelledReader("--train-split train", path, num_classes=1, tell=False)
    assert not caplog.records


def _args(root: Path, *extra: str) -> argparse.Namespace:
    args = parse_args(["--data-dir", str(root), "--task", "multilabel", "--num-classes", "3", *extra])
    check_data_arguments(args)
    return args


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        _csv(tmp_path / split, GOOD)
    return tmp_path


def test_the_training_command_reads_them_as_float_labels(root: Path):
    args = _args(root)
    train, held_out = create_datasets(args, DATA)
    check_class_count(args, train, held_out)
    assert label_names(train) == ["cat", "dog", "big"]
    for dataset in (train, held_out):
        targets = torch.stack([dataset[index][1] for index in range(3)])  # type: ignore[index]
        assert torch.equal(targets, torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 1]]))


def test_a_part_of_them_can_be_held_out(root: Path):
    train, held_out = create_datasets(_args(root, "--val-fraction", "0.34"), DATA)
    assert held_out is not None
    assert (len(train), len(held_out)) == (2, 1)  # type: ignore[arg-type]
    assert held_out[0][1].dtype == torch.float32


def test_splits_must_have_the_same_labels(root: Path):
    (root / "validation" / "metadata.csv").write_text(GOOD.replace("big", "small"))
    args = _args(root)
    with pytest.raises(UsageError, match=r"'big' only in --train-split; 'small' only in --val-split"):
        check_class_count(args, *create_datasets(args, DATA))


def test_a_folder_without_the_file_or_with_both_is_refused_at_once(root: Path):
    (root / "train" / "metadata.jsonl").touch()
    with pytest.raises(UsageError, match=r"--train-split train: .* has both metadata.csv or metadata.jsonl"):
        _args(root)
    for name in ("metadata.jsonl", "metadata.csv"):
        (root / "train" / name).unlink()
    with pytest.raises(UsageError, match=r"--train-split train: .* has no metadata.csv or metadata.jsonl; --task"):
        _args(root)


def test_other_datasets_of_one_class_are_refused(root: Path):
    for dataset in ("digits", "torch/cifar10"):
        with pytest.raises(UsageError, match=f"--dataset {dataset}: its images have one class each"):
            _args(root, "--dataset", dataset)
    (root / "set.tar").touch()
    with pytest.raises(UsageError, match=r"set\.tar: a file, --task multilabel expects a folder"):
        _args(root / "set.tar", "--val-split=")


def test_labels_that_a_reader_gives_wrong_name_the_file(root: Path):
    dataset: Any = create_datasets(_args(root), DATA)[0]
    assert isinstance(dataset, NamedImageDataset)
    dataset.reader.labels[1] = [7]
    with pytest.raises(DataError, match=r"a\.png: its labels are \[7\]: Multi-label class indices must be in"):
        dataset[1]
