from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_images import make_image_folder

from timm_alfa.bench import loader
from timm_alfa.errors import UsageError

FLAGS = "--model test_resnet --input-size 3 40 36 --crop-padding 2 --color-jitter 0 -b 4 --rounds 3 --batches 2"


def test_both_loaders_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = make_image_folder(tmp_path / "images", train=4)
    loader.main([*FLAGS.split(), "--data-dir", str(images), "--report", str(tmp_path / "loader")])
    table = capsys.readouterr().out
    assert (tmp_path / "loader.md").read_text() == table
    speeds = json.loads((tmp_path / "loader.json").read_text())["images_per_second"]
    assert list(speeds) == ["timm's loader", "--cache-images"]
    timm, cached = speeds.values()
    assert f"| timm's loader | {timm:,.0f} | 1.0 |" in table
    assert f"| --cache-images | {cached:,.0f} | {cached / timm:.1f} |" in table


def test_preprocessing_is_that_of_training(tmp_path: Path):
    images = make_image_folder(tmp_path / "images", train=4)
    with pytest.raises(UsageError, match="--mean, --std: expected one value per channel, or one for all"):
        loader.main([*FLAGS.split(), "--data-dir", str(images), "--mean", "0.1", "0.2"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rounds 0", "--rounds 0: expected a whole number of at least 1"),
        ("--data-dir nowhere", "--cache-images: cannot resize images anew"),
        ("--data-dir nowhere --no-aug", "--data-dir nowhere: no such folder"),
        ("--roundz 3", "unrecognized arguments: --roundz"),
    ],
)
def test_mistakes(flags: str, message: str):
    with pytest.raises(UsageError, match=message):
        loader.main(flags.split())
