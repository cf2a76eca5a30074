from __future__ import annotations

import pickle

import pytest

from timm_alfa.errors import UsageError
from timm_alfa.train.data.class_map import check_same_names, read_class_map


@pytest.mark.parametrize(
    "data",
    [
        b"cat\nbig dog\neel\n",
        b"cat\nbig dog\neel",
        b"\xef\xbb\xbfcat\r\nbig dog\r\neel\r\n",
        b"cat  \n\tbig dog\neel\n\n \n",
        b"cat\rbig dog\reel\r",
    ],
)
def test_names_of_a_text_file(tmp_path, data):
    path = tmp_path / "map.TXT"
    path.write_bytes(data)
    assert read_class_map(str(path)) == {"cat": 0, "big dog": 1, "eel": 2}
    assert read_class_map("map.TXT", str(tmp_path)) == {"cat": 0, "big dog": 1, "eel": 2}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("map.txt", b"cat\ndog\ncat \n", "'cat' is on line 1 and on line 3, expected every name once"),
        ("map.txt", b"cat\n\ndog\n", "line 2 is empty, expected a class name on every line"),
        ("map.txt", b"", "no class names in it"),
        ("map.txt", b"\xef\xbb\xbf\r\n", "no class names in it"),
        ("map.txt", "cat\ndog".encode("utf-16"), "cannot be read as UTF-8 text"),
        ("map.txt", b"caf\xe9\n", "cannot be read as UTF-8 text"),
        ("map.json", b'{"cat": 0}', r"expected a \.txt file with a class name per line, or a \.pkl dict"),
        ("map.pkl", pickle.dumps({}), "no class names in it"),
        ("map.pkl", pickle.dumps(["cat"]), "Invalid class map file, expected a dict"),
        ("map.pkl", pickle.dumps({"cat": "0"}), "'cat' has the index '0', expected a whole number from 0"),
        ("map.pkl", pickle.dumps({"cat": -1}), "'cat' has the index -1"),
        ("map.pkl", pickle.dumps({"cat": True}), "'cat' has the index True"),
        ("map.pkl", pickle.dumps({"": 0}), "'' is no class name"),
        ("map.pkl", pickle.dumps({("cat",): 0}), r"\('cat',\) is no class name"),
        ("map.pkl", b"not a pickle", "--class-map"),
    ],
)
def test_files_that_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_class_map(str(tmp_path / name))
    assert str(caught.value).startswith(f"--class-map {tmp_path / name}: ")
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(UsageError, match=r"--class-map none\.txt: no such file$"):
        read_class_map("none.txt")
    with pytest.raises(UsageError, match=r"--class-map none\.txt: no such file, nor in "):
        read_class_map("none.txt", str(tmp_path))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UsageError, match="no such file"):
        read_class_map(str(tmp_path / "folder.txt"))


def test_pickled_indices(tmp_path):
    for content in ({"cat": 3, "dog": 3}, {0: 1, 7: 0}):
        (tmp_path / "map.pkl").write_bytes(pickle.dumps(content))
        assert read_class_map(str(tmp_path / "map.pkl")) == content


def test_differences_are_shown():
    check_same_names("x", ("here", ["a", "b"]), ("there", ("b", "a", "a")))
    with pytest.raises(UsageError, match=r"^x: 'b ' only here; 'b', 'c', 'd' and 1 more only there; expected the same"):
        check_same_names("x", ("here", ["a", "b "]), ("there", "abcde"))
    with pytest.raises(UsageError, match=r"'caf\\xe9' only here; 'cafe\\u0301' only there"):  # they look the same
        check_same_names("x", ("here", ["caf\u00e9"]), ("there", ["cafe\u0301"]))
    with pytest.raises(UsageError, match=r"'\u732b' only here; 'cat' only there"):
        check_same_names("x", ("here", ["\u732b"]), ("there", ["cat"]))
