"""Checkpoints that do not fit what they are to go on with: one line, exit code 2, nothing written."""

from __future__ import annotations

import logging
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import NativeScaler
from training_images import make_image_folder

from timm_alfa.errors import UsageError
from timm_alfa.train import main
from timm_alfa.train.checkpoints.resume import _restore_scaler

BASE = (
    "--model test_resnet --img-size 32 --num-classes 3 -b 8 --workers 0 --opt adamw --lr 1e-3 --warmup-epochs 0 "
    "--epochs 2 --experiment run"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=6)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    main(_arguments(images, output, "--stop-epoch 1"))
    return output


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "out"


def _arguments(images: Path, output: Path, extra: str) -> list[str]:
    return [*BASE.split(), "--data-dir", str(images), "--output", str(output), *extra.split()]


def _change(output: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = output / "run" / "last.pth.tar"
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def _fails(arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line on which the command ends."""
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    return error


def _nothing(checkpoint: dict[str, Any]) -> None:
    pass


def _forget_flags(checkpoint: dict[str, Any]) -> None:
    del checkpoint["args"]


def _forget_optimizer(checkpoint: dict[str, Any]) -> None:
    del checkpoint["optimizer"]


def _no_optimizer(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer"] = None


def _empty_optimizer(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer"]["state"] = {}


def _misshapen_optimizer(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer"]["state"][3]["exp_avg_sq"] = torch.zeros(5)


def _number_for_a_state(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer"]["state"][3] = 7


def _another_model(checkpoint: dict[str, Any]) -> None:
    _forget_flags(checkpoint)
    checkpoint["state_dict"] = timm.create_model("test_vit", num_classes=3).state_dict()


def _other_classes(checkpoint: dict[str, Any]) -> None:
    _forget_flags(checkpoint)
    checkpoint["state_dict"]["fc.weight"] = torch.zeros(7, checkpoint["state_dict"]["fc.weight"].shape[1])


OPTIMIZER = "its optimizer state does not fit --opt "
CASES: dict[str, tuple[Callable[[dict[str, Any]], None], str, str]] = {
    "another optimizer": (_nothing, "--opt sgd", "--opt sgd, but the run was started with --opt adamw"),
    "another optimizer, flags unknown": (_forget_flags, "--opt sgd", OPTIMIZER + "sgd"),
    "a like optimizer, flags unknown": (_forget_flags, "--opt lion", OPTIMIZER + "lion"),
    "an unlike optimizer, flags unknown": (_forget_flags, "--opt lamb", OPTIMIZER + "lamb"),
    "layer decay, flags unknown": (_forget_flags, "--layer-decay 0.5", OPTIMIZER + "adamw"),
    "no decay, flags unknown": (_forget_flags, "--weight-decay 0", OPTIMIZER + "adamw"),
    "no optimizer": (_forget_optimizer, "", OPTIMIZER + "adamw: there is none"),
    "optimizer None": (_no_optimizer, "", OPTIMIZER + "adamw: there is none"),
    "empty optimizer": (_empty_optimizer, "", OPTIMIZER + "adamw: it is empty"),
    "misshapen optimizer": (_misshapen_optimizer, "", OPTIMIZER + "adamw: exp_avg_sq is [5] for a parameter of"),
    "broken optimizer": (_number_for_a_state, "", OPTIMIZER + "adamw"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_that_does_not_fit_is_one_line_and_can_be_left_out(
    images: Path, output: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, extra, said = CASES[case]
    path = _change(output, change)
    for resume in ("auto", str(path)):
        error = _fails(_arguments(images, output, f"--resume {resume} {extra}"), output, capsys)
        assert error.startswith(f"train_alfa.py: error: --resume {path}: {said}")
        assert "--no-resume-opt goes on with a new optimizer" in error
    main(_arguments(images, output, f"--resume auto --no-resume-opt {extra}"))
    with torch.serialization.safe_globals([Namespace]):
        assert torch.load(path, weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("change", [_another_model, _other_classes])
def test_weights_of_another_model_are_one_line(
    images: Path, output: Path, change: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    _change(output, change)
    for extra in ("", "--no-resume-opt"):
        error = _fails(_arguments(images, output, f"--resume auto {extra}"), output, capsys)
        assert "does not fit --model test_resnet: " in error


def test_layers_frozen_otherwise_are_one_line(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen = "--layer-decay 0.5 --layer-decay-no-opt-scale"
    main(_arguments(images, tmp_path, f"{frozen} 0.1 --stop-epoch 1"))
    assert "--layer-decay-no-opt-scale 0.3, but" in _fails(
        _arguments(images, tmp_path, f"{frozen} 0.3 --resume auto"), tmp_path, capsys
    )
    _change(tmp_path, _forget_flags)
    assert OPTIMIZER in _fails(_arguments(images, tmp_path, f"{frozen} 0.3 --resume auto"), tmp_path, capsys)
    main(_arguments(images, tmp_path, f"{frozen} 0.1 --resume auto"))


def test_mixed_precision_may_begin_or_end(images: Path, output: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        main(_arguments(images, output, "--resume auto --amp --amp-dtype bfloat16"))
        assert "--amp (it was no --amp)" in caplog.text
        main(_arguments(images, output, "--resume auto --epochs 3"))
    assert "no --amp (it was --amp)" in caplog.text


def test_the_state_of_a_loss_scaler(caplog: pytest.LogCaptureFixture) -> None:
    states = NativeScaler(device="cpu"), NativeScaler(device="cpu")
    state = {**states[0].state_dict(), "scale": 8.0}
    _restore_scaler("file", state, states[1])
    assert states[1].state_dict()["scale"] == 8.0
    assert not caplog.messages
    _restore_scaler("file", None, states[1])
    assert "--resume file: was trained without a loss scaler, whose scale starts anew." in caplog.text
    for wrong in (3, {}, {**state, "scale": "x"}, {**state, "scale": torch.zeros(2)}, {"scale": 8.0}):
        with pytest.raises(UsageError, match=r"^--resume file: the state of its loss scaler cannot be used: .*"
                                             r"--no-resume-opt goes on without$"):  # fmt: skip
            _restore_scaler("file", wrong, NativeScaler(device="cpu"))
