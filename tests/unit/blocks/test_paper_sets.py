"""The paper's sets of blocks: their names, and that each one trains as the plain implementation says."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from reference.plain_alfa import plain_alfa
from torch import nn
from toys import batch

import timm_alfa  # noqa: F401  # registers the CIFAR networks
from timm_alfa import AlfaTask
from timm_alfa.blocks.resolve import resolve_blocks
from timm_alfa.errors import BlockError

EIGHT_OF_18 = [f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1)]
EIGHT_OF_50 = [
    "layer1.1", "layer2.0", "layer2.2", "layer3.0", "layer3.2", "layer3.4", "layer4.0", "layer4.2",
]  # fmt: skip
NINE_OF_56S = [
    "act1", "layer1.3", "layer1.6", "layer2.0", "layer2.4", "layer2.7", "layer3.1", "layer3.5", "layer3.8",
]  # fmt: skip
CONVOLUTIONS_OF_18 = [
    "conv1",
    "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2",
    "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv1", "layer2.1.conv2",
    "layer3.0.conv1", "layer3.0.conv2", "layer3.0.downsample.0", "layer3.1.conv1", "layer3.1.conv2",
    "layer4.0.conv1", "layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv1", "layer4.1.conv2",
]  # fmt: skip
SETS = [
    ("resnet18", "@paper4", ["layer1", "layer2", "layer3", "layer4"]),
    ("resnet18", "@paper9", ["maxpool", *EIGHT_OF_18]),
    ("resnet18", "@paper20", CONVOLUTIONS_OF_18),
    ("resnet18_cifar", "@paper4", ["layer1", "layer2", "layer3", "layer4"]),
    ("resnet18_cifar", "@paper9", ["act1", *EIGHT_OF_18]),
    ("resnet18_cifar", "@paper20", CONVOLUTIONS_OF_18),
    ("resnet50", "@paper9", ["maxpool", *EIGHT_OF_50]),
    ("resnet50_cifar", "@paper9", ["act1", *EIGHT_OF_50]),
    ("resnet56s", "@paper9", NINE_OF_56S),
]


def create(name: str, keyword: str) -> nn.Module:
    """The network, thin; but the width of the first stage decides whether its shortcut has a convolution."""
    options: dict[str, Any] = {}
    if name != "resnet56s":
        options["channels"] = (64 if keyword == "@paper20" else 4, 6, 8, 8)
    return timm.create_model(name, num_classes=10, **options)


@pytest.mark.parametrize(("name", "keyword", "expected"), SETS)
def test_names(name: str, keyword: str, expected: list[str]) -> None:
    assert len(expected) == int(keyword.removeprefix("@paper"))
    with torch.device("meta"):
        model = timm.create_model(name)
    assert list(resolve_blocks(model, keyword)) == expected


@pytest.mark.parametrize(
    ("name", "keyword"),
    [
        ("resnet20s", "@paper9"), ("resnet101", "@paper9"), ("resnet50", "@paper4"), ("resnet50", "@paper20"),
        ("resnet56s", "@paper20"), ("test_vit", "@paper4"),
    ],
)  # fmt: skip
def test_other_networks_have_no_such_set(name: str, keyword: str) -> None:
    with pytest.raises(BlockError, match=rf"^'{keyword}' is a set for ResNet-18"):
        resolve_blocks(timm.create_model(name), keyword)


def test_an_unknown_set_names_the_known_ones() -> None:
    with pytest.raises(BlockError, match="@paper4, @paper9, @paper20"):
        resolve_blocks(create("resnet56s", "@paper9"), "@paper5")


def test_a_glob_gives_the_nine_blocks_of_resnet20s() -> None:
    names = list(resolve_blocks(timm.create_model("resnet20s"), "layer*.*"))
    assert names == [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in (0, 1, 2)]


@pytest.mark.parametrize(("name", "keyword"), [(name, keyword) for name, keyword, _ in SETS])
def test_parity(name: str, keyword: str) -> None:
    """With the l2 norm, which normalises sample by sample: the sign would forgive a gradient that is a bit off."""
    torch.manual_seed(1)
    model = create(name, keyword).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # zero-initialised ones would hide what comes before them
            nn.init.uniform_(module.weight, 0.5, 1.5)
    images, target = batch(48 if name in ("resnet18", "resnet50") else 16, 3)
    task = AlfaTask(model, F.cross_entropy, keyword, alpha=0.01, norm="l2", verbose=False)
    blocks = task.engine.blocks
    expected = plain_alfa(model, F.cross_entropy, images, target, blocks, alpha=0.01, steps=1, norm="l2")
    whole = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    for _ in range(2):  # the second step cuts the graph where the first one saw outputs that bypass a block
        model.zero_grad()
        result = task(images, target)
        result["loss"].backward()
        torch.testing.assert_close(result["loss"].detach(), expected.loss.detach(), rtol=1e-9, atol=0)
        assert list(result["loss_adv_by_block"]) == list(reversed(blocks))
        for block, loss in result["loss_adv_by_block"].items():
            torch.testing.assert_close(loss, expected.adversarial[block].detach(), rtol=1e-9, atol=0)
        for parameter_name, parameter in model.named_parameters():
            gradient = expected.gradients[parameter_name]
            error = (parameter.grad - gradient).norm()
            assert error < 1e-9 * max(gradient.norm(), 1e-6 * whole), parameter_name
