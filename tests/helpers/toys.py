"""Small models with one awkward habit each, and the five small timm models that parity is shown for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

# family: (architecture, arguments, image size, one block, a second block)
FAMILIES: dict[str, tuple[str, dict[str, Any], int, str, str]] = {
    "resnet": (
        "resnet18",
        {"channels": (8, 16, 24, 32), "zero_init_last": False, "drop_path_rate": 0.2},
        64,
        "layer4",
        "layer3",
    ),
    "efficientnet": ("test_efficientnet", {"drop_path_rate": 0.2}, 64, "blocks.4", "blocks.2"),
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "drop_path_rate": 0.2},
        32,
        "blocks.2",
        "blocks.0",
    ),
    "convnext": (
        "convnext_atto",
        {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "ls_init_value": 0.5, "drop_path_rate": 0.2},
        64,
        "stages.3",
        "stages.1",
    ),
    "densenet": (
        "densenet121",
        {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
        64,
        "features.denseblock4",
        "features.denseblock2",
    ),
}


Device = torch.device | str


def family(name: str, batch_size: int = 4, device: Device = "cpu") -> tuple[nn.Module, Tensor, Tensor]:
    """A float64 model in training mode with dropout (and drop-path), a batch, and labels of ten classes.

    Weights and numbers are the same on every device.
    """
    architecture, options, size, _, _ = FAMILIES[name]
    torch.manual_seed(1)
    model = timm.create_model(architecture, num_classes=10, drop_rate=0.2, **options).double().to(device).train()
    return model, *batch(size, batch_size, device=device)


def batch(
    size: int, batch_size: int = 4, dtype: torch.dtype = torch.float64, device: Device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random images [batch_size, 3, size, size] and labels of ten classes."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(batch_size, 3, size, size, generator=generator, dtype=dtype)
    return images.to(device), torch.randint(0, 10, (batch_size,), generator=generator).to(device)


class UNet(nn.Module):
    """A skip connection leads around the middle, and the head dropout draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.down2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.GELU())
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.down1(x))
        x = self.up(self.middle(self.down2(skip))) + skip
        return self.head(self.drop(x.mean(dim=(2, 3))))


class Branches(nn.Module):
    """Returns a dict that holds a list, an integer tensor and a number besides the feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 4, 3, padding=1)
        self.narrow = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"maps": [self.wide(x), self.narrow(x).mean(dim=(2, 3))], "index": rows(x), "scale": 2.0}


class Nested(nn.Module):
    """A block's output, and the model's own, are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.branches = Branches()
        self.head = nn.Linear(9, 10)
        self.auxiliary = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> dict[str, Any]:
        found = self.branches(torch.tanh(self.stem(x)))
        wide, narrow = found["maps"][0].mean(dim=(2, 3))[found["index"]], found["maps"][1]
        return {"logits": self.head(torch.cat([wide, narrow], 1) * found["scale"]), "extra": (self.auxiliary(wide),)}

    @staticmethod
    def criterion(output: dict[str, Any], target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy
        return loss(output["logits"], target) + 0.3 * loss(output["extra"][0], target)


class Shared(nn.Module):
    """The same two modules run before and after the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.mix = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.SiLU(inplace=True)
        self.block = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.mix(self.stem(x)))
        x = self.block(self.act(self.mix(x)))
        return self.head(self.act(self.mix(x)).mean(dim=(2, 3)))


class InPlace(nn.Module):
    """Remembered outputs are written into by functional glue and by in-place modules, before and after the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.skip = nn.Conv2d(6, 6, 1)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mul_(1.5)
        skip = self.skip(x)
        y = self.block(x)
        y += skip
        skip *= 0.5  # after the block had finished: a replay must find it as it was
        return self.head((self.act(y) * torch.sigmoid(skip)).mean(dim=(2, 3)))


class WritesInput(nn.Module):
    """Normalises what it is given in place, and reads it again behind the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(9, 10)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(1.7)
        y = torch.tanh(self.block(torch.tanh(self.stem(x))))
        return self.head(torch.cat([y.mean(dim=(2, 3)), x.mean(dim=(2, 3))], 1))


class Chain(nn.Module):
    """Returns a feature, another one that is computed from it, and that one again, as a stage with a neck does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = torch.tanh(self.first(x))
        second = torch.tanh(self.second(first))
        return first, second, second


class Dependent(nn.Module):
    """Of what a block returns, one tensor leads nowhere, one is computed from it, and one is in there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.chain = Chain()
        self.head = nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        _, second, again = self.chain(torch.tanh(self.stem(x)))
        return self.head((second * again.sigmoid()).mean(dim=(2, 3)))


class Repeated(nn.Module):
    """One block runs twice, one never, one is a list, one returns integers, one leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.never = nn.Conv2d(3, 3, 1)
        self.listed = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.integers = Integers()
        self.nowhere = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(x)))
        for module in self.listed:
            x = module(x)
        self.nowhere(x)
        return self.head(x.mean(dim=(2, 3))[self.integers(x)])


class Integers(nn.Module):
    """Row numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return rows(x)


def rows(x: Tensor) -> Tensor:
    """0 to B - 1, where ``x`` is."""
    return torch.arange(len(x), device=x.device)


class Small(nn.Module):
    """Two convolutions with batch norm and dropout, and a head; quick enough for twenty steps."""

    def __init__(self, drop: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout(drop)
        self.neck = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.drop(self.block(self.stem(x)).mean(dim=(2, 3)))))


class Drawing(nn.Module):
    """Stochastic depth and noise from whichever source of random numbers it is given, before and behind the block.

    Args:
        draw: Returns a number in [0, 1).
        owned: Whatever the numbers come from, if it is to be an attribute of a module.
    """

    def __init__(self, draw: Callable[[], float], owned: object = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(4)])
        self.head = nn.Linear(6, 10)
        self.layers[1].held = {"inside": [owned]}
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x)) * (0.5 + self.draw())
        x = torch.tanh(self.block(x))
        for layer in self.layers:
            x = x + layer(x) * (0.1 + self.draw())
        return self.head(x.mean(dim=(2, 3)))
