"""The loop against a plain one written out over timm's parts: the same weights after twenty steps, bit for bit."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from timm import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn

from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.device import Precision
from timm_alfa.train.loop import Training, train_one_epoch, updates_per_epoch

STEPS, EPOCHS = 10, 2


def _model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return create_model("test_resnet", num_classes=3, drop_rate=0.2, drop_path_rate=0.2).to(device)


def _batches(count: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(count)
    ]
    return [(images.to(device), target.to(device)) for images, target in drawn]


def _optimizer_and_schedule(model: nn.Module) -> tuple[torch.optim.Optimizer, CosineLRScheduler]:
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.1)
    return optimizer, CosineLRScheduler(
        optimizer, t_initial=STEPS * EPOCHS, warmup_t=5, warmup_lr_init=1e-5, t_in_epochs=False
    )


def _assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_twenty_steps_equal_a_plain_loop(accumulate: int, device: torch.device):
    batches = _batches(STEPS * accumulate, device)

    plain = _model(device)
    optimizer, schedule = _optimizer_and_schedule(plain)
    average = ModelEmaV3(plain, decay=0.9)
    criterion = nn.CrossEntropyLoss()
    updates = 0
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        plain.train()
        for index, (images, target) in enumerate(batches):
            (criterion(plain(images), target) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                dispatch_clip_grad(plain.parameters(), value=1.0, mode="norm")
                optimizer.step()
                optimizer.zero_grad()
                updates += 1
                average.update(plain, step=updates)
                schedule.step_update(num_updates=updates)

    args = parse_args(["--clip-grad", "1", "--grad-accum-steps", str(accumulate)])
    args.distributed, args.world_size, args.rank, args.prefetcher = False, 1, 0, False
    task = ClassificationTask(_model(device), nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.9)
    optimizer, schedule = _optimizer_and_schedule(task.get_trainable_module())
    run = Training(
        args=args,
        task=task,
        loader=batches,
        optimizer=optimizer,
        device=device,
        precision=Precision(None, nullcontext, None),
        batch_size=4.0,
        scheduler=schedule,
    )
    torch.manual_seed(2)
    for epoch in range(EPOCHS):
        metrics = train_one_epoch(run, epoch)

    assert metrics["loss"] > 0
    assert not torch.equal(next(_model(device).parameters()), next(plain.parameters()))
    _assert_equal(task.get_trainable_module(), plain)
    _assert_equal(task.get_trainable_module(ema=True).module, average.module)


@pytest.mark.parametrize(("batches", "accumulate", "expected"), [(10, 1, 10), (10, 4, 3), (8, 4, 2), (1, 4, 1)])
def test_an_incomplete_group_of_batches_makes_an_update_too(batches: int, accumulate: int, expected: int):
    args = parse_args(["--grad-accum-steps", str(accumulate)])
    assert updates_per_epoch(args, range(batches)) == expected
