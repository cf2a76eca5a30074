"""The residual networks for 32x32 images that the ALFA paper trains, registered with timm.

Importing this package is all that is needed:

    import timm, timm_alfa.models
    model = timm.create_model("resnet56s", num_classes=10)

``resnet20s`` to ``resnet110s`` are the CIFAR networks of He et al. (2016), section 4.2. ``resnet18_cifar`` to
``resnet152_cifar`` are the ImageNet networks with a 3x3 stem and no max-pooling.
"""

from __future__ import annotations

from .architecture import CifarResNet, PadShortcut, SmallCifarResNet
from .resnet_cifar import (
    resnet18_cifar,
    resnet20s,
    resnet32s,
    resnet34_cifar,
    resnet44s,
    resnet50_cifar,
    resnet56s,
    resnet101_cifar,
    resnet110s,
    resnet152_cifar,
)

__all__ = [
    "CifarResNet",
    "PadShortcut",
    "SmallCifarResNet",
    "resnet18_cifar",
    "resnet20s",
    "resnet32s",
    "resnet34_cifar",
    "resnet44s",
    "resnet50_cifar",
    "resnet56s",
    "resnet101_cifar",
    "resnet110s",
    "resnet152_cifar",
]
