"""A plain loop with L-ALFA, to hold other trainers to: a small model, its batches, and what training makes of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from toys import UNet, batch

from timm_alfa import AlfaLoss, AlfaWrapper

BLOCKS = ["down2", "middle"]
Batches = Sequence[tuple[Tensor, Tensor]]


def make_model() -> nn.Module:
    """The same in every call, in float64; without dropout, since trainers draw random numbers of their own."""
    torch.manual_seed(3)
    model = UNet().double()
    model.drop.p = 0.0
    return model


def make_batches(count: int = 4) -> Batches:
    """Of two images each."""
    images, target = batch(16, batch_size=2 * count)
    return list(zip(images.split(2), target.split(2), strict=True))


def make_alfa(model: nn.Module) -> tuple[AlfaWrapper, AlfaLoss]:
    """L-ALFA with a large learning rate for eta, so that its steps are seen."""
    criterion = nn.CrossEntropyLoss()
    alfa = AlfaWrapper(model, criterion, BLOCKS, alpha=0.1, steps=2, learnable=True, eta_lr=0.5)
    return alfa, AlfaLoss(criterion, gamma=1.0)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_plainly(batches: Batches, *, accumulate: int = 1) -> tuple[nn.Module, Tensor]:
    """The model after one pass over the batches, and its eta."""
    model = make_model()
    alfa, loss_fn = make_alfa(model)
    optimizer = make_optimizer(model)
    alfa.follow(optimizer)
    for index, (images, target) in enumerate(batches):
        (loss_fn(alfa(images, target), target).loss / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model, alfa.eta.values.detach()


def assert_trained_alike(model: nn.Module, eta: Tensor, expected: tuple[nn.Module, Tensor]) -> None:
    """Weights and eta are those of the plain loop, and did move."""
    start = make_model().state_dict()
    for name, value in expected[0].state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12)
        assert not torch.equal(value, start[name]), name
    torch.testing.assert_close(eta.detach(), expected[1], rtol=0, atol=1e-12)
    assert (eta - 1 / len(BLOCKS)).abs().max() > 1e-4


def join_group(rank: int, port: int) -> None:
    """What a launcher tells each of two processes."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
