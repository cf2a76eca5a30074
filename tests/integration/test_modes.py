"""Every way of training: some updates with AlfaTask end where an eager float32 loop with plain hooks ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from parity import gradient_errors, relative
from reference.plain_alfa import plain_alfa
from rng import rng_state, set_rng_state
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad
from torch import Tensor, nn
from toys import Small, batch

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.engine.tail_by_tail import TailByTailStep
from timm_alfa.errors import UsageError
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.criterion import create_criterion, create_mixup
from timm_alfa.train.device import Precision
from timm_alfa.train.loop import Training, train_one_epoch
from timm_alfa.train.model import place_model

ALPHA = 1.0 / 255
CLASSES = 5
# Of the way that the weights went. Batch norms blow rounding up, and that turns the sign of some small gradients.
EXACT, NORMED, FLOAT16, BFLOAT16 = 1e-3, 1e-2, 5e-3, 0.03
# architecture -> options, height and width of its images, blocks
MODELS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "vit_tiny_patch16_224": (
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
        32,
        ["blocks.1", "blocks.2"],
    ),
    "resnet10t": ({"channels": (8, 8, 16, 16), "zero_init_last": False}, 64, ["layer2", "layer4"]),
}
VIT, RESNET = MODELS


def small(architecture: str, device: torch.device | str = "cpu", **options: Any) -> nn.Module:
    """In training mode."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(architecture, num_classes=CLASSES, **MODELS[architecture][0], **options)
    return model.to(device).train()


