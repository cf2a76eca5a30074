"""Everything that a run needs, built in timm's order, so that random draws come in timm's order; not yet started."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from typing import Any

import torch
from timm import utils
from timm.task import TrainingTask
from torch import nn

from ..errors import UsageError
from ..run_folder.checkpoint import recorded_label_names
from ..tasks import registry
from ..tasks.base import MethodTask
from ..utils.text import one_line
from .checkpoints.resume import open_checkpoint, restore_ema, restore_randomness, restore_training
from .criterion import check_cut, create_criterion, create_mixup
from .data.classes import check_trained_classes, label_names
from .data.datasets import (
    check_class_count,
    check_data_arguments,
    create_datasets,
    create_test_set,
    create_unlabeled_set,
    default_class_count,
)
from .data.loaders import create_loaders
from .device import create_precision, prepare_device
from .loop import ReportingTask, Training, updates_per_epoch
from .model import build_model, check_forward, place_model, resolve_preprocessing
from .optim import create_optimizer, create_schedule, resolve_learning_rate
from .teacher import create_distillation

_logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """A run that could start now.

    Attributes:
        run: What an epoch of training needs.
        eval_model: The model to validate.
        eval_loader: None without ``--val-split`` or ``--val-fraction``.
        test_loader: None without ``--test-split``.
        eval_metric: What best means; ``loss`` (of training) without validation.
        data_config: timm's preprocessing of the model: input size, mean, standard deviation, ...
        start_epoch: First epoch to train.
        stop_epoch: Epoch to stop before.
        num_epochs: Length of the schedule.
        resume_path: Checkpoint that is continued, or ''.
        label_names: What the model's outputs mean, in order or by index; empty where the data does not name classes.
    """

    run: Training
    eval_model: nn.Module
    eval_loader: Any
    test_loader: Any
    eval_metric: str
    data_config: dict[str, Any]
    start_epoch: int
    stop_epoch: int
    num_epochs: int
    resume_path: str
    label_names: list[str] | dict[int, str]

    @property
    def decreasing(self) -> bool:
        """Whether a lower metric is better."""
        return self.eval_metric == "loss"


def check_inputs(args: argparse.Namespace) -> tuple[str, dict[str, Any] | None]:
    """Looks at the data and the checkpoint to resume before anything is built; returns the latter with its path."""
    if args.num_classes is None:
        args.num_classes = default_class_count(args)
    if args.alfa_list_blocks:
        return "", None
    check_data_arguments(args)
    return open_checkpoint(args)


def create_seeded_model(
    args: argparse.Namespace, *, resumed: bool = False
) -> tuple[nn.Module, dict[str, Any], torch.device]:
    """Seeds this process and creates the model; returns it, its data configuration and the device to move it to.

    With ``resumed`` no weights are loaded into it: a checkpoint will.
    """
    device = prepare_device(args)
    utils.random_seed(args.seed, args.rank)
    model = build_model(args, resumed=resumed)
    return model, resolve_preprocessing(args, model, verbose=utils.is_primary(args)), device


def list_blocks(args: argparse.Namespace) -> None:
    """Prints what ``--alfa-blocks`` can name in ``--model``."""
    model, data_config, device = create_seeded_model(args)
    model.to(device)
    if utils.is_primary(args):
        print(registry.describe_blocks(args, model, data_config["input_size"], device))


def assemble(
    args: argparse.Namespace,
    resume_path: str,
    checkpoint: dict[str, Any] | None,
    *,
    datasets: tuple[Any, Any] | None = None,
) -> Plan:
    """Build every part of a run and put ``checkpoint`` back into them. Nothing is written.

    ``datasets``, for training and validation, take the place of those that the flags name.

    Raises:
        UsageError: Something that was asked for cannot be had.
    """
    model, data_config, device = create_seeded_model(args, resumed=checkpoint is not None)
    precision = create_precision(args, device)
    model = place_model(args, model, device, precision.model_dtype)
    check_forward(args, model, data_config["input_size"], precision)

    dataset_train, dataset_eval = datasets or create_datasets(args, data_config)
    dataset_test = create_test_set(args, data_config)
    check_class_count(args, dataset_train, dataset_eval)
    check_class_count(args, dataset_train, dataset_test, "--test-split")
    check_cut(args, data_config["input_size"])
    names = label_names(dataset_train)
    if checkpoint is not None:
        check_trained_classes(f"--resume {resume_path}", recorded_label_names(checkpoint), names)
    collate_fn, mixup_fn = create_mixup(args)
    loader_train, loader_eval, loader_test = create_loaders(
        args,
        data_config,
        dataset_train,
        dataset_eval,
        dataset_test,
        create_unlabeled_set(args, data_config),
        device=device,
        img_dtype=precision.model_dtype or torch.float32,
        collate_fn=collate_fn,
    )
    batch_size = float(args.batch_size)
    if args.train_img_sizes is not None:
        batch_size = loader_train.batch_sampler.average_batch_size
        _logger.info(f"Training at {args.train_img_sizes} pixels, {batch_size:.2f} images per batch on average.")
    resolve_learning_rate(args, batch_size)

    criterion, verbose = create_criterion(args).to(device=device), utils.is_primary(args)
    teaching = None
    if args.kd_model_name is not None:
        teaching = create_distillation(
            args,
            model,
            criterion,
            device=device,
            precision=precision,
            input_size=data_config["input_size"],
            verbose=verbose,
        )
    task = registry.create_task(
        args,
        model,
        criterion,
        device=device,
        dtype=precision.model_dtype,
        verbose=verbose,
        input_size=tuple(data_config["input_size"]),
        threshold=args.multilabel_threshold if args.task == "multilabel" else None,
        teaching=teaching,
    )
    module = task.get_trainable_module()
    assert module is not None  # a classification task has one
    optimizer = create_optimizer(args, module)
    twice = not isinstance(task, MethodTask) or task.second_derivatives
    if getattr(optimizer, "is_second_order", False) and not twice:
        raise UsageError(
            f"--opt {args.opt}: needs second derivatives, which --method {args.method} does not give; "
            "choose another optimizer"
        )
    resume_epoch = 0
    if checkpoint is not None:
        resume_epoch = restore_training(args, resume_path, checkpoint, task, optimizer, precision.scaler)
    if args.model_ema:  # before the model is compiled or wrapped
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device("cpu") if args.model_ema_force_cpu else None,
        )
        if checkpoint is not None:
            restore_ema(resume_path, checkpoint, task)
    eval_model = _compile_and_distribute(args, task, device)

    eval_metric = args.eval_metric if loader_eval is not None else "loss"
    start_epoch = resume_epoch if args.start_epoch is None else args.start_epoch
    scheduler, num_epochs = create_schedule(
        args,
        optimizer,
        updates_per_epoch=updates_per_epoch(args, loader_train),
        start_epoch=start_epoch,
        decreasing_metric=eval_metric == "loss",
    )
    if isinstance(task, ReportingTask):
        for line in task.summary_lines(tuple(data_config["input_size"])):
            _logger.info(line)
    if checkpoint is not None:
        restore_randomness(args, resume_path, checkpoint)
    run = Training(
        args=args,
        task=task,
        loader=loader_train,
        optimizer=optimizer,
        device=device,
        precision=precision,
        batch_size=batch_size,
        scheduler=scheduler,
        mixup=mixup_fn,
    )
    return Plan(
        run=run,
        eval_model=eval_model,
        eval_loader=loader_eval,
        test_loader=loader_test,
        eval_metric=eval_metric,
        data_config=data_config,
        start_epoch=start_epoch,
        stop_epoch=num_epochs if args.stop_epoch is None else min(args.stop_epoch, num_epochs),
        num_epochs=num_epochs,
        resume_path=resume_path,
        label_names=names,
    )


def _compile_and_distribute(args: argparse.Namespace, task: TrainingTask, device: torch.device) -> nn.Module:
    """Compiles the task's modules and wraps them for several processes, as flags ask; returns the model to validate.

    That is the unwrapped model: validation needs no gradients to be exchanged.
    """
    if args.torchcompile:
        try:
            task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"--torchcompile {args.torchcompile}: {one_line(error)}") from error
        if task.has_ema():
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    eval_model = task.get_eval_model()
    assert eval_model is not None  # a classification task has one
    if args.distributed:
        device_ids = None if device.type == "cpu" else [device]
        # True is the default, and newer versions of torch warn about the argument
        buffers = {"broadcast_buffers": False} if args.no_ddp_bb else {}
        task.prepare_distributed(device_ids=device_ids, **buffers)
    return eval_model
