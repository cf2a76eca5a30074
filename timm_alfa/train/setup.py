"""From flags to the parts of a run: model, mixing, criterion, optimizer, schedule, and the task around them."""

from __future__ import annotations

import argparse
import difflib
import logging
from typing import Any

import torch
from timm.data import FastCollateMixup, Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model, is_model, list_models, safe_model_name
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from torch import nn

from .. import models as _registered  # noqa: F401  (importing it gives timm the CIFAR ResNets)
from ..errors import UsageError

_logger = logging.getLogger(__name__)


def build_model(args: argparse.Namespace) -> nn.Module:
    """Creates ``--model`` on the CPU and sets ``args.num_classes`` to its number of classes.

    Raises:
        UsageError: there is no such model, or it cannot be built with these flags or from these weights.
    """
    if ":" not in args.model and not is_model(args.model):
        name = args.model.partition(".")[0]
        near = difflib.get_close_matches(name, list_models(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UsageError(f"--model {args.model}: timm has no such model{hint}")
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else 3)
    overlay: dict[str, Any] = {}
    if args.pretrained_path:  # a file goes before the published weights, and num_classes -1 makes timm adapt the head
        overlay["pretrained_cfg_overlay"] = {"file": args.pretrained_path, "num_classes": -1}
    try:
        model = create_model(
            args.model,
            pretrained=args.pretrained,
            in_chans=in_chans,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            scriptable=False,
            checkpoint_path=args.initial_checkpoint,
            **overlay,
            **args.model_kwargs,
        )
    except Exception as error:  # a model's constructor may raise anything about the values it was given
        raise UsageError(f"--model {args.model}: cannot be created with these flags: {_one_line(error)}") from error
    _initialize_head(args, model)
    if args.num_classes is None:
        if not hasattr(model, "num_classes"):
            raise UsageError(f"--model {args.model}: does not say its number of classes; add --num-classes")
        args.num_classes = model.num_classes
    if args.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UsageError(f"--grad-checkpointing: {args.model} does not support it")
        model.set_grad_checkpointing(enable=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(f"Model {safe_model_name(args.model)} created, {count:,} parameters, {args.num_classes} classes.")
    return model


def _initialize_head(args: argparse.Namespace, model: nn.Module) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    head = model.get_classifier()
    if not isinstance(getattr(head, "weight", None), torch.Tensor) or head.bias is None:
        raise UsageError(f"--head-init-scale, --head-init-bias: {args.model} has no classifier with weight and bias")
    with torch.no_grad():
        if args.head_init_scale is not None:
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            head.bias.fill_(args.head_init_bias)


def place_model(
        args: argparse.Namespace,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype | None,
) -> nn.Module:
    """Moves the model to its device, type and memory layout, with synchronized batch norm if asked for."""
    model.to(device=device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        args.dist_bn = ""  # synchronized statistics are the same everywhere
        model = convert_sync_batchnorm(model)
        _logger.info("Batch norms are synchronized over all processes.")
    return model


def is_mixing(args: argparse.Namespace) -> bool:
    """Whether Mixup or CutMix is on, so that targets are distributions over classes."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def create_mixup(args: argparse.Namespace) -> tuple[FastCollateMixup | None, Mixup | None]:
    """Returns ``(collate_fn, mixup_fn)``: mixing belongs to the loader with the prefetcher, else to the loop."""
    if not is_mixing(args):
        return None, None
    mixup_class = FastCollateMixup if args.prefetcher else Mixup
    mixup = mixup_class(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
    return (mixup, None) if args.prefetcher else (None, mixup)


def create_criterion(args: argparse.Namespace) -> nn.Module:
    """Returns the training loss; Mixup's targets are smoothed already."""
    mixing = is_mixing(args)
    if args.bce_loss and (mixing or args.smoothing):
        smoothing = {} if mixing else {"smoothing": args.smoothing}
        return BinaryCrossEntropy(
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
            **smoothing,
        )
    if mixing:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    return nn.CrossEntropyLoss()


def resolve_learning_rate(args: argparse.Namespace, batch_size: float) -> None:
    """Sets ``args.lr`` from ``--lr-base`` where ``--lr`` was left out (or 0).

    Args:
        args: Flags.
        batch_size: Images per process and batch, on average.
    """
    if args.lr:
        return
    global_batch_size = batch_size * args.world_size * args.grad_accum_steps
    if not args.lr_base_scale:
        adaptive = any(part in args.opt.lower() for part in ("ada", "lamb"))
        args.lr_base_scale = "sqrt" if adaptive else "linear"
    ratio = global_batch_size / args.lr_base_size
    args.lr = args.lr_base * (ratio**0.5 if args.lr_base_scale == "sqrt" else ratio)
    _logger.info(
        f"Learning rate {args.lr} from --lr-base {args.lr_base} and the global batch size {global_batch_size:g} "
        f"({args.lr_base_scale} scaling).")


def create_optimizer(args: argparse.Namespace, module: nn.Module) -> torch.optim.Optimizer:
    """Creates ``--opt`` for what `module` trains.

    Raises:
        UsageError: timm has no such optimizer, or it does not take these values.
    """
    try:
        optimizer = create_optimizer_v2(module, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        near = difflib.get_close_matches(args.opt, list_optimizers(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near and args.opt not in near else ""
        raise UsageError(f"--opt {args.opt}: cannot be created: {_one_line(error)}{hint}") from error
    defaults = {**optimizer.defaults, "weight_decay": args.weight_decay}  # timm moves the decay into the groups
    settings = ", ".join(f"{key}: {value}" for key, value in defaults.items())
    _logger.info(f"Created {type(optimizer).__name__} ({args.opt}) optimizer: {settings}")
    return optimizer


def create_schedule(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        *,
        updates_per_epoch: int,
        start_epoch: int,
        decreasing_metric: bool,
) -> tuple[Any, int]:
    """Creates ``--sched`` and moves it to `start_epoch`; returns it (None for ``none``) and the number of epochs.

    Raises:
        UsageError: timm has no such schedule, or it does not take these values.
    """
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=decreasing_metric),
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--sched {args.sched}: cannot be created: {_one_line(error)}") from error
    if scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            scheduler.step(start_epoch)
        if args.sched == "plateau":
            _logger.warning("--sched plateau: its patience starts anew, checkpoints do not hold it.")
    unit = "update" if args.sched_on_updates else "epoch"
    _logger.info(f"{num_epochs} epochs of {updates_per_epoch} updates; the learning rate changes per {unit}.")
    return scheduler, num_epochs


def compile_and_distribute(args: argparse.Namespace, task: ClassificationTask, device: torch.device) -> nn.Module:
    """Compiles the task's modules and wraps them for several processes, as flags ask; returns the model to validate.

    That is the unwrapped model: validation needs no gradients to be exchanged.
    """
    if args.torchcompile:
        try:
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"--torchcompile {args.torchcompile}: {_one_line(error)}") from error
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    eval_model: nn.Module = task.get_eval_model()
    if args.distributed:
        device_ids = None if device.type == "cpu" else [device]
        task.prepare_distributed(device_ids=device_ids, broadcast_buffers=not args.no_ddp_bb)
    return eval_model


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
