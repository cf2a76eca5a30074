from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from timm_alfa.errors import UsageError
from timm_alfa.train.data.classes import check_trained_classes, class_to_index, label_names
from timm_alfa.train.data.split import Part, class_indices


def dataset(class_to_idx: dict[Any, int], **others: Any) -> Any:
    return SimpleNamespace(reader=SimpleNamespace(class_to_idx=class_to_idx, **others), transform=None)


@pytest.mark.parametrize(
    ("class_to_idx", "names"),
    [
        ({"b": 1, "a": 0}, ["a", "b"]),
        ({"b": 5, "a": 2}, {2: "a", 5: "b"}),
        ({"a": 1, "b": 0, "c": 1}, ["b", "a, c"]),
        ({"a": np.int64(0)}, ["a"]),
        ({0: 1, 1: 0}, []),
        ({}, []),
    ],
)
def test_names_of_outputs(class_to_idx: dict[Any, int], names: Any):
    whole = dataset(class_to_idx)
    assert label_names(whole) == label_names(Part(whole, np.array([0]))) == names
    assert class_to_index(whole) == class_to_idx


def test_names_that_repeat():
    """torchvision's ImageNet has two classes called crane."""
    whole = dataset({"crane": 1, "bird": 0}, classes=[("crane", "bird"), ("crane",), "dog"])
    assert label_names(whole) == label_names(Part(whole, np.array([0]))) == ["crane, bird", "crane", "dog"]


def test_labels_of_a_part():
    whole = SimpleNamespace(targets=[3, 1, 2, 3])

    class Sized(list):
        reader = whole
        transform = None

    assert class_indices(Part(Sized("abcd"), np.array([0, 2]))).tolist() == [3, 2]
    assert class_indices(Part([1, 2], np.array([0]))) is None


@pytest.mark.parametrize(
    ("trained", "names"), [(None, ["a"]), ([], ["a"]), (["a"], []), (["a", "b"], ["a", "b"]), ({1: "a"}, {1: "a"})]
)
def test_trained_on_the_same_classes(trained: Any, names: Any):
    check_trained_classes("--resume x", trained, names)


@pytest.mark.parametrize(
    ("trained", "names", "message"),
    [
        (["a", "b"], ["a"], "was trained on 2 classes, the data has 1: 'b' only in the checkpoint"),
        (["a", "b"], ["b", "a"], "numbers its classes differently"),
        ({0: "a", 2: "b"}, ["a", "b"], "numbers its classes differently"),
    ],
)
def test_trained_on_other_classes(trained: Any, names: Any, message: str):
    with pytest.raises(UsageError, match=f"^--resume x: {message}"):
        check_trained_classes("--resume x", trained, names)
