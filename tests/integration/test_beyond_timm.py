"""Models that are not timm's: torchvision's classifiers and segmentation networks, and a plain sequence of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tv
from families import replays_exactly, scatter_constants, step_errors
from torch import Tensor, nn

from timm_alfa import BlockError, resolve_blocks

TOLERANCE = 1e-8
# architecture -> arguments, input size, blocks
CLASSIFIERS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "resnet18": ({}, 64, ["layer2", "layer4"]),
    "mobilenet_v3_small": ({}, 64, ["features.6", "features.12"]),
    "densenet121": ({}, 64, ["features.denseblock2", "features"]),
    "convnext_tiny": ({}, 32, ["features.3", "features.7"]),
    "swin_t": ({}, 32, ["features.3", "features.7"]),
    "squeezenet1_1": ({}, 64, ["features.7", "features.12"]),
    "googlenet": ({"aux_logits": True, "init_weights": False}, 64, ["inception4c", "inception5b"]),
}


def lists_logits(output: Any, target: Tensor) -> Tensor:
    """Over the logits, and over those of auxiliary classifiers, which GoogLeNet returns beside them."""
    outputs = output if isinstance(output, tuple) else (output,)
    return torch.stack([F.cross_entropy(logits, target) for logits in outputs]).sum()


def segments(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output["out"], target)


def check(
    model: nn.Module, images: Tensor, target: Tensor, blocks: list[str], criterion: Any, device: torch.device
) -> None:
    scatter_constants(model)
    model, images, target = model.to(device), images.to(device), target.to(device)
    assert replays_exactly(model.eval(), images, blocks)
    expected, errors = step_errors(model.double().train(), images.double(), target, blocks, criterion)
    assert max(errors) < TOLERANCE
    assert all(abs(loss - expected.clean) > 10 * TOLERANCE for loss in expected.adversarial.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name: str, device: torch.device) -> None:
    options, size, blocks = CLASSIFIERS[name]
    check(
        tv.get_model(name, weights=None, num_classes=10, **options),
        torch.randn(2, 3, size, size),
        torch.tensor([1, 7]),
        blocks,
        lists_logits,
        device,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("fcn_resnet50", ["backbone.layer3", "backbone.layer4"]),
        ("deeplabv3_mobilenet_v3_large", ["backbone.9", "backbone"]),
    ],
)
def test_segmentation(name: str, blocks: list[str]) -> None:
    model = tv.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    check(model, torch.randn(2, 3, 32, 32), torch.randint(4, (2, 32, 32)), blocks, segments, torch.device("cpu"))


def test_a_plain_sequence(device: torch.device) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(8 * 49, 10),
    )
    check(model, torch.randn(4, 3, 16, 16), torch.arange(4), ["1", "3"], F.cross_entropy, device)


def test_the_last_block_is_known_or_not_guessed() -> None:
    assert list(resolve_blocks(tv.resnet18(weights=None, num_classes=10), "@last")) == ["layer4"]
    with pytest.raises(BlockError, match="'@last' needs a model with feature_info or one list of blocks"):
        resolve_blocks(tv.googlenet(weights=None, num_classes=10, init_weights=False), "@last")
