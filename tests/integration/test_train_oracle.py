"""With ALFA off the command ends with the weights that timm's own train.py ends with, bit for bit.

Runs where the environment variable TIMM_TRAIN_PY names that script (main of 2026-08; of 2026-09 or newer for labels).
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from training_images import make_image_folder

from timm_alfa.export import export_model

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

OURS = Path(__file__).parents[2] / "train_alfa.py"
TAUGHT = {
    "logit": "--kd-temperature 2 --task-loss-weight 0.3 --amp --amp-dtype bfloat16",
    "feature": "--kd-distill-type feature --model test_efficientnet --distill-loss-weight 3 --clip-grad 1",
    "token": "--kd-distill-type token --kd-token-distill-type hard --model deit_tiny_distilled_patch16_224 "
             "--model-kwargs img_size=32 patch_size=16 embed_dim=12 depth=2 num_heads=2",
}  # fmt: skip
NAMES = ("cat", "dog", "big")
LABELLED = {
    "mixed": "--smoothing 0.1 --bce-pos-weight 2",
    "plain": "--mixup 0 --cutmix 0 --bce-sum",
    "several fields": "--target-key cat,dog,big --eval-metric macro_f1 --multilabel-threshold 0.4",
}


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
    _assert_same_weights(COMMON + CASES[case], image_folder, tmp_path)


def _assert_same_weights(arguments: str, data: Path, tmp_path: Path) -> None:
    theirs = _weights(Path(os.environ["TIMM_TRAIN_PY"]), arguments, data, tmp_path / "timm")
    ours = _weights(OURS, arguments, data, tmp_path / "ours")
    for key, expected in theirs.items():
        assert ours[key].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(ours[key][name], tensor), (key, name)


@pytest.mark.parametrize("case", TAUGHT)
def test_weights_equal_those_of_timm_with_a_teacher(case: str, image_folder: Path, tmp_path: Path):
    export_model(timm.create_model("test_resnet", num_classes=3), tmp_path / "teacher")
    teacher = f" --kd-model-name local-dir:{tmp_path / 'teacher'} --opt adamw --lr 1e-3 --drop 0.1 "
    _assert_same_weights(COMMON + teacher + TAUGHT[case], image_folder, tmp_path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with lists of labels, and with a field for each."""
    pytest.importorskip("webdataset")  # the test extra has it
    root, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 8)):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for index in range(count):
                image, present = io.BytesIO(), random.integers(0, 2, 3).tolist()
                Image.fromarray(random.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(image, "png")
                fields = {"labels": np.flatnonzero(present).tolist(), **dict(zip(NAMES, present, strict=True))}
                for ending, content in (("png", image.getvalue()), ("json", json.dumps(fields).encode())):
                    item = tarfile.TarInfo(f"{index:03}.{ending}")
                    item.size = len(content)
                    tar.addfile(item, io.BytesIO(content))
    return root


@pytest.mark.parametrize("case", LABELLED)
def test_weights_equal_those_of_timm_with_labels(case: str, shards: Path, tmp_path: Path):
    if "--target-format" not in Path(os.environ["TIMM_TRAIN_PY"]).read_text():
        pytest.skip("TIMM_TRAIN_PY is older than --task multilabel")
    arguments = (
        f"{COMMON} --dataset wds/ --train-split train.tar|24 --val-split validation.tar|8 --task multilabel "
        f"--opt adamw --lr 1e-3 --drop 0.1 --target-key labels {LABELLED[case]}"
    )
    _assert_same_weights(arguments, shards, tmp_path)
