"""The command as it is started for real: several processes, the module, the script."""

from __future__ import annotations

import csv
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from launch import ROOT, TORCHRUN, start
from training_images import make_image_folder

FLAGS = (
    "--model test_resnet --img-size 32 --num-classes 3 -b 4 --workers 0 --lr 0.01 --epochs 2 --experiment run "
    "--model-ema --grad-accum-steps 2"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


def test_two_processes_train_validate_save_once_and_resume(images: Path, tmp_path: Path):
    arguments = [*FLAGS.split(), "--data-dir", str(images), "--output", str(tmp_path), "--alfa-blocks", "layer4"]
    done = start([*TORCHRUN, str(ROOT / "train_alfa.py"), *arguments, "--stop-epoch", "1"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--result") == 1
    assert done.stderr.count("Train: 0 [   1/2 (100%)]") == 1
    assert "Warning" not in done.stderr

    done = start([*TORCHRUN, "-m", "timm_alfa.train", *arguments, "--resume", "auto"])
    assert done.returncode == 0, done.stderr
    assert "Resumed from" in done.stderr
    assert "no random states" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with open(tmp_path / "run" / "summary.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    assert len(checkpoint["random_states"]) == 2
    assert not any(name.startswith("module.") for name in checkpoint["state_dict"])


def test_of_several_processes_one_reports_a_mistake(tmp_path: Path):
    done = start([*TORCHRUN, "-m", "timm_alfa.train", "--data-dir", str(tmp_path / "missing")])
    assert done.returncode != 0
    assert done.stderr.count("train_alfa.py: error: ") == 1
    assert "exitcode  : 2" in done.stderr


def test_a_mistake_ends_the_script_with_code_2_and_one_line():
    done = start([sys.executable, "-m", "timm_alfa.train", "--epochs", "none"])
    assert done.returncode == 2
    assert done.stderr == "train_alfa.py: error: argument --epochs: invalid int value: 'none'\n"
    assert done.stdout == ""
