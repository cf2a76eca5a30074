"""timm's flags for the task: one class or independent labels per image, and a teacher. Same names and defaults."""

from __future__ import annotations

import argparse
import math
from typing import Any

from timm.data.readers.targets import TARGET_FORMATS, parse_target_keys
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator

from ...errors import UsageError
from ...tasks.flags import flag_text

EVALUATORS: dict[str, Any] = {
    "classification": ClassificationEvaluator,
    "multilabel": MultiLabelClassificationEvaluator,
}
_SMOOTHING = {"classification": 0.1, "multilabel": 0.0}

# what only some kinds of distillation make use of, with its default
_OF_KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "kd_temperature": (4.0, ("logit", "token")),
    "kd_student_feature_dim": (None, ("feature",)),
    "kd_teacher_feature_dim": (None, ("feature",)),
    "kd_token_distill_type": ("soft", ("token",)),
}
_OF_TEACHER = {"kd_distill_type": "logit", "distill_loss_weight": None, "task_loss_weight": None}


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--task`` and the flags of distillation."""
    group = parser.add_argument_group("Task and distillation parameters")
    add = group.add_argument
    add(
        "--task",
        default="classification",
        choices=tuple(EVALUATORS),
        help="one class per image, or independent labels (multilabel), trained with binary cross-entropy",
    )
    add(
        "--target-format",
        default=None,
        choices=TARGET_FORMATS,
        help="labels of --task multilabel: a list of class indices (left out), or a number per class",
    )
    add("--multilabel-threshold", default=0.5, type=float, metavar="P", help="probability from which F1 counts a label")
    add(
        "--kd-model-name",
        default=None,
        metavar="NAME",
        help="train with a teacher: a timm model with published weights, or local-dir:FOLDER of a run or an export",
    )
    add(
        "--kd-distill-type",
        default="logit",
        choices=("logit", "feature", "token"),
        help="what is compared with the teacher: logits, pooled features, or the logits of a distillation token",
    )
    add("--kd-loss-type", default="kl", choices=("kl",), help="how logits are compared")
    add(
        "--distill-loss-weight",
        default=None,
        type=float,
        metavar="W",
        help="weight of the distance to the teacher; left out: 1, or 1 - W where only --task-loss-weight W is given",
    )
    add("--task-loss-weight", default=None, type=float, metavar="W", help="weight of the loss on labels; left out: 1")
    add("--kd-temperature", default=4.0, type=float, metavar="T", help="softmax temperature of both logits")
    add("--kd-student-feature-dim", default=None, type=int, metavar="N", help="width of the student's pooled features")
    add("--kd-teacher-feature-dim", default=None, type=int, metavar="N", help="width of the teacher's")
    add(
        "--kd-token-distill-type",
        default="soft",
        choices=("soft", "hard"),
        help="the token learns the teacher's probabilities, or its class",
    )


def fill_task_defaults(args: argparse.Namespace) -> None:
    """Put in what ``--eval-metric`` and ``--smoothing`` are for the task where they are left out, as timm does."""
    for name, value in task_defaults(args.task).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def task_defaults(task: str) -> dict[str, Any]:
    """What flags without a default of their own are for a value of ``--task``."""
    return {"eval_metric": EVALUATORS[task].default_metric, "smoothing": _SMOOTHING[task]}


def is_multilabel(args: argparse.Namespace) -> bool:
    """Whether images have independent labels."""
    return args.task == "multilabel"


def check_task_arguments(args: argparse.Namespace) -> None:
    """Check what the task and the teacher ask of each other and of the rest.

    Raises:
        UsageError: Naming the flag, its value and what would be right.
    """
    names = EVALUATORS[args.task].metric_names
    if args.eval_metric not in names:
        known = ", ".join(sorted(names, key="loss".__eq__))
        raise UsageError(f"--eval-metric {args.eval_metric}: must be one of {known} with --task {args.task}")
    keys = _target_keys(args)
    if is_multilabel(args):
        if args.num_classes is None:
            raise UsageError("--task multilabel: needs --num-classes, the number of labels")
        if not 0 < args.multilabel_threshold < 1:
            raise UsageError(f"--multilabel-threshold {args.multilabel_threshold}: must be between 0 and 1")
        for name in ("kd_model_name", "unlabeled_dir", "eval_pgd"):
            if getattr(args, name):
                raise UsageError(f"{flag_text(name, getattr(args, name))}: does not go with --task multilabel")
        if keys and len(keys) != args.num_classes:
            raise UsageError(
                f"--num-classes {args.num_classes}: --target-key names {len(keys)} labels, expected {len(keys)}"
            )
        if keys and args.target_format == "multihot":
            raise UsageError("--target-format multihot: is for one field; --target-key names several, one per label")
    elif args.target_format == "multihot":
        raise UsageError("--target-format multihot: needs --task multilabel")
    elif keys:
        raise UsageError(f"--target-key {args.target_key}: names several fields; these need --task multilabel")
    if args.kd_model_name is not None:
        _check_teacher(args)


def _target_keys(args: argparse.Namespace) -> tuple[str, ...]:
    try:
        return parse_target_keys(args.target_key) or ()
    except ValueError as error:
        raise UsageError(f"--target-key {args.target_key}: expected names, each once and none empty") from error


def _check_teacher(args: argparse.Namespace) -> None:
    if not args.kd_model_name:
        raise UsageError("--kd-model-name: is empty, expected the name of a model, or local-dir:FOLDER")
    for name in ("distill_loss_weight", "task_loss_weight"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{flag_text(name, value)}: must be a finite weight of at least 0")
    alone = args.task_loss_weight is not None and args.distill_loss_weight is None
    if alone and args.task_loss_weight > 1:
        raise UsageError(
            f"--task-loss-weight {args.task_loss_weight}: by itself gives the teacher the weight 1 - "
            f"{args.task_loss_weight:g}; expected at most 1, or --distill-loss-weight too"
        )
    if args.kd_temperature <= 0:
        raise UsageError(f"--kd-temperature {args.kd_temperature}: must be above 0")
    for name in ("kd_student_feature_dim", "kd_teacher_feature_dim"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"{flag_text(name, value)}: must be at least 1")
    if args.unlabeled_dir:
        raise UsageError(f"--unlabeled-dir {args.unlabeled_dir}: does not go with --kd-model-name {args.kd_model_name}")


def unused_task_flags(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Flags of the task that are given and change nothing, as in timm, each with the reason."""
    found: list[tuple[str, str]] = []
    if not is_multilabel(args):
        for name, default in (("multilabel_threshold", 0.5), ("target_format", None)):
            if getattr(args, name) != default:
                found.append((flag_text(name, getattr(args, name)), "has no effect without --task multilabel"))
    of_teacher = _OF_TEACHER | {name: default for name, (default, _) in _OF_KINDS.items()}
    if args.kd_model_name is None:
        for name, default in of_teacher.items():
            if getattr(args, name) != default:
                found.append((flag_text(name, getattr(args, name)), "has no effect without --kd-model-name"))
        return found
    for name, (default, kinds) in _OF_KINDS.items():
        if getattr(args, name) != default and args.kd_distill_type not in kinds:
            reason = f"has no effect with --kd-distill-type {args.kd_distill_type}"
            found.append((flag_text(name, getattr(args, name)), reason))
    for name in ("mean", "std"):
        if getattr(args, name) is not None:
            reason = "the teacher's images are converted from the mean and std that the model came with, as in timm"
            found.append((flag_text(name, getattr(args, name)), reason))
    return found
