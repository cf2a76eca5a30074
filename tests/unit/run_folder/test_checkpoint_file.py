from __future__ import annotations

import argparse
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from timm_alfa.errors import UsageError
from timm_alfa.run_folder.checkpoint import read_checkpoint


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def content():
    generator = torch.Generator().manual_seed(0)
    return {
        "state_dict": {"weight": torch.rand(200, 10, generator=generator), "bias": torch.zeros(3)},
        "args": argparse.Namespace(model="resnet20s", lr=0.1),
        "epoch": 3,
        "version": 2,
    }


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.pth.tar"
    torch.save(content(), path)
    return path


def error_of(path, **kwargs):
    with pytest.raises(UsageError) as caught:
        read_checkpoint(path, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"{kwargs.get('flag', '--resume')} {path}: ")
    assert "\n" not in message
    assert "expected a checkpoint" in message
    return message


def same(loaded):
    expected = content()
    return all(torch.equal(loaded["state_dict"][name], value) for name, value in expected["state_dict"].items()) and (
        {**loaded, "state_dict": 0} == {**expected, "state_dict": 0}
    )


def test_reads_a_checkpoint_with_arguments(checkpoint):
    assert same(read_checkpoint(checkpoint))
    assert same(read_checkpoint(str(checkpoint)))


def test_missing_file(tmp_path):
    assert "no such file" in error_of(tmp_path / "none.pth.tar")
    assert "no such file" in error_of(tmp_path, flag="--initial-checkpoint")


@pytest.mark.parametrize("kept", [0, 1, 4, 30, 0.3, 0.6, 0.9, -100, -1])
def test_truncated(checkpoint, kept):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert "truncated, damaged" in error_of(checkpoint)


def test_flipped_bits_are_found_or_harmless(checkpoint):
    data = checkpoint.read_bytes()
    messages = []
    for offset in range(0, len(data), 101):
        checkpoint.write_bytes(data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :])
        try:
            loaded = read_checkpoint(checkpoint)
        except UsageError as error:
            messages.append(str(error))
        else:
            assert same(loaded), f"a flip at byte {offset} changed what was read"
    assert not any("\n" in message for message in messages)
    assert len(messages) > 60  # the weights alone are four fifths of the 100 places tried


def test_flipped_bit_in_the_weights_names_the_part(checkpoint):
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(checkpoint.read_bytes())
    data[largest.header_offset + 2000] ^= 1
    checkpoint.write_bytes(data)
    assert f"wrong checksum of {largest.filename}" in error_of(checkpoint)


@pytest.mark.parametrize("writer", ["torch", "torch legacy", "pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path, writer):
    path, marker = tmp_path / "last.pth.tar", tmp_path / "marker"
    harmful = {**content(), "extra": Harmful(marker)}
    if writer == "pickle":
        with open(path, "wb") as file:
            pickle.dump(harmful, file)
    else:
        torch.save(harmful, path, _use_new_zipfile_serialization=writer == "torch")
    message = error_of(path)
    assert not marker.exists()
    if writer == "torch":
        assert "it holds Python objects" in message
        assert "mkdir" in message


@pytest.mark.parametrize(
    "value",
    [
        {"weight": torch.zeros(2)},
        {"model": {"weight": torch.zeros(2)}},
        {"state_dict": None},
        {"state_dict": {"weight": "text"}},
        [torch.zeros(2)],
        torch.zeros(2),
    ],
)
def test_other_torch_files(tmp_path, value):
    torch.save(value, tmp_path / "weights.pth")
    message = error_of(tmp_path / "weights.pth")
    assert "no 'state_dict' in it" in message
    assert "--initial-checkpoint" in message


def test_other_files(tmp_path):
    path = tmp_path / "file"
    for data in (b"", b"hello\n", b"\x80\x02", bytes(range(256)) * 50):
        path.write_bytes(data)
        error_of(path)
    save_file({"weight": torch.zeros(3)}, path)
    error_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    error_of(path)
