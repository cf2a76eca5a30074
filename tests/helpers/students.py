"""Students and teachers in float64, and timm's distillation tasks of them; every call builds the same weights."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from torch import nn

KINDS = ("logit", "feature", "token", "token hard")
# family by family the block whose output is perturbed, and an earlier one
BLOCKS = {"logit": ("layer4", "layer3"), "feature": ("layer4", "layer3"), "token": ("blocks.2", "blocks.0")}
TASK_WEIGHT, DISTILL_WEIGHT, TEMPERATURE = 0.4, 0.9, 3.0


def student(kind: str, drop: float = 0.2) -> nn.Module:
    """Ten classes, dropout and stochastic depth, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind.startswith("token"):
            return timm.create_model(
                "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3,
                num_classes=10, drop_rate=drop, drop_path_rate=drop,
            ).double().train()  # fmt: skip
        return timm.create_model(
            "resnet18", channels=(6, 8, 10, 12), num_classes=10, zero_init_last=False, drop_rate=drop,
            drop_path_rate=drop,
        ).double().train()  # fmt: skip


def teacher() -> nn.Module:
    """Another width, another mean and deviation of its images, dropout that must not be seen, statistics that moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = timm.create_model("resnet18", channels=(6, 8, 10, 16), num_classes=10, drop_rate=0.5).double()
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}
        with torch.no_grad():
            for _ in range(3):
                model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
        return model


def distillation(kind: str, *, drop: float = 0.2, criterion: Any = None, **options: Any) -> Any:
    """timm's task."""
    given: dict[str, Any] = {
        "student_model": student(kind, drop),
        "teacher_model": teacher(),
        "criterion": nn.CrossEntropyLoss(label_smoothing=0.1) if criterion is None else criterion,
        "task_loss_weight": TASK_WEIGHT,
        "distill_loss_weight": DISTILL_WEIGHT,
        "dtype": torch.float64,
        "verbose": False,
        **options,
    }
    if kind == "logit":
        return LogitDistillationTask(temperature=TEMPERATURE, **given)
    if kind == "feature":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return FeatureDistillationTask(**given)
    return TokenDistillationTask(temperature=TEMPERATURE, distill_type="hard" if "hard" in kind else "soft", **given)
