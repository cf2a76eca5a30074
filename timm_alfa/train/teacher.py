"""``--kd-model-name``: the teacher, and timm's distillation task with it, checked before training starts."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.models import safe_model_name
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.utils import unwrap_model
from torch import nn

from ..errors import UsageError
from ..tasks.distillation import DistillationTask
from ..utils.text import one_line
from .device import Precision
from .model import check_model_name

_logger = logging.getLogger(__name__)


def create_distillation(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module,
    *,
    device: torch.device,
    precision: Precision,
    input_size: Sequence[int],
    verbose: bool,
) -> DistillationTask:
    """timm's task for the flags, built as timm's ``train.py`` does, so that random draws come in its order.

    Args:
        args: Checked flags.
        model: The student, on its device.
        criterion: The loss on labels.
        device: Of student and teacher.
        precision: Its ``model_dtype`` is the teacher's too.
        input_size: [C, H, W] of the student's images, which the teacher sees.
        verbose: Whether this rank logs.

    Raises:
        UsageError: There is no such teacher, its weights cannot be had, it cannot take the student's images, or it
            tells other classes; or the student has no features or distillation token to compare.
    """
    flag = f"--kd-model-name {args.kd_model_name}"
    check_model_name("--kd-model-name", args.kd_model_name)
    try:
        task = _create(args, model, criterion, device=device, dtype=precision.model_dtype, verbose=verbose)
    except Exception as error:  # timm's constructors, files and the network raise anything
        raise UsageError(
            f"{flag}, --kd-distill-type {args.kd_distill_type}: cannot be set up: {one_line(error)}"
        ) from error
    teacher: Any = unwrap_model(task.teacher.model)
    published = getattr(teacher, "pretrained_cfg", {}).get("num_classes")
    if args.kd_distill_type != "feature" and published != args.num_classes:
        raise UsageError(
            f"{flag}: its weights tell {published} classes, --num-classes is {args.num_classes}; expected a teacher of "
            "the same classes, or --kd-distill-type feature, which needs none"
        )
    _check_forward(flag, args, task, input_size, precision.autocast())
    if verbose:
        count = sum(parameter.numel() for parameter in teacher.parameters())
        _logger.info(f"Teacher {safe_model_name(args.kd_model_name)}, {count:,} parameters.")
    return task


def _create(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    verbose: bool,
) -> DistillationTask:
    common: dict[str, Any] = {
        "student_model": model,
        "teacher_model": args.kd_model_name,
        "criterion": criterion,
        "distill_loss_weight": args.distill_loss_weight,
        "task_loss_weight": args.task_loss_weight,
        "device": device,
        "dtype": dtype,
        "verbose": verbose,
    }
    if args.kd_distill_type == "logit":
        return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
    if args.kd_distill_type == "feature":
        return FeatureDistillationTask(
            student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim, **common
        )
    return TokenDistillationTask(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)


def _check_forward(
    flag: str, args: argparse.Namespace, task: Any, input_size: Sequence[int], autocast: AbstractContextManager[Any]
) -> None:
    """Compare student and teacher on two blank images; nothing random is drawn, no statistic moves."""
    trained = task.get_trainable_module()
    parameter = next(trained.parameters())
    images = torch.zeros(2, *input_size, device=parameter.device, dtype=parameter.dtype)
    features = args.kd_distill_type == "feature"
    was_training = trained.training
    trained.eval()
    try:
        with torch.no_grad(), autocast:
            own = trained(images)
            found = task.teacher(
                task.teacher.normalize_input(images, task.student_mean, task.student_std), return_features=features
            )
    except Exception as error:  # models check their input in every way there is
        raise UsageError(
            f"{flag}: teacher and student cannot be compared on images {list(input_size)}: {one_line(error)}"
        ) from error
    finally:
        trained.train(was_training)
    own = own[1] if features else own
    if own.shape != found.shape:
        raise UsageError(
            f"{flag}: gives {list(found.shape[1:])} per image where the student has {list(own.shape[1:])}; expected "
            "the same (--kd-student-feature-dim, --kd-teacher-feature-dim)"
        )
