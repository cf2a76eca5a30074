"""With ALFA off the command ends with the weights that timm's own train.py ends with, bit for bit.

Runs where the environment variable TIMM_TRAIN_PY names that script (main of 2026-08).
"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from training_images import make_image_folder

pytestmark = pytest.mark.skipif(
    "TIMM_TRAIN_PY" not in os.environ, reason="TIMM_TRAIN_PY names no copy of timm's train.py"
)

COMMON = (
    "--model test_resnet --img-size 32 --num-classes 3 --batch-size 4 --epochs 3 --warmup-epochs 1 --workers 0 "
    "--mixup 0.2 --cutmix 1.0 --model-ema --model-ema-decay 0.9 --aa rand-m9-mstd0.5-inc1 --log-interval 1 "
)
CASES = {
    "adamw": "--opt adamw --lr 1e-3 --weight-decay 0.05 --drop 0.1 --drop-path 0.1 --reprob 0.3 --seed 7 "
             "--model-ema-warmup",
    "sgd": "--opt momentum --lr-base 0.05 --sched multistep --decay-milestones 2 --clip-grad 1 --bce-loss "
           "--channels-last --mixup-off-epoch 2 --val-interval 2",
    "accumulation": "--opt lamb --grad-accum-steps 4 --sched-on-updates --clip-grad 0.1 --clip-mode agc "
                    "--no-prefetcher --amp --amp-dtype bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


def _weights(script: Path, arguments: str, data: Path, output: Path) -> dict[str, dict[str, torch.Tensor]]:
    command = [sys.executable, str(script), "--data-dir", str(data), *arguments.split(), "--device", "cpu",
               "--output", str(output), "--experiment", "run"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = torch.load(output / "run" / "last.pth.tar", weights_only=True)
    return {key: checkpoint[key] for key in ("state_dict", "state_dict_ema")}


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_of_timm(case: str, image_folder: Path, tmp_path: Path):
    ours_script = Path(__file__).parents[2] / "train_alfa.py"
    arguments = COMMON + CASES[case]
    theirs = _weights(Path(os.environ["TIMM_TRAIN_PY"]), arguments, image_folder, tmp_path / "timm")
    ours = _weights(ours_script, arguments, image_folder, tmp_path / "ours")
    for key, expected in theirs.items():
        assert ours[key].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(ours[key][name], tensor), (key, name)
