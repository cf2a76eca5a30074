"""``@last`` and ``@stages`` in what users build around a backbone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from timm_alfa import AlfaTask, AlfaWrapper, BlockError, list_blocks, resolve_blocks

NARROW: dict[str, Any] = {"channels": (8, 8, 16, 16)}


def _resnet(**options: Any) -> nn.Module:
    return timm.create_model("resnet18", **NARROW, **options)


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25


class Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Pair(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right


STAGES = ["act1", "layer1", "layer2", "layer3", "layer4"]
WRAPPED = {
    "a head behind it": (lambda: Classifier(_resnet(num_classes=0)), "backbone.", STAGES),
    "normalisation in front": (lambda: nn.Sequential(Normalize(), _resnet()), "1.", STAGES),
    "both": (lambda: nn.Sequential(Normalize(), Classifier(_resnet(num_classes=0))), "1.backbone.", STAGES),
    "features only": (lambda: Classifier(_resnet(features_only=True)), "backbone.", STAGES),
    "without usable feature_info": (
        lambda: Classifier(timm.create_model("mvitv2_tiny")),
        "backbone.",
        [f"stages.{i}" for i in range(4)],
    ),
    "torchvision": (lambda: Classifier(torchvision.models.resnet18()), "backbone.", STAGES[1:]),
    "one module under two names": (lambda: (lambda one: Pair(one, one))(_resnet()), "left.", STAGES),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_backbones_stages(name: str) -> None:
    make, prefix, stages = WRAPPED[name]
    with torch.device("meta"):
        model = make()
    assert list(resolve_blocks(model, "@stages")) == [prefix + stage for stage in stages]
    assert list(resolve_blocks(model, "@last")) == [prefix + stages[-1]]


@pytest.mark.parametrize(
    ("name", "last", "count"),
    [
        ("resnet18", "layer4", 4),
        ("efficientnet_b0", "features.7", 7),
        ("convnext_tiny", "features.7", 7),
        ("vit_b_32", "encoder.layers.encoder_layer_11", 12),
        ("swin_t", "features.7", 5),
        ("regnet_y_400mf", "trunk_output.block4", 4),
        ("shufflenet_v2_x0_5", "stage4", 3),
        ("maxvit_t", "blocks.3", 4),
        ("vgg11", "features.20", 21),
        ("mobilenet_v3_small", "features.12", 13),
    ],
)
def test_torchvisions_models(name: str, last: str, count: int) -> None:
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # that one reads numbers of a tensor
        model = getattr(torchvision.models, name)()
    assert list(resolve_blocks(model, "@last")) == [last]
    assert len(resolve_blocks(model, "@stages")) == count


@pytest.mark.parametrize("keyword", ["@last", "@stages", "@paper4"])
def test_two_backbones_are_not_guessed_between(keyword: str) -> None:
    model = Pair(_resnet(), Classifier(_resnet()))
    meant = rf"'{keyword}' could mean 'left.layer4', 'right.backbone.layer4'.*2 backbones"
    with pytest.raises(BlockError, match=meant):
        resolve_blocks(model, keyword)
    assert list(resolve_blocks(model, "left.layer4")) == ["left.layer4"]


def _own(**parts: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


HEAD = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 5))


@pytest.mark.parametrize(
    ("model", "suggested"),
    [
        (_own(conv=nn.Conv2d(3, 8, 3), head=HEAD), "'conv', 'head'"),
        (_own(blocks=nn.ModuleList([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]), head=HEAD), r"'blocks\.1', 'head'"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5)), "'0', '1', '2'"),
        (_own(stem=nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), body=nn.Conv2d(8, 99, 3)), "'stem', 'body'"),
    ],
)
def test_a_head_or_a_stem_is_not_taken_for_the_last_stage(model: nn.Module, suggested: str) -> None:
    with pytest.raises(BlockError, match=rf"'@last' needs a model with feature_info .* such as {suggested}"):
        resolve_blocks(model, "@last")


def test_ones_own_list_of_blocks_is_taken_where_it_is_the_model() -> None:
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3))
    assert list(resolve_blocks(_own(features=features, classifier=nn.Linear(64, 5)), "@last")) == ["features.2"]
    assert list(resolve_blocks(nn.Sequential(Normalize(), _own(features=features)), "@last")) == ["1.features.2"]


def test_the_papers_sets_inside_a_module() -> None:
    model = nn.Sequential(Normalize(), _resnet())
    assert list(resolve_blocks(model, "@paper4")) == ["1.layer1", "1.layer2", "1.layer3", "1.layer4"]
    assert list(resolve_blocks(model, "@paper9"))[:2] == ["1.maxpool", "1.layer1.0"]
    with torch.device("meta"):
        cifar = nn.Sequential(Normalize(), timm.create_model("resnet56s"))
    assert list(resolve_blocks(cifar, "@paper9"))[:2] == ["1.act1", "1.layer1.3"]


def test_listed_blocks_mark_the_same_stages_and_know_the_backbones_input() -> None:
    model = nn.Sequential(Normalize(), timm.create_model("test_resnet", num_classes=5))
    infos = list_blocks(model)
    assert [info.name for info in infos if info.is_stage] == list(resolve_blocks(model, "@stages"))
    assert [info.tail_share for info in infos] == sorted((info.tail_share for info in infos), reverse=True)


def test_a_step_at_the_last_stage_of_a_wrapped_backbone(caplog: pytest.LogCaptureFixture) -> None:
    model = Classifier(_resnet(num_classes=0)).train()
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    assert list(AlfaWrapper(model, F.cross_entropy, "@last")(images, target).adv_outputs) == ["backbone.layer4"]
    with caplog.at_level(logging.INFO, "timm_alfa"):
        AlfaTask(model, F.cross_entropy, "@last")
        AlfaTask(model, F.cross_entropy, "@last", verbose=False)
    assert [message for message in caplog.messages if "@last" in message] == ["blocks @last: backbone.layer4"]
