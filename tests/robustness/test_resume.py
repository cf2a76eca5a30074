"""2 + 2 epochs are 4, bit for bit: everything that a checkpoint holds, on one rank and two, with data workers."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from summaries import reproducible_summary
from training_images import make_image_folder

from timm_alfa.train import main

COMMAND = (
    "--model resnet20s --img-size 16 --num-classes 3 -b 4 --epochs 4 --experiment run --opt adamw --lr 1e-3 "
    "--warmup-epochs 1 --sched-on-updates --alfa-blocks layer1 layer2 layer3 --alfa-learnable --alfa-gamma 0.5 "
    "--alfa-eta-lr 0.1 --alfa-sample-blocks 2 --alfa-steps 2 --model-ema --model-ema-decay 0.8 --model-ema-warmup "
    "--mixup 0.2 --drop 0.1 --aa rand-m9 --reprob 0.3 --grad-accum-steps 2"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=6)


def _run(images: Path, output: Path, extra: str, ranks: int) -> dict[str, Any]:
    output.mkdir(exist_ok=True)
    arguments = [*COMMAND.split(), "--data-dir", str(images), "--output", str(output), *extra.split()]
    children = processes.start_ranks(arguments, output / "log", ranks)
    assert [processes.wait(child) for child in children] == [0] * ranks, (output / "log-0").read_text()
    with torch.serialization.safe_globals([Namespace]):
        found: dict[str, Any] = torch.load(output / "run" / "last.pth.tar", weights_only=True)
    return found


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in _differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        parts = enumerate(zip(one, other, strict=True))
        return [found for index, pair in parts for found in _differences(*pair, f"{path}/{index}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    return [] if one == other else [path]


KINDS = [(0, 1), (2, 1), (0, 2), (2, 2)]


@pytest.mark.parametrize(
    ("workers", "ranks"), [pytest.param(*kind, marks=pytest.mark.slow) for kind in KINDS[:-1]] + KINDS[-1:]
)
def test_two_epochs_and_two_more_are_four(images: Path, tmp_path: Path, workers: int, ranks: int) -> None:
    flags = f"--workers {workers}"
    whole = _run(images, tmp_path / "whole", flags, ranks)
    early = _run(images, tmp_path / "parts", f"{flags} --stop-epoch 2", ranks)
    parts = _run(images, tmp_path / "parts", f"{flags} --resume auto", ranks)
    for state in (whole, early, parts):
        del state["args"]  # they say where the output goes, and whether to resume
    assert len(whole["random_states"]) == ranks
    assert _differences(whole, parts) == []
    changed = {path.split("/")[1] for path in _differences(whole, early)}
    assert changed >= {"state_dict", "state_dict_ema", "task_state", "random_states", "epoch", "optimizer"}
    folders = [tmp_path / name / "run" for name in ("whole", "parts")]
    assert reproducible_summary(folders[0]) == reproducible_summary(folders[1])
    assert (folders[0] / "eta.csv").read_text() == (folders[1] / "eta.csv").read_text()


def test_other_classes_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_image_folder(tmp_path / "data", train=2)
    command = [
        "--data-dir",
        str(data),
        "--model",
        "test_resnet",
        "--img-size",
        "32",
        "--num-classes",
        "3",
        "-b",
        "2",
        "--workers",
        "0",
        "--epochs",
        "2",
        "--lr",
        "0.01",
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
        "--resume",
        "auto",
    ]
    main([*command, "--stop-epoch", "1"])
    last = tmp_path / "run" / "last.pth.tar"
    for split in ("train", "validation"):
        (data / split / "b").rename(data / split / "d")
    before = last.read_bytes()
    (tmp_path / "map.txt").write_text("c\nd\na\n")
    (tmp_path / "same.txt").write_text("c\na\nb\n")
    start = f"train_alfa.py: error: --resume {last}: "
    other_names = f"{start}was trained on 3 classes, the data has 3: 'b' only in the checkpoint; 'd' only in the data; "
    for extra, message in (([], other_names), (["--class-map", str(tmp_path / "map.txt")], other_names)):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*command, *extra])
        assert caught.value.code == 2
        assert capsys.readouterr().err == f"{message}expected the same classes\n"
    for split in ("train", "validation"):
        (data / split / "d").rename(data / split / "b")
    with pytest.raises(SystemExit):
        main([*command, "--class-map", str(tmp_path / "same.txt")])
    assert capsys.readouterr().err == (
        f"{start}numbers its classes differently than the data; expected the same --class-map\n"
    )
    assert last.read_bytes() == before
    main(command)
