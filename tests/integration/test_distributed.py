"""Several gloo ranks: averaged reference gradients, two nodes, and what a rank that dies leaves."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from reference.plain_alfa import plain_alfa
from torch import Tensor, nn
from toys import batch
from training_images import make_image_folder

from timm_alfa import AlfaTask
from timm_alfa.utils.distributed import leave_group

ROOT = Path(__file__).parents[2]
ALPHA = 0.05
BLOCKS = ["stem", "block", "neck"]
# (batch norm, batches per update, what is asked of the task)
OPTIONS: dict[str, dict[str, Any]] = {
    "ALFA": {"steps": 2},
    "L-ALFA": {"learnable": True, "eta_lr": 0.1, "gamma": 0.5},
    "sampled blocks": {"sample_blocks": 2},
}
CASES = list(itertools.product([True, False], [1, 2], OPTIONS))


class Net(nn.Module):
    """Smooth, so that rounding turns no sign; with or without batch norm."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), norm(6), nn.SiLU())
        self.block = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), norm(8), nn.SiLU())
        self.neck = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.neck(self.block(self.stem(x)).mean(dim=(2, 3)))))


def _net(batch_norm: bool, device: torch.device) -> Net:
    torch.manual_seed(0)
    return Net(batch_norm).double().to(device).train()


def _share(rank: int, index: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images, target = batch(6, 16, device=device)
    mine = slice(4 * rank, 4 * rank + 4)
    return images[mine] + 0.1 * index, target[mine]


def _rank(rank: int, world_size: int, folder: str, device: torch.device) -> None:
    device = processes.join_group(rank, world_size, folder, device)
    found = []
    for batch_norm, batches, name in CASES:
        model = _net(batch_norm, device)
        task = AlfaTask(model, nn.CrossEntropyLoss(), BLOCKS, alpha=ALPHA, verbose=False, **OPTIONS[name])
        task.prepare_distributed(None if device.type == "cpu" else [device])
        drawn = []
        for index in range(batches - 1):
            with task.no_sync():
                result = task(*_share(rank, index, device))
                (result["loss"] / batches).backward()
            drawn.append(list(result["loss_adv_by_block"]))
        result = task(*_share(rank, batches - 1, device))
        (result["loss"] / batches).backward()
        drawn.append(list(result["loss_adv_by_block"]))
        gradients = {key: value.grad for key, value in model.named_parameters()}
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        found.append((gradients, drawn, task.engine.eta.values.detach(), list(model.buffers())))
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


WORLD_SIZES = [2, 4]


@pytest.mark.ranks(*WORLD_SIZES)
def test_ranks_have_the_averaged_gradients_of_the_reference(
    tmp_path: Path, world_size: int, device: torch.device
) -> None:
    processes.call_ranks(_rank, (world_size, str(tmp_path), device), world_size, device)
    by_rank = [torch.load(tmp_path / f"{rank}.pt", map_location=device) for rank in range(world_size)]
    for case, (batch_norm, batches, name) in enumerate(CASES):
        _, drawn, eta, _ = by_rank[0][case]
        count = OPTIONS[name].get("sample_blocks", len(BLOCKS))
        assert all(len(blocks) == count for blocks in drawn)
        expected: dict[str, Tensor] = {}
        for rank in range(world_size):
            assert by_rank[rank][case][1] == drawn
            assert torch.equal(by_rank[rank][case][2], eta)
            model = _net(batch_norm, device)
            for index in range(batches):
                strengths = dict.fromkeys(BLOCKS, 1 / 3) if name == "L-ALFA" else None
                plain = plain_alfa(
                    model,
                    F.cross_entropy,
                    *_share(rank, index, device),
                    drawn[index],
                    alpha=ALPHA,
                    strengths=strengths,
                    steps=OPTIONS[name].get("steps", 1),
                    lam=len(BLOCKS) / count,
                )
                for key, gradient in plain.gradients.items():
                    expected[key] = expected.get(key, 0) + gradient / (batches * world_size)
            if rank == 0:  # whose statistics the others are given
                for mine, reference in zip(by_rank[0][case][3], model.buffers(), strict=True):
                    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=0)
        for rank in range(world_size):
            for key, gradient in by_rank[rank][case][0].items():
                torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-14)
        moved = eta.max() - eta.min() > 1e-6
        assert bool(moved) == (name == "L-ALFA")


COMMAND = (
    "--model resnet20s --img-size 16 --num-classes 3 -b 4 --workers 0 --lr 0.01 --warmup-epochs 0 --experiment run "
    "--alfa-blocks layer3 --resume auto"
)


def _arguments(images: Path, output: Path, epochs: int) -> list[str]:
    return [*COMMAND.split(), "--epochs", str(epochs), "--data-dir", str(images), "--output", str(output)]


def test_a_rank_that_dies_ends_the_others_in_one_line_and_the_run_resumes(tmp_path: Path) -> None:
    images = make_image_folder(tmp_path / "images", train=8)
    last = tmp_path / "run" / "last.pth.tar"
    children = processes.start_ranks(_arguments(images, tmp_path, 500), tmp_path / "killed", 2)
    while not last.exists() and not processes.has_ended(children[0]):
        time.sleep(0.01)
    os.kill(children[1], signal.SIGKILL)
    assert [processes.wait(child) for child in children] == [1, -signal.SIGKILL]
    lines = (tmp_path / "killed-0").read_text().splitlines()
    errors = [line for line in lines if "error" in line.lower() or "Traceback" in line]
    assert len(errors) == 1
    assert errors[0].startswith("train_alfa.py: error: another of the 2 processes is gone")
    epoch = torch.load(last, weights_only=False)["epoch"]

    children = processes.start_ranks(_arguments(images, tmp_path, epoch + 2), tmp_path / "resumed", 2)
    assert [processes.wait(child) for child in children] == [0, 0]
    results = json.loads((tmp_path / "resumed-0").read_text().partition("--result\n")[2])
    assert [result["epoch"] for result in results] == [epoch + 1]


@pytest.mark.slow
def test_two_nodes_train(tmp_path: Path) -> None:
    """Two launchers with two processes each, meeting over the loopback interface."""
    images = make_image_folder(tmp_path / "images", train=8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=two",
        "-m",
        "timm_alfa.train",
    ]
    nodes = [
        subprocess.Popen(
            [*launch, *_arguments(images, tmp_path, 2)], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    logs = [node.communicate()[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], logs
    assert sum(log.count("Training in 4 processes") for log in logs) == 1
    state = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)
    assert state["epoch"] == 1
    assert len(state["random_states"]) == 4
