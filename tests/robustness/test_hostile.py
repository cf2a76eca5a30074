"""Broken and hostile files, given to the command: one line, nothing run, nothing written, the last good file kept."""

from __future__ import annotations

import io
import os
import pickle
import resource
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from training_images import make_image_folder

from timm_alfa.errors import UsageError
from timm_alfa.robust.command import main as robust
from timm_alfa.run_folder.checkpoint import read_checkpoint
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import build_parser
from timm_alfa.train.arguments.config import load_config

BASE = (
    "--model test_resnet --img-size 32 --num-classes 3 -b 10 --lr 0.01 --warmup-epochs 0 --epochs 2 --experiment run "
    "--alfa-blocks layer3 layer4 --alfa-learnable --model-ema"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def checkpoint(images: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that one epoch of two leaves."""
    output = tmp_path_factory.mktemp("run")
    main(_command(images, output, "--stop-epoch 1"))
    return (output / "run" / "last.pth.tar").read_bytes()


@pytest.fixture
def folder(checkpoint: bytes, tmp_path: Path) -> Path:
    """A run's folder with that file."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "last.pth.tar").write_bytes(checkpoint)
    return folder


def _command(images: Path, output: Path, extra: str) -> list[str]:
    return [*BASE.split(), "--workers", "0", "--data-dir", str(images), "--output", str(output), *extra.split()]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _fails(call: Callable[[], object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call()
    error = capsys.readouterr().err
    assert caught.value.code == code, error
    assert error.count("\n") == 1, error
    return error


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


WRITERS = ["torch", "torch legacy", "pickle"]
READERS = ["--resume", "--initial-checkpoint", "--pretrained --pretrained-path", "--class-map"]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("flag", READERS)
def test_a_pickle_that_would_run_something_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, writer: str
) -> None:
    path, marker = tmp_path / "file.pkl", tmp_path / "marker"
    content = {"state_dict": {"weight": torch.zeros(3)}, "epoch": 0, "extra": Harmful(marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    _fails(lambda: main(_command(images, tmp_path / "out", f"{flag} {path}")), capsys)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_the_robustness_command_refuses_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, marker = tmp_path / "last.pth.tar", tmp_path / "marker"
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "args": Harmful(marker)}, path)
    _fails(lambda: robust([str(path), "--dataset", "digits"]), capsys)
    assert not marker.exists()


POSITIONS = 60


def test_a_checkpoint_cut_off_anywhere_is_refused(checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    for index in range(POSITIONS):
        path.write_bytes(checkpoint[: len(checkpoint) * index // POSITIONS])
        with pytest.raises(UsageError, match="truncated, damaged"):
            read_checkpoint(path)


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.pth.tar"
    path.write_bytes(checkpoint)
    original = read_checkpoint(path)["state_dict"]
    found = 0
    for index in range(POSITIONS):
        data = bytearray(checkpoint)
        data[len(data) * index // POSITIONS + index] ^= 1 << index % 8
        path.write_bytes(data)
        try:
            loaded = read_checkpoint(path)
        except UsageError:
            found += 1
        else:
            assert loaded["state_dict"].keys() == original.keys()
            assert all(torch.equal(loaded["state_dict"][name], value) for name, value in original.items())
    assert found > POSITIONS / 2


def test_a_damaged_checkpoint_stops_the_command_before_it_writes(
    images: Path, folder: Path, checkpoint: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    largest = max(zipfile.ZipFile(io.BytesIO(checkpoint)).infolist(), key=lambda record: record.file_size)
    middle = largest.header_offset + largest.file_size // 2 + 200  # in its values, behind its header and padding
    flipped = bytes(byte ^ 255 for byte in checkpoint[middle : middle + 10])
    for data in (checkpoint[:-1000], checkpoint[:middle] + flipped + checkpoint[middle + 10 :]):
        (folder / "last.pth.tar").write_bytes(data)
        before = _contents(folder)
        assert "--resume" in _fails(lambda: main(_command(images, folder.parent, "--resume auto")), capsys)
        assert _contents(folder) == before


WRONG = {
    "epoch": [-1, "1", [1], 0.5],
    "version": ["2"],
    "optimizer": [3, {}, {"state": {}, "param_groups": []}, {"state": 1, "param_groups": [{"lr": 1}]}],
    "saver": [3, {}, {"checkpoint_files": 1, "best_epoch": 0, "best_metric": 0.0, "pending": (0, 0.0)}],
    "state_dict_ema": [[], {"weight": torch.zeros(2)}],
    "task_state": [3, {"passes": "many"}, {"passes": 0, "eta": {}}, {"eta": {"blocks": 3}}],
    "random_states": [3, [3], [{}], [{"torch": torch.zeros(2), "accelerator": ""}], {"a": 1}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_wrong_contents_stop_the_command_before_it_writes(
    images: Path, folder: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any
) -> None:
    path = folder / "last.pth.tar"
    with torch.serialization.safe_globals([Namespace]):
        torch.save({**torch.load(path, weights_only=True), key: value}, path)
    before = _contents(folder)
    error = _fails(lambda: main(_command(images, folder.parent, "--resume auto")), capsys)
    assert f"--resume {path}: " in error
    assert _contents(folder) == before


@pytest.mark.parametrize("name", ["../precious.txt", "{folder}/precious.txt", "precious.txt", "last.pth.tar"])
def test_a_checkpoint_cannot_have_other_files_deleted(
    images: Path, folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The history of checkpoints names the files that make room for better ones."""
    path = folder / "last.pth.tar"
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(path, weights_only=True)
    state["saver"]["checkpoint_files"] = [(name.format(folder=folder), -1.0)]
    torch.save(state, path)
    error = _fails(lambda: main(_command(images, folder.parent, "--resume auto --checkpoint-hist 1")), capsys)
    assert "damaged ('saver'" in error


YAML_TEXTS = [
    "lr: !!python/object/apply:os.mkdir ['{marker}']",
    "lr: !!python/object/new:os.mkdir ['{marker}']",
    "model_kwargs: !!python/object/apply:subprocess.call [['mkdir', '{marker}']]",
    "lr: !!python/name:os.mkdir",
    "lr: !!python/module:os",
    "model: !!python/tuple [1, 2]",
    "model: !unknown tag",
    "epochs: !!int ''",
    "lr: !!float ''",
    "amp: !!bool perhaps",
    "model: !!timestamp never",
    "model: !!binary '%'",
    "? [1, 2]\n: 3\n? {{a: 1}}\n: 4",
    "lr: *nothing",
    "epochs: " + "9" * 5000,
    "lr: " + "[" * 1500,
    "a: &a [lr, lr]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12))
    + "lr: *m",
    "lr: &lr [*lr]",
]


@pytest.mark.parametrize("text", YAML_TEXTS, ids=lambda text: text[:30])
def test_configurations_that_would_run_or_fill_something_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path, marker = tmp_path / "config.yaml", tmp_path / "marker"
    path.write_text(text.format(marker=marker))
    assert f"--config {path}: " in _fails(lambda: main(["--config", str(path)]), capsys)
    assert not marker.exists()


YAML_VALUES: list[Any] = ["text", -1, 2.5, True, [], ["text", None], {"key": 1}]


def test_a_value_of_another_type_is_taken_as_the_flag_would_or_refused(tmp_path: Path) -> None:
    path, parser = tmp_path / "config.yaml", build_parser()
    refused = 0
    for action in parser._actions:
        for value in YAML_VALUES:
            path.write_text(yaml.safe_dump({action.dest: value}))
            try:
                load_config(str(path), parser)
            except UsageError:
                refused += 1
    assert refused > 500


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_do_not_decode_are_named(tmp_path: Path, workers: int) -> None:
    """In a process of its own, with which the threads end that feed the workers."""
    images = make_image_folder(tmp_path / "images", train=6)
    for path in sorted((images / "train").rglob("*.png"))[1:]:  # the first is tried before training begins
        path.write_bytes(path.read_bytes()[:200])
    command = _command(images, tmp_path, f"--workers {workers} --log-interval 1")
    log = tmp_path / "log"
    assert processes.wait(processes.start(command, log)) == 1
    last = log.read_text().splitlines()[-1]
    assert last.startswith(f"train_alfa.py: error: {images}")
    assert "does not decode as an image" in last


@pytest.mark.parametrize(
    ("share", "code", "named"),
    [(0.0001, 2, "cannot be written"), (0.1, 1, "cannot write checkpoint"), (0.9, 1, "cannot write checkpoint")],
)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    images: Path, folder: Path, checkpoint: bytes, tmp_path: Path, share: float, code: int, named: str
) -> None:
    """With the kernel refusing, in a process of its own."""
    command = _command(images, folder.parent, "--resume auto")
    log = tmp_path / "log"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = (int(share * len(checkpoint)), hard)
    child = processes.start(command, log, first=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    assert processes.wait(child) == code, log.read_text()
    (error,) = log.read_text().splitlines()
    assert error.startswith("train_alfa.py: error: ")
    assert named in error
    assert (folder / "last.pth.tar").read_bytes() == checkpoint
    assert not list(folder.glob("*.tmp"))
    main(command)
    assert read_checkpoint(folder / "last.pth.tar")["epoch"] == 1


def test_other_files_of_a_run_that_cannot_be_written_are_named(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "eta.csv").mkdir(parents=True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(_command(images, tmp_path, ""))
    last = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 1
    assert last.startswith(f"train_alfa.py: error: {tmp_path / 'run' / 'eta.csv'}: Is a directory; ")
