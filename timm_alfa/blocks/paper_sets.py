"""The sets of blocks that the paper perturbs, by name (sections 4.3 and 4.4, Tables 8 and 9).

``@paper4``: ResNet-18's four stages. ``@paper9``: the stem and eight blocks, which are ResNet-18's own, every second of
ResNet-50's sixteen, and for ResNet-56s those of the released code. ``@paper20``: ResNet-18's twenty convolutions.
"""

from __future__ import annotations

from torch import nn

from ..errors import BlockError

PAPER_SETS = ("@paper4", "@paper9", "@paper20")

_RESNET18, _RESNET50, _RESNET56S = (2, 2, 2, 2), (3, 4, 6, 3), (9, 9, 9)
_NINE_OF_56S = (
    "layer1.3", "layer1.6", "layer2.0", "layer2.4", "layer2.7", "layer3.1", "layer3.5", "layer3.8",
)  # fmt: skip


def paper_set(model: nn.Module, name: str) -> list[str]:
    """The blocks of ``name`` in ``model``, first to last.

    Args:
        model: A ResNet with timm's names, for ImageNet or CIFAR.
        name: One of :data:`PAPER_SETS`.

    Raises:
        BlockError: The paper has no such set for this network.
    """
    depths = _depths(model)
    blocks = [f"layer{stage + 1}.{index}" for stage, depth in enumerate(depths) for index in range(depth)]
    if name == "@paper4" and depths == _RESNET18:
        return [f"layer{stage + 1}" for stage in range(4)]
    if name == "@paper9" and depths == _RESNET18:
        return [_stem(model), *blocks]
    if name == "@paper9" and depths == _RESNET50:
        return [_stem(model), *blocks[1::2]]
    if name == "@paper9" and depths == _RESNET56S:
        return [_stem(model), *_NINE_OF_56S]
    if name == "@paper20" and depths == _RESNET18:
        convolutions = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        if len(convolutions) == 20:  # not in variants with deeper stems or attention
            return convolutions
    known = {"@paper4": "ResNet-18", "@paper9": "ResNet-18, ResNet-50 and ResNet-56s", "@paper20": "ResNet-18"}[name]
    raise BlockError(f"{name!r} is a set for {known}, found {type(model).__name__} with {depths} blocks per stage")


def _depths(model: nn.Module) -> tuple[int, ...]:
    stages = [getattr(model, f"layer{index}", None) for index in range(1, 5)]
    return tuple(len(stage) for stage in stages if isinstance(stage, nn.Sequential))


def _stem(model: nn.Module) -> str:
    """The last module of the stem: a pooling layer, or in the CIFAR variants the activation."""
    maxpool = getattr(model, "maxpool", None)
    return "act1" if maxpool is None or isinstance(maxpool, nn.Identity) else "maxpool"
