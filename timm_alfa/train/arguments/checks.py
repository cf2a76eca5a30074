"""Values and combinations of timm's flags that cannot work, told before anything is built."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
from typing import Any

from ...errors import UsageError
from ...tasks.flags import flag_text
from ..criterion import check_objective, unused_flags
from ..data.cache import check_cache_arguments
from ..data.split import check_split_arguments
from ..log import is_first_process
from .task_flags import unused_task_flags

_logger = logging.getLogger(__name__)

# smallest value that works, by flag
_AT_LEAST: dict[str, float] = {
    "epochs": 1, "stop_epoch": 1, "start_epoch": 0, "warmup_epochs": 0, "cooldown_epochs": 0, "patience_epochs": 0,
    "batch_size": 1, "validation_batch_size": 1, "num_classes": 1, "in_chans": 1, "img_size": 1, "workers": 0,
    "log_interval": 1, "val_interval": 1, "recovery_interval": 0, "checkpoint_hist": 1, "mixup_off_epoch": 0,
    "tta": 0, "lr": 0, "lr_base": 0, "lr_base_size": 1, "warmup_lr": 0, "min_lr": 0, "weight_decay": 0, "mixup": 0,
    "cutmix": 0, "epoch_repeats": 0, "aug_repeats": 0, "recount": 1, "train_batches_per_epoch": 1,
    "clip_grad": 0, "lr_cycle_decay": 0, "lr_cycle_limit": 1, "bn_eps": 0, "opt_eps": 0,
    "train_num_samples": 1, "val_num_samples": 1, "seed": 0,
    "split_seed": 0, "crop_padding": 0, "warmup_updates": 0,
}  # fmt: skip
_ABOVE_ZERO = ("lr_cycle_mul", "lr_k_decay", "decay_rate", "decay_epochs", "crop_pct")
_PROBABILITIES = (
    "hflip", "vflip", "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "reprob", "mixup_prob",
    "mixup_switch_prob", "smoothing", "drop", "drop_path", "drop_block", "model_ema_decay",
)  # fmt: skip
_CHOICES: dict[str, tuple[Any, ...]] = {
    "amp_dtype": ("float16", "bfloat16"),
    "model_dtype": (None, "", "float32", "float16", "bfloat16"),
    "clip_mode": ("norm", "value", "agc"),
    "dist_bn": ("", "reduce", "broadcast"),
    "lr_base_scale": ("", "linear", "sqrt"),
    "mixup_mode": ("batch", "pair", "elem"),
    "remode": ("const", "rand", "pixel"),
    "worker_seeding": ("all", "part"),
    "train_crop_mode": (None, "rrc", "rkrc", "rkrr"),
}

# defaults of what only --train-img-sizes makes use of
_SCHEDULED_SIZES: dict[str, Any] = {
    "train_size_schedule": "constant", "train_size_schedule_spread": 0.65, "train_size_random_mix": 0.1,
    "train_batches_per_epoch": None, "variable_batch_loss_scale": "none",
}  # fmt: skip


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ``UsageError`` for the first value or combination that cannot work."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"{_flag(name)} {number}: must be a finite number")
    for name, bound in _AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            raise UsageError(f"{_flag(name)} {value}: must be at least {bound:g}")
    for name in _ABOVE_ZERO:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UsageError(f"{_flag(name)} {value}: must be above 0")
    for name in _PROBABILITIES:
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            raise UsageError(f"{_flag(name)} {value}: must be between 0 and 1")
    for name, choices in _CHOICES.items():
        if getattr(args, name) not in choices:
            allowed = ", ".join(choice for choice in choices if choice)
            raise UsageError(f"{_flag(name)} {getattr(args, name)}: must be one of {allowed}")
    _check_combinations(args)
    _check_packages(args)


def warn_of_unused(args: argparse.Namespace) -> None:
    """Warn of flags that are given and change nothing, as in timm; to be called when all checks have passed."""
    found = unused_flags(args) + unused_task_flags(args)
    if args.drop_connect is not None:
        found.append((flag_text("drop_connect", args.drop_connect), "has no effect, as in timm; use --drop-path"))
    for name, default in _SCHEDULED_SIZES.items():
        value = getattr(args, name)
        if value != default and args.train_img_sizes is None:
            found.append((flag_text(name, value), "has no effect without --train-img-sizes, as in timm"))
    for flag, reason in found if is_first_process() else []:
        _logger.warning(f"{flag}: {reason}")


def _check_combinations(args: argparse.Namespace) -> None:
    for flag, seed in (("--seed", args.seed), ("--split-seed", args.split_seed)):
        if seed >= 2**32:
            raise UsageError(f"{flag} {seed}: must be below {2**32}, numpy takes no larger one")
    if args.amp and args.model_dtype not in (None, "", "float32"):
        raise UsageError(f"--model-dtype {args.model_dtype}: --amp needs float32 weights; leave one of the two out")
    if args.pretrained_path and not args.pretrained:
        raise UsageError(f"--pretrained-path {args.pretrained_path}: is loaded only with --pretrained; add that")
    if args.cuda_graph and args.torchcompile:
        raise UsageError(f"--cuda-graph: does not go with --torchcompile {args.torchcompile}; leave one of the two out")
    check_objective(args)
    for name in ("scale", "ratio"):
        value = getattr(args, name)
        if len(value) != 2 or not 0 < value[0] <= value[1]:
            raise UsageError(f"{flag_text(name, value)}: must be two numbers above 0, the smallest and the largest")
    if args.decay_milestones != sorted(set(args.decay_milestones)):
        raise UsageError(f"--decay-milestones {args.decay_milestones}: must be increasing")
    if args.warmup_updates is not None and not args.sched_on_updates:
        raise UsageError(f"--warmup-updates {args.warmup_updates}: needs --sched-on-updates")
    if any(epoch < 1 for epoch in args.save_epochs):
        raise UsageError(f"--save-epochs {args.save_epochs}: must be numbers of finished epochs, from 1")
    if args.wandb_resume_id and not args.resume:
        raise UsageError(f"--wandb-resume-id {args.wandb_resume_id}: needs --resume, the checkpoint to continue")
    if args.resume == "auto" and not args.experiment:
        raise UsageError("--resume auto: needs --experiment, the name of the run's folder")
    if args.train_img_sizes is None:
        if args.train_batch_sizes is not None or args.train_size_probs is not None:
            raise UsageError("--train-batch-sizes, --train-size-probs: need --train-img-sizes")
    else:
        for name in ("train_batch_sizes", "train_size_probs"):
            values = getattr(args, name)
            if values is not None and len(values) != len(args.train_img_sizes):
                raise UsageError(f"{_flag(name)} {values}: must have one value per --train-img-sizes")
        if args.use_multi_epochs_loader:
            raise UsageError("--use-multi-epochs-loader: does not go with --train-img-sizes")
    _check_padded_crop(args)
    check_split_arguments(args)
    check_cache_arguments(args)


def _check_padded_crop(args: argparse.Namespace) -> None:
    if args.crop_padding is None or args.no_aug:
        return
    for name, off in (("train_crop_mode", None), ("train_img_sizes", None), ("use_multi_epochs_loader", False),
                      ("scale", [0.08, 1.0]), ("ratio", [3 / 4, 4 / 3])):  # fmt: skip
        value = getattr(args, name)
        if value != off:
            raise UsageError(f"{flag_text(name, value)}: does not go with --crop-padding, which replaces resized crops")


def _check_packages(args: argparse.Namespace) -> None:
    for flag, package in (("log_wandb", "wandb"), ("log_tensorboard", "tensorboard")):
        if getattr(args, flag) and importlib.util.find_spec(package) is None:
            raise UsageError(f'{_flag(flag)}: {package} is not installed; pip install "timm-alfa[{package}]"')


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
