"""A device that is not there, in every command that takes one: one line, exit code 2."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from training_images import make_image_folder

from timm_alfa.bench import loop, step
from timm_alfa.bench.common import run as run_bench
from timm_alfa.errors import UsageError
from timm_alfa.robust.command import main as robust
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.device import check_device, prepare_device

ABSENT = (
    "cuda", "cuda:7", "mps", "mps:1", "xpu", "xpu:0", "mtia", "hpu", "npu", "hip", "xla", "vulkan", "meta",
    "privateuseone", "mkldnn", "opengl", "cpu:7", "gpu", "cuda:-1", "cuda:x", "",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for back_end in (torch.cuda, torch.xpu, torch.mps):
        monkeypatch.setattr(back_end, "is_available", lambda: False, raising=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=1, validation=1)


def _train(arguments: Sequence[str]) -> None:
    main([*arguments, "--model", "test_resnet", "--alfa-list-blocks"])


def _attack(arguments: Sequence[str]) -> None:
    robust([*arguments, "--model", "test_resnet", "--initial-checkpoint", "none", "--dataset", "digits"])


def _measure_steps(arguments: Sequence[str]) -> None:
    run_bench("step", step.main, arguments)


def _measure_loops(arguments: Sequence[str]) -> None:
    run_bench("loop", loop.main, arguments)


@pytest.mark.parametrize("name", ABSENT)
@pytest.mark.parametrize("command", [_train, _attack, _measure_steps, _measure_loops])
def test_a_device_that_is_not_there_is_one_line(
    command: Callable[[Sequence[str]], None], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command([f"--device={name}"])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1
    assert f"--device {name}: " in error


def test_nothing_is_written_for_it(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data-dir", str(images), "--output", str(tmp_path / "out"), "--device", "mps"])
    assert "no MPS device here; leave the flag out to train on the CPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_it_may_come_from_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "args.yaml"
    path.write_text("device: xpu")
    with pytest.raises(UsageError, match="--device xpu"):
        parse_args(["--config", str(path)])
    path.write_text("device: cuda")  # as every run records it that was not told otherwise
    assert parse_args(["--config", str(path)]).device == "cuda"


def test_a_device_is_one_of_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cpu", "cpu:0", "cuda", "cuda:0", "cuda:1"):
        check_device(device, given=True)
    with pytest.raises(UsageError, match=r"--device cuda:2: no such device here, there is cuda:0 to cuda:1$"):
        check_device("cuda:2", given=True)
    with pytest.raises(UsageError, match="leave the flag out to train on CUDA"):
        check_device("mps", given=True)


def test_every_process_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_device("cuda", given=False)
    check_device("cpu", given=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"4 processes on .* need a device each, there is only cuda:0 to"):
        check_device("cuda", given=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_RANK", "2")  # another launcher
    with pytest.raises(UsageError, match="3 processes"):
        check_device("cuda", given=False)


@pytest.mark.parametrize("module", ["no_such_module", "", ".relative", "raises_when_imported"])
def test_a_module_that_cannot_be_imported_is_named(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raises_when_imported.py").write_text("raise OSError('no driver')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=f"^--device-modules {module}: cannot be imported"):
        parse_args(["--device-modules", module])


def test_a_device_that_fails_when_it_is_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_sizes: int, device: torch.device) -> None:
        raise RuntimeError(f"{device} is busy\nand more")

    monkeypatch.setattr(torch, "zeros", fail)
    args = argparse.Namespace(device="cpu", fast_norm=False)
    with pytest.raises(UsageError, match=r"^--device cpu: cannot be used: cpu is busy and more$"):
        prepare_device(args)


def test_the_default_gives_way_to_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    args = parse_args([])
    with caplog.at_level(logging.INFO):
        assert prepare_device(args) == torch.device("cpu")
    assert "training on the CPU" in caplog.text
