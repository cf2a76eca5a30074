"""``--unlabeled-dir``: joins every batch, resumes exactly, and says in one line what does not go with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_alfa.errors import UsageError
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.data.unlabeled_images import JoinedLoader

SHARES = ["--alfa-blocks", "layer2", "--alfa-alpha", "2%", "--alfa-eps", "2%"]
KL = [*SHARES, "--alfa-objective", "kl", "--alfa-init", "uniform"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty grey images, some of them in a folder of its own."""
    root = tmp_path / "unlabelled"
    (root / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(20):
        path = root / ("more" if index % 2 else "") / f"{index}.png"
        Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
    return root


def _train(folder: Path, output: Path, *flags: str) -> dict[str, torch.Tensor]:
    main(["--dataset", "digits", "--model", "resnet20s", "--img-size", "16", "--batch-size", "8", "--workers", "0",
          "--unlabeled-dir", str(folder), "--train-fraction", "0.05", "--output", str(output), "--experiment", "run",
          "--opt", "sgd", "--lr", "0.01", "--sched", "none", "--warmup-epochs", "0", "--hflip", "0.5",
          *KL, *flags])  # fmt: skip
    checkpoint = torch.load(output / "run" / "last.pth.tar", weights_only=False)  # this run's own, with its arguments
    weights: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return weights


def test_a_run_trains_with_them_and_resumes_to_the_bit(folder: Path, tmp_path: Path):
    whole = _train(folder, tmp_path / "whole", "--epochs", "2")
    _train(folder, tmp_path / "parts", "--epochs", "2", "--stop-epoch", "1")
    resumed = _train(folder, tmp_path / "parts", "--epochs", "2", "--resume", "auto")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    summary = (tmp_path / "whole" / "run" / "summary.csv").read_text()
    assert "delta_ratio_layer2" in summary


def test_a_dry_run_takes_them(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--dataset", "digits", "--model", "resnet20s", "--img-size", "16", "--batch-size", "8", "--workers", "0",
          "--unlabeled-dir", str(folder), "--output", str(tmp_path), "--alfa-dry-run", *KL])  # fmt: skip
    assert "layer2" in capsys.readouterr().out


def test_batches_are_joined_and_the_shorter_loader_starts_again():
    labelled = DataLoader([(torch.full((1,), index), index) for index in range(6)], batch_size=2)
    others = DataLoader([(torch.full((1,), 100 + index), -1) for index in range(4)], batch_size=2)
    joined = JoinedLoader(labelled, others)
    assert len(joined) == 3
    for _ in range(2):
        found = [(images.flatten().tolist(), target.tolist()) for images, target in joined]
        assert found == [([0, 1, 100, 101], [0, 1]), ([2, 3, 102, 103], [2, 3]), ([4, 5, 100, 101], [4, 5])]
    assert joined.dataset is labelled.dataset


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--alfa-blocks layer2", "needs a loss without labels; add --alfa-objective kl"),
        ("", "needs a loss without labels; add --alfa-objective kl"),
        ("--alfa-blocks layer2 --alfa-objective kl", "add --alfa-init uniform and a bound"),
        (" ".join([*KL, "--mixup", "0.2"]), "--mixup 0.2: does not go with --unlabeled-dir"),
    ],
)
def test_flags_that_do_not_go_with_it(flags: str, message: str, folder: Path):
    with pytest.raises(UsageError, match=message):
        parse_args(["--dataset", "digits", "--model", "resnet20s", "--unlabeled-dir", str(folder), *flags.split()])


def test_a_folder_that_is_not_there_or_too_small(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UsageError, match="no such folder"):
        parse_args(["--dataset", "digits", "--model", "resnet20s", "--unlabeled-dir", str(tmp_path / "none"), *KL])
    with pytest.raises(SystemExit) as exit_code:
        _train(folder, tmp_path / "out", "--batch-size", "32")
    assert exit_code.value.code == 2
    assert "has 20 images, expected at least one batch, 32" in capsys.readouterr().err
