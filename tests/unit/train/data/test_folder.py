from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder

from timm_alfa.train.data.folder import FolderReader, image_types, is_hidden, list_images

PATHS = ("cat/2.png", "cat/10.png", "cat/1.JPG", "group/dog10/a.png", "group/dog2/a.png", "other/cat/3.jpeg",
         "Eel/01.png", "Eel/1.png")  # fmt: skip


def add(root: Path, *paths: str) -> str:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    return str(root)


def test_images_classes_and_order_are_those_of_timm(tmp_path: Path):
    folder = add(tmp_path, *PATHS, "cat/notes.txt")
    for class_map in (None, {"Eel": 0, "dog2": 1, "dog10": 2, "cat": 3}):
        ours = FolderReader(folder, list_images(folder, image_types(None)).images, class_map)
        theirs = ReaderImageFolder(folder, class_map=class_map)
        assert ours.samples == theirs.samples
        assert ours.class_to_idx == theirs.class_to_idx
        assert list(ours.class_to_idx) == list(theirs.class_to_idx)
        for absolute, basename in ((True, False), (False, True), (False, False)):
            assert ours.filenames(basename, absolute) == theirs.filenames(basename, absolute)
        file, target = ours[len(ours) - 1]
        with file:
            assert (file.read().decode(), target) == ("other/cat/3.jpeg", ours.class_to_idx["cat"])
    assert len(ImageDataset(None, reader=pickle.loads(pickle.dumps(ours)))) == len(PATHS)


def test_what_else_lies_in_a_folder(tmp_path: Path):
    folder = add(
        tmp_path, *PATHS, "cat/a.tif", "cat/b.TIF", "readme", "cat/.c.png", "cat/._1.JPG", ".git/x.png", ".git/config",
        "group/__MACOSX/dog2/a.png", "@eaDir/cat/1.png", "cat/.DS_Store", "cat/empty_in_class/notes.txt",
        "group/emu/a.gif", "gnu/deep/deeper/a.txt", "Eel/0.png.txt",
    )  # fmt: skip
    (tmp_path / "ibis" / "young").mkdir(parents=True)
    listing = list_images(folder, image_types(None))
    assert len(listing.images) == len(PATHS)
    assert listing.skipped == {".tif": 2, "without an ending": 1, ".txt": 3, ".gif": 1}
    assert sorted(str(Path(path).relative_to(tmp_path)) for path in listing.hidden) == [
        ".git/x.png",
        "@eaDir/cat/1.png",
        "cat/._1.JPG",
        "cat/.c.png",
        "group/__MACOSX/dog2/a.png",
    ]
    assert listing.empty == ["gnu", "group/emu", "ibis"]


def test_a_hidden_folder_above_is_none_of_its_business(tmp_path: Path):
    folder = add(tmp_path / ".cache" / "images", "cat/1.png")
    assert [label for _, label in list_images(folder, {".png"}).images] == ["cat"]


@pytest.mark.parametrize(
    ("input_key", "types"),
    [(None, {".png", ".jpg", ".jpeg"}), (".tif;.png", {".tif", ".png"}), ("TIF; png;", {".tif", ".png"})],
)
def test_types(input_key: str | None, types: set[str]):
    assert image_types(input_key) == types


def test_hidden_names():
    assert all(map(is_hidden, (".git", ".ipynb_checkpoints", "._cat.jpg", "__MACOSX", "@eaDir", ".DS_Store")))
    assert not any(map(is_hidden, ("cat", "_cat", "__cat__", "cat.jpg", "macosx")))
