"""timm's entry points of the CIFAR residual networks: names, depths and data settings."""

from __future__ import annotations

from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck

from .architecture import CifarResNet, SmallCifarResNet

__all__: list[str] = []  # register_model adds the entry points

# Mean and standard deviation of CIFAR-10's training pixels, per channel, on a scale from 0 to 1.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def _cfg(pool_size: tuple[int, int]) -> dict[str, Any] | PretrainedCfg:
    """Data settings for CIFAR-10, without weights; ``pool_size`` is that of the last features."""
    return PretrainedCfg(
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=pool_size,
        crop_pct=1.0,
        interpolation="bicubic",
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        first_conv="conv1",
        classifier="fc",
        paper_ids="arXiv:1512.03385",
    )


default_cfgs = generate_default_cfgs(
    {f"resnet{depth}s": _cfg((8, 8)) for depth in (20, 32, 44, 56, 110)}
    | {f"resnet{depth}_cifar": _cfg((4, 4)) for depth in (18, 34, 50, 101, 152)}
)


def _create_small(variant: str, blocks: int, pretrained: bool, **kwargs: Any) -> SmallCifarResNet:
    """Build a ``SmallCifarResNet`` with ``blocks`` basic blocks per stage."""
    model_args: dict[str, Any] = {"block": BasicBlock, "layers": (blocks,) * 3, **kwargs}
    feature_cfg = {"out_indices": (0, 1, 2, 3)}
    return build_model_with_cfg(SmallCifarResNet, variant, pretrained, feature_cfg=feature_cfg, **model_args)


def _create(
    variant: str, block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, ...], pretrained: bool, **kwargs: Any
) -> CifarResNet:
    """Build a four-stage ``CifarResNet``."""
    model_args: dict[str, Any] = {"block": block, "layers": layers, **kwargs}
    return build_model_with_cfg(CifarResNet, variant, pretrained, **model_args)


@register_model
def resnet20s(pretrained: bool = False, **kwargs: Any) -> SmallCifarResNet:
    """ResNet-20 for CIFAR, 9 basic blocks, 0.27 M parameters."""
    return _create_small("resnet20s", 3, pretrained, **kwargs)


@register_model
def resnet32s(pretrained: bool = False, **kwargs: Any) -> SmallCifarResNet:
    """ResNet-32 for CIFAR, 15 basic blocks, 0.46 M parameters."""
    return _create_small("resnet32s", 5, pretrained, **kwargs)


@register_model
def resnet44s(pretrained: bool = False, **kwargs: Any) -> SmallCifarResNet:
    """ResNet-44 for CIFAR, 21 basic blocks, 0.66 M parameters."""
    return _create_small("resnet44s", 7, pretrained, **kwargs)


@register_model
def resnet56s(pretrained: bool = False, **kwargs: Any) -> SmallCifarResNet:
    """ResNet-56 for CIFAR, 27 basic blocks, 0.85 M parameters."""
    return _create_small("resnet56s", 9, pretrained, **kwargs)


@register_model
def resnet110s(pretrained: bool = False, **kwargs: Any) -> SmallCifarResNet:
    """ResNet-110 for CIFAR, 54 basic blocks, 1.73 M parameters."""
    return _create_small("resnet110s", 18, pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 with a CIFAR stem, 11.2 M parameters."""
    return _create("resnet18_cifar", BasicBlock, (2, 2, 2, 2), pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-34 with a CIFAR stem, 21.3 M parameters."""
    return _create("resnet34_cifar", BasicBlock, (3, 4, 6, 3), pretrained, **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50 with a CIFAR stem, 23.5 M parameters."""
    return _create("resnet50_cifar", Bottleneck, (3, 4, 6, 3), pretrained, **kwargs)


@register_model
def resnet101_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-101 with a CIFAR stem, 42.5 M parameters."""
    return _create("resnet101_cifar", Bottleneck, (3, 4, 23, 3), pretrained, **kwargs)


@register_model
def resnet152_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-152 with a CIFAR stem, 58.2 M parameters."""
    return _create("resnet152_cifar", Bottleneck, (3, 8, 36, 3), pretrained, **kwargs)
