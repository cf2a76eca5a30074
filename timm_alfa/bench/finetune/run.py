"""One fine-tuning run: an arm, a seed, a number of images; and what came of it."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

from ...engine.batchnorm import Statistics
from ...errors import UsageError
from ...peers import NoiseTask
from ...tasks.alfa import AlfaTask
from ...tasks.flags import size
from .data import Batches, Images, draw

METHODS = ("plain", "alfa", "noise", "sam", "asam")
BINS = 15
_KINDS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "float | str": size}


@dataclass(frozen=True)
class Arm:
    """What is trained: a method and its settings, written ``method:key=value,key=value``.

    Args:
        name: As written.
        method: One of :data:`METHODS`.
        block: Of ALFA and noise.
        alpha: Size of the step or of the noise, such as ``2%``.
        steps: Of the attack.
        norm: Of the attack.
        reduction: ``mean`` or ``sum``.
        objective: ``ce`` or ``kl``.
        space: ``values`` or ``moments``.
        rho: Radius of SAM and ASAM.
        smoothing: Label smoothing.
        mixup: alpha of Mixup; 0 for none.
        ema: Whether the averaged weights are evaluated.
        lr: Learning rate of AdamW.
        wd: Weight decay.
        epochs: How many times :attr:`Setting.epochs`.
    """

    name: str
    method: str = "plain"
    block: str = "@last"
    alpha: float | str = "2%"
    steps: int = 1
    norm: str = "linf"
    reduction: str = "mean"
    objective: str = "ce"
    space: str = "values"
    rho: float = 0.05
    smoothing: float = 0.0
    mixup: float = 0.0
    ema: int = 0
    lr: float = 1e-3
    wd: float = 0.05
    epochs: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read ``alfa:block=blocks.4,alpha=2%``.

        Raises:
            UsageError: No such method or key, or a value of another kind.
        """
        method, _, settings = text.partition(":")
        if method not in METHODS:
            raise UsageError(f"--arms {text}: expected {', '.join(METHODS)}, then :key=value,...")
        known = {item.name: item for item in fields(cls) if item.name not in ("name", "method")}
        values: dict[str, Any] = {}
        for part in filter(None, settings.split(",")):
            key, equals, value = part.partition("=")
            if key not in known or not equals:
                raise UsageError(f"--arms {text}: {part!r} is none of {', '.join(f'{name}=...' for name in known)}")
            try:
                values[key] = _KINDS[str(known[key].type)](value)
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise UsageError(f"--arms {text}: {part!r}: {error}") from None
        return cls(name=text, method=method, **values)


@dataclass(frozen=True)
class Setting:
    """What all arms share.

    Args:
        model: timm's name.
        size: Input size.
        batch: Images per step.
        epochs: Of an arm with ``epochs=1``.
        warmup: Steps over which the learning rate rises.
        evaluate_on: ``validation`` or ``test``.
    """

    model: str
    size: int
    batch: int
    epochs: int
    warmup: int
    evaluate_on: str


