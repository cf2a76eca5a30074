from __future__ import annotations

import errno
import os

import pytest

from timm_alfa.utils.files import duplicate_file, replace_file, write_file


def names(folder):
    return sorted(os.listdir(folder))


def test_write_replaces_and_leaves_no_other_file(tmp_path):
    write_file(tmp_path / "a", lambda file: file.write(b"old"))
    write_file(str(tmp_path / "a"), lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_file_and_folder_are_on_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    write_file(tmp_path / "a", lambda file: file.write(b"new"))
    assert events == [(tmp_path / "a").stat().st_ino, "rename", tmp_path.stat().st_ino]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_failing_writer_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_duplicate_is_a_link_that_replaces_an_older_file(tmp_path):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    duplicate_file(tmp_path / "a", tmp_path / "b")
    duplicate_file(tmp_path / "a", tmp_path / "b")  # the second time both are one file
    assert (tmp_path / "b").samefile(tmp_path / "a")
    assert names(tmp_path) == ["a", "b"]
    write_file(tmp_path / "c", lambda file: file.write(b"newest"))
    replace_file(tmp_path / "c", tmp_path / "a")
    assert (tmp_path / "b").read_bytes() == b"new"


def test_duplicate_survives_a_leftover_of_a_killed_run(tmp_path):
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b.tmp").write_bytes(b"half")
    duplicate_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert names(tmp_path) == ["a", "b"]


def test_duplicate_copies_where_links_are_unknown(tmp_path, monkeypatch):
    def fail(*_args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    (tmp_path / "a").write_bytes(b"new")
    duplicate_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert not (tmp_path / "b").samefile(tmp_path / "a")