def batches(count: int, size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Batches of eight images: [8, 3, size, size], [8]."""
    generator = torch.Generator().manual_seed(1)
    drawn = [
        (torch.randn(8, 3, size, size, generator=generator), torch.randint(CLASSES, (8,), generator=generator))
        for _ in range(count)
    ]
    return [(images.to(device), target.to(device)) for images, target in drawn]


def options_of(flags: str) -> argparse.Namespace:
    args = parse_args([*flags.split(), "--no-prefetcher", "--num-classes", str(CLASSES), "--log-interval", "1000"])
    args.distributed, args.world_size, args.rank, args.prefetcher = False, 1, 0, False
    return args


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = create_optimizer_v2(model, opt="sgd", lr=0.02, momentum=0.9, weight_decay=1e-2)
    return optimizer


def seed() -> None:
    torch.manual_seed(2)
    np.random.seed(2)  # Mixup's


def train_plainly(
    model: nn.Module, args: argparse.Namespace, data: list[tuple[Tensor, Tensor]], blocks: list[str]
) -> ModelEmaV3:
    """Eager, float32, a full forward per attack step; returns the average of the weights."""
    optimizer, average = optimizer_of(model), ModelEmaV3(model, decay=0.5)
    criterion, (_, mixup) = create_criterion(args), create_mixup(args)
    waiting = [data[i : i + args.grad_accum_steps] for i in range(0, len(data), args.grad_accum_steps)]
    seed()
    for update, group in enumerate(waiting, start=1):
        optimizer.zero_grad()
        for images, target in group:
            mixed = mixup(images.clone(), target) if mixup is not None else (images, target)
            found = plain_alfa(model, criterion, *mixed, blocks, alpha=ALPHA, steps=2).gradients
            for name, parameter in model.named_parameters():
                share = found[name] / len(group)
                parameter.grad = share if parameter.grad is None else parameter.grad + share
        if args.clip_grad is not None:
            parameters = list(model.parameters())[: -2 if args.clip_mode == "agc" else None]
            dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
        optimizer.step()
        average.update(model, step=update)
    return average


def train_with_the_task(
    model: nn.Module,
    args: argparse.Namespace,
    data: list[tuple[Tensor, Tensor]],
    blocks: list[str],
    precision: Precision,
) -> AlfaTask:
    """The training command's own loop."""
    device = data[0][0].device
    model = place_model(args, model, device, None)
    task = AlfaTask(model, create_criterion(args), blocks, alpha=ALPHA, steps=2, device=device, verbose=False)
    task.setup_ema(decay=0.5)
    mixup: Mixup | None = create_mixup(args)[1]
    loader = [(images.clone(), target) for images, target in data]  # Mixup writes into its images
    if precision.scaler is not None:  # the first step assumes GradScaler's own first scale, and learns the real one
        with precision.autocast():
            precision.scaler._scaler.scale(task(*data[0])["loss"]).backward()
    seed()
    train_one_epoch(Training(args, task, loader, optimizer_of(model), device, precision, batch_size=8, mixup=mixup), 0)
    return task


def compare(
    device: torch.device,
    flags: str,
    architecture: str = VIT,
    tolerance: float = EXACT,
    precision: Callable[[torch.device], Precision] = lambda _: Precision(None, nullcontext, None),
    prepare: Callable[[nn.Module], Any] = lambda model: None,
    **options: Any,
) -> None:
    _, size, blocks = MODELS[architecture]
    args, data = options_of(flags), batches(3, size, device)
    start, plain, model = (small(architecture, device, **options) for _ in range(3))
    average = train_plainly(plain, args, data, blocks)
    prepare(model)
    task = train_with_the_task(model, args, data, blocks, precision(device))

    def way(end: nn.Module) -> Tensor:
        pairs = zip(start.parameters(), end.parameters(), strict=True)
        return torch.cat([(after - before).detach().flatten() for before, after in pairs])

    found = task.get_trainable_module()
    assert relative(way(found), way(plain)) < tolerance
    assert relative(way(task.get_trainable_module(ema=True).module), way(average.module)) < tolerance


def checkpoint_gradients(model: nn.Module) -> None:
    model.set_grad_checkpointing(True)


def float16_with_a_loss_scaler(device: torch.device) -> Precision:
    scaler = NativeScaler(device=device.type)
    scaler._scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    return Precision(None, partial(torch.autocast, device.type, torch.float16), scaler)


def bfloat16(device: torch.device) -> Precision:
    return Precision(None, partial(torch.autocast, device.type, torch.bfloat16), None)


FLAGS = (
    "--grad-accum-steps 2",
    "--clip-grad 0.5 --clip-mode norm",
    "--clip-grad 0.01 --clip-mode value --grad-accum-steps 3",
    "--clip-grad 0.02 --clip-mode agc",
    "--smoothing 0",
    "--mixup 0.8",
    "--cutmix 1.0 --mixup 0.2",
    "--bce-loss",
    "--bce-loss --cutmix 1.0 --bce-target-thresh 0.2",
)
# name -> arguments of `compare`; all of them with an average of the weights
MODES: dict[str, dict[str, Any]] = {
    "no flags": {"flags": ""},
    **{flags: {"flags": flags} for flags in FLAGS},
    "dropout and stochastic depth": {"flags": "--grad-accum-steps 2", "drop_rate": 0.3, "drop_path_rate": 0.3},
    "channels last": {"flags": "--channels-last", "architecture": RESNET, "tolerance": NORMED},
    **{
        f"gradient checkpointing, {architecture}": {
            "flags": "--clip-grad 0.5",
            "architecture": architecture,
            "tolerance": NORMED,
            "prepare": checkpoint_gradients,
            "drop_path_rate": 0.3,
        }
        for architecture in MODELS
    },
    "synchronised batch norm in one process": {
        "flags": "",
        "architecture": RESNET,
        "tolerance": NORMED,
        "prepare": convert_sync_batchnorm,
    },
    "float16": {
        "flags": "--clip-grad 0.5 --grad-accum-steps 2",
        "tolerance": FLOAT16,
        "precision": float16_with_a_loss_scaler,
    },
    "bfloat16": {"flags": "", "tolerance": BFLOAT16, "precision": bfloat16},
}


@pytest.mark.parametrize("mode", MODES)
def test_mode(mode: str, device: torch.device) -> None:
    compare(device, **MODES[mode])


def test_synchronised_batch_norm_is_refused_on_the_cpu() -> None:
    args = options_of("--sync-bn")
    args.distributed = True
    with pytest.raises(UsageError, match="--sync-bn: "):
        place_model(args, small(RESNET), torch.device("cpu"), None)


@pytest.mark.parametrize("how", ["wrapper", "task"])
def test_several_labels_per_image(how: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model, criterion = Small().double().to(device).train(), nn.BCEWithLogitsLoss()
    images, _ = batch(8, device=device)
    target = (torch.rand(len(images), 10) < 0.3).double().to(device)
    state = rng_state(device)
    expected = plain_alfa(model, criterion, images, target, ["block"], alpha=ALPHA, steps=2)
    set_rng_state(state, device)
    if how == "wrapper":
        alfa = AlfaWrapper(model, criterion, "block", alpha=ALPHA, steps=2)
        loss = AlfaLoss(criterion)(alfa(images, target), target).loss
    else:
        loss = AlfaTask(model, criterion, "block", alpha=ALPHA, steps=2, verbose=False)(images, target)["loss"]
    loss.backward()
    assert relative(loss, expected.loss) < 1e-9
    assert max(gradient_errors(model, expected.gradients).values()) < 1e-9


def zeros_in_delta(dtype: torch.dtype | None, how: str, steps: int, device: torch.device) -> float:
    """Share of the entries that one step of training leaves unperturbed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    model.to(device).train()
    images, target = torch.randn(16, 3, 32, 32).to(device), torch.randint(10, (16,)).to(device)

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * 1e-2

    alfa = AlfaWrapper(model, criterion, "1", steps=steps)
    with torch.autocast(device.type, dtype or torch.float16, enabled=dtype is not None):
        if how == "wrapper":
            delta = alfa(images, target).deltas["1"]
        else:
            step = TailByTailStep(alfa.engine, AlfaLoss(criterion))
            found = step(images, target, 1.0, {"1": 1.0}, lambda delta, feature: delta[0].clone())
            delta = found.observed["1"]
    return float((delta == 0).float().mean())


@pytest.mark.parametrize("how", ["wrapper", "task"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_sign_is_lost_to_underflow(dtype: torch.dtype, steps: int, how: str, device: torch.device) -> None:
    assert zeros_in_delta(dtype, how, steps, device) < zeros_in_delta(None, how, steps, device) + 0.01
