"""Lists of modules and parameters that follow the model, and a step that does not walk it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch import nn
from toys import Small

from timm_alfa import AlfaTask
from timm_alfa.engine.inventory import Inventory


def test_it_follows_freezing_replacing_and_adding() -> None:
    model = Small()
    inventory = Inventory(model)
    assert inventory.trainable() == list(model.parameters())
    model.stem.requires_grad_(False)
    assert all(found is own for found, own in zip(inventory.trainable(), list(model.parameters())[4:], strict=True))
    model.stem.requires_grad_(True)
    assert len(inventory.trainable()) == len(list(model.parameters()))
    model.head = nn.Linear(8, 3)
    inventory.refresh()
    assert inventory.trainable()[-1] is model.head.bias
    model.neck.append(nn.BatchNorm1d(8))
    inventory.refresh()
    assert model.neck[2] in inventory.modules
    model.head.bias = None
    inventory.refresh()
    assert inventory.trainable()[-1] is not None
    assert len(inventory.parameters) == len(list(model.parameters()))
    model.head.weight = nn.Parameter(torch.zeros(3, 8))
    inventory.refresh()
    assert any(parameter is model.head.weight for parameter in inventory.trainable())


def test_shared_parameters_count_once() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    assert len(Inventory(model).trainable()) == 3


def test_checkpointing_is_read_anew() -> None:
    model = timm.create_model("test_resnet")
    inventory = Inventory(model)
    assert inventory.checkpointing() == []
    model.set_grad_checkpointing(True)
    assert inventory.checkpointing() == [model]


def test_it_knows_devices() -> None:
    model = Small()
    inventory = Inventory(model)
    assert inventory.accelerators() == ()
    model.to("meta")
    inventory.refresh()
    assert inventory.accelerators() == (torch.device("meta"),)


def count_calls(function: Any) -> int:
    """Calls of Python functions."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


# What a step may cost the host, in Python calls of a plain one: PGD-1, PGD-5, and L-ALFA at the stages. Counted, not
# timed: the same on every machine, but for what torch itself calls, which differs from version to version.
BARS = (1.4, 2.2, 6.0)
SIZES = {"resnet20s": 32, "resnet50": 64, "test_vit": 160, "efficientnet_b0": 64, "convnext_atto": 64}


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


@pytest.mark.skipif(OLD, reason="counted with torch 2.14; older ones call more of their own")
@pytest.mark.parametrize("name", SIZES)
def test_a_step_makes_few_python_calls(name: str) -> None:
    size = SIZES[name]
    images, target = torch.randn(2, 3, size, size), torch.tensor([1, 2])

    def calls_of(make: Any) -> int:
        model = timm.create_model(name, num_classes=10).train()
        task = make(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def step() -> None:
            task(images, target)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(4):
            step()
        return count_calls(step)

    criterion = nn.CrossEntropyLoss()
    plain = calls_of(lambda model: ClassificationTask(model, criterion, verbose=False))
    for bar, blocks, options in zip(
        BARS, ("@last", "@last", "@stages"), ({"steps": 1}, {"steps": 5}, {"learnable": True}), strict=True
    ):
        found = calls_of(
            lambda model, blocks=blocks, options=options: AlfaTask(model, criterion, blocks, verbose=False, **options)
        )
        assert found / plain <= bar, (blocks, options)
