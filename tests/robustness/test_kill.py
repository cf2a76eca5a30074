"""SIGKILL at any moment of a run: what is there resumes, and ends where an undisturbed run ends."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from summaries import reproducible_summary
from training_images import make_image_folder

from timm_alfa.run_folder.checkpoint import read_checkpoint

KILLS = 20
COMMAND = (
    "--model resnet20s --img-size 16 --num-classes 3 -b 6 --workers 0 --epochs 8 --experiment run --resume auto "
    "--opt adamw --lr 1e-3 --warmup-epochs 1 --alfa-blocks layer2 layer3 --alfa-learnable --model-ema "
    "--checkpoint-hist 2 --drop 0.1"
)


@pytest.mark.slow
def test_a_run_survives_being_killed(tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images", train=4, validation=1)

    def start(output: Path) -> int:
        output.mkdir(exist_ok=True)
        return processes.start([*COMMAND.split(), "--data-dir", str(images), "--output", str(output)], output / "log")

    begun = time.monotonic()
    assert processes.wait(start(tmp_path / "whole")) == 0, (tmp_path / "whole" / "log").read_text()
    duration = time.monotonic() - begun
    expected = read_checkpoint(tmp_path / "whole" / "run" / "last.pth.tar")

    choose = random.Random(0)
    kills = while_writing = runs = 0
    while kills < KILLS:
        runs += 1
        output = tmp_path / str(runs)
        epoch = -1
        while True:
            child = start(output)
            folder = output / "run"
            partial = folder / "tmp.pth.tar.tmp"
            known = partial.stat().st_ino if partial.exists() else None
            if kills == KILLS:
                pass  # the last run goes to its end
            elif kills % 2:  # while a checkpoint is being written
                while not processes.has_ended(child) and (not partial.exists() or partial.stat().st_ino == known):
                    time.sleep(0.0005)
            else:
                deadline = time.monotonic() + choose.uniform(0, duration)
                while not processes.has_ended(child) and time.monotonic() < deadline:
                    time.sleep(0.005)
            if kills < KILLS and not processes.has_ended(child):
                os.kill(child, signal.SIGKILL)
            code = processes.wait(child)
            if code == 0:  # it was at its end already
                break
            assert code == -signal.SIGKILL, (output / "log").read_text()
            kills += 1
            while_writing += partial.exists()
            last = folder / "last.pth.tar"
            if last.exists():
                found = read_checkpoint(last)["epoch"]
                assert found >= epoch
                epoch = found
            else:
                assert epoch == -1
        _assert_same(read_checkpoint(folder / "last.pth.tar"), expected)
        assert reproducible_summary(folder) == reproducible_summary(tmp_path / "whole" / "run")
        assert not list(folder.glob("*.tmp"))
    assert while_writing > 0


def _assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(tensor, found[key][name]) for name, tensor in expected[key].items()), key
    assert torch.equal(found["task_state"]["eta"]["eta"], expected["task_state"]["eta"]["eta"])
    assert found["epoch"] == expected["epoch"]