@dataclass
class Trainer:
    """Trains arm after arm from the same weights.

    Args:
        setting: Of all runs.
        weights: Of the pretrained model, with its own classifier, on the CPU.
        train: What training images are drawn from.
        test: Other images, or None to test on what is left of ``train``.
        device: Where to train.
    """

    setting: Setting
    weights: dict[str, Tensor]
    train: Images
    test: Images | None
    device: torch.device
    _model: nn.Module | None = field(default=None, repr=False)

    def run(self, arm: Arm, seed: int, count: int) -> dict[str, Any]:
        """Train and evaluate.

        Args:
            arm: What.
            seed: Of the images drawn, the classifier, the order and the augmentation: the same for every arm.
            count: Images to train on.
        """
        start = time.monotonic()
        chosen, others = draw(self.train.labels, count, 100 + seed, spare=2500)
        model = self._fresh(seed)
        config = timm.data.resolve_model_data_config(model)
        batches = Batches(*self.train.take(chosen, self.device), self.setting.size, config["mean"], config["std"])
        loss, average = self._train(arm, model, batches, seed)
        train_seconds = time.monotonic() - start
        if self.setting.evaluate_on == "validation" or self.test is None:
            images, labels = self.train.take(others, self.device)
        else:
            images, labels = self.test.pixels.to(self.device), self.test.labels.to(self.device)
        metrics = evaluate(average.eval(), batches, images, labels)
        return {
            "arm": arm.name,
            "seed": seed,
            "n": len(chosen),
            "evaluated_on": self.setting.evaluate_on,
            "images": len(labels),
            **metrics,
            "train_loss": loss,
            "seconds": round(train_seconds, 2),
        }

    def _fresh(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: Any = timm.create_model(self.setting.model)
        model.load_state_dict(self.weights)
        model.reset_classifier(len(self.train.classes))
        built: nn.Module = model.to(self.device, memory_format=torch.channels_last).train()
        return built

    def _train(self, arm: Arm, model: nn.Module, batches: Batches, seed: int) -> tuple[float, nn.Module]:
        count, setting = len(batches.labels), self.setting
        per_epoch = -(-count // setting.batch)
        total = max(1, round(setting.epochs * arm.epochs * per_epoch))
        optimizer = torch.optim.AdamW(model.parameters(), arm.lr, weight_decay=arm.wd, fused=self.device.type == "cuda")
        mixup = (
            Mixup(mixup_alpha=arm.mixup, label_smoothing=arm.smoothing, num_classes=len(self.train.classes))
            if arm.mixup
            else None
        )
        criterion: Callable[[Any, Any], Tensor] = (
            SoftTargetCrossEntropy() if mixup else nn.CrossEntropyLoss(label_smoothing=arm.smoothing)
        )
        backward = _backward(arm, model, criterion)
        average = ModelEmaV3(model, decay=0.98, use_warmup=True) if arm.ema else None
        torch.manual_seed(1000 + seed)
        np.random.seed(1000 + seed)  # what Mixup draws from
        order = torch.empty(0, dtype=torch.int64)
        recent: list[Tensor] = []
        for step in range(total):
            if not len(order):
                order = torch.randperm(count)
            index, order = order[: setting.batch], order[setting.batch :]
            if len(index) % 2 and mixup:
                index = torch.cat([index, index[:1]])
            images, target = batches.draw(index)
            if mixup is not None:
                images, target = mixup(images, target)
            rate = arm.lr * min(1.0, (step + 1) / setting.warmup) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = rate
            recent.append(backward(images, target).detach())
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update(model, step=step)
        return float(torch.stack(recent[-16:]).mean()), average.module if average is not None else model


def _backward(arm: Arm, model: nn.Module, criterion: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """A step's forward and backward passes; returns the loss."""
    common: Any = {"reduction": arm.reduction, "objective": arm.objective, "verbose": False}
    if arm.method == "alfa":
        common |= {"steps": arm.steps, "norm": arm.norm, "space": arm.space}
        task: Any = AlfaTask(model, criterion, arm.block, alpha=arm.alpha, **common)
    elif arm.method == "noise":
        task = NoiseTask(model, criterion, arm.block, sigma=arm.alpha, **common)
    else:
        task = None

    def step(images: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = criterion(model(images), target) if task is None else task(images, target)["loss"]
        loss.backward()
        return loss

    if arm.method not in ("sam", "asam"):
        return step

    statistics = Statistics(model)

    def sharpness_aware(images: Tensor, target: Tensor) -> Tensor:
        """Foret et al. 2021; ASAM (Kwon et al. 2021) scales each weight's direction by the weight."""
        loss = step(images, target)
        with torch.no_grad():
            weights: list[Tensor] = [parameter for parameter in model.parameters() if parameter.grad is not None]
            scales = [weight.abs() if arm.method == "asam" else torch.ones_like(weight) for weight in weights]
            grads = [weight.grad for weight in weights if weight.grad is not None]
            ways = [grad * scale for grad, scale in zip(grads, scales, strict=True)]
            norm = torch.stack([way.norm() for way in ways]).norm() + 1e-12
            moves = [arm.rho * way * scale / norm for way, scale in zip(ways, scales, strict=True)]
            torch._foreach_add_(weights, moves)
        model.zero_grad()
        with statistics.kept():
            step(images, target)
        with torch.no_grad():
            torch._foreach_sub_(weights, moves)
        return loss

    return sharpness_aware


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1 in percent, NLL, expected calibration error in percent, and its bins.

    Args:
        model: In evaluation mode.
        batches: Prepares images.
        images: [N, 3, S, S], ``uint8``.
        labels: [N].
    """
    logits = torch.cat([model(batches.prepare(part)) for part in images.split(500)]).double()
    confidence, chosen = logits.softmax(1).max(1)
    right = (chosen == labels).double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    counts, sure, hits = (
        torch.zeros(BINS, dtype=torch.float64, device=labels.device).scatter_add_(0, place, values)
        for values in (torch.ones_like(confidence), confidence, right)
    )
    return {
        "top1": 100 * float(right.mean()),
        "nll": float(functional.cross_entropy(logits, labels)),
        "ece": 100 * float((sure - hits).abs().sum() / len(labels)),
        "bins": [[round(value, 4) for value in row] for row in torch.stack([counts, sure, hits], 1).tolist()],
    }
