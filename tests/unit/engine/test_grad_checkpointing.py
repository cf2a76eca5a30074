"""Gradient checkpointing runs forwards again in backward: neither gradients nor statistics may notice ALFA."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper

CRITERION = nn.CrossEntropyLoss()
BLOCKS = ["layer3", "layer2"]


@pytest.fixture
def model(device: torch.device) -> nn.Module:
    created: nn.Module = timm.create_model("resnet10t", num_classes=5, zero_init_last=False)
    return created.double().to(device).train()


@pytest.fixture
def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, 64, 64, dtype=torch.float64).to(device), torch.tensor([0, 3, 4], device=device)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor], how: str, checkpointing: bool) -> nn.Module:
    model = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    images, target = batch
    if how == "plain":
        loss = CRITERION(model(images), target)
    elif how == "wrapper":
        loss = AlfaLoss(CRITERION)(AlfaWrapper(model, CRITERION, BLOCKS, steps=2)(images, target), target).loss
    else:
        loss = AlfaTask(model, CRITERION, BLOCKS, steps=2, verbose=False)(images, target)["loss"]
    loss.backward()
    return model


@pytest.mark.parametrize("how", ["wrapper", "task"])
def test_gradients_are_those_without_checkpointing(model: nn.Module, batch: tuple[Tensor, Tensor], how: str) -> None:
    kept, checkpointed = (backward(model, batch, how, checkpointing) for checkpointing in (False, True))
    for (name, expected), found in zip(kept.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("how", ["wrapper", "task"])
def test_statistics_move_as_in_a_plain_checkpointed_step(
    model: nn.Module, batch: tuple[Tensor, Tensor], how: str
) -> None:
    plain, alfa = backward(model, batch, "plain", True), backward(model, batch, how, True)
    assert any(int(buffer) == 2 for name, buffer in plain.named_buffers() if name.endswith("num_batches_tracked"))
    for (name, expected), found in zip(plain.named_buffers(), alfa.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0, msg=name)


def test_a_stage_is_found_although_its_blocks_run_one_by_one(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    model.set_grad_checkpointing(True)
    output = AlfaWrapper(model, CRITERION, ["layer4"])(*batch)
    assert output.deltas["layer4"].abs().max().item() == pytest.approx(0.5 / 255)
