"""What the tests of every peer need: a small model, its data configuration, and tasks built from flags."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from rng import rng_state, set_rng_state
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import Tensor, nn
from toys import Device, Small, batch

from timm_alfa.tasks import registry

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def small(drop: float = 0.3, device: Device = "cpu") -> nn.Module:
    """A float64 model in training mode; every call builds the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Small(drop).double().to(device).train()


def checked(*argv: str) -> argparse.Namespace:
    """The namespace of a checked command line."""
    parser = argparse.ArgumentParser()
    registry.add_arguments(parser)
    args = parser.parse_args(argv)
    registry.check_arguments(args)
    args.mean, args.std = list(MEAN), list(STD)
    return args


def task_from(model: nn.Module, *argv: str) -> ClassificationTask:
    """What the training command would build."""
    return registry.create_task(
        checked(*argv),
        model,
        nn.CrossEntropyLoss(),
        device=next(model.parameters()).device,
        dtype=None,
        verbose=False,
        input_size=(3, 8, 8),
    )


def train(task: ClassificationTask, optimizer: torch.optim.Optimizer, steps: int = 2) -> list[Tensor]:
    """Losses of some steps on one batch; EMA moves along."""
    images, target = batch(8, device=next(task.parameters()).device)
    losses = []
    for step in range(steps):
        loss = task(images, target)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
        losses.append(loss.detach())
    return losses


def check_life_cycle(*argv: str, device: torch.device) -> None:
    """A task saves and averages the plain model, and goes on from a checkpoint as if there had been no break."""

    def start() -> tuple[ClassificationTask, torch.optim.Optimizer]:
        task = task_from(small(device=device), *argv)
        optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
        return task, optimizer

    keys = list(small().state_dict())
    task, optimizer = start()
    task.setup_ema(decay=0.5)
    train(task, optimizer)
    saved = copy.deepcopy(
        {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True), "optimizer": optimizer.state_dict()}
    )
    assert list(saved["state_dict"]) == list(saved["state_dict_ema"]) == keys
    nn.Module.load_state_dict(small(), saved["state_dict"], strict=True)
    assert _plain(saved["task_state"])
    random = rng_state(device)
    expected = train(task, optimizer)

    again, optimizer = start()
    again.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    optimizer.load_state_dict(saved["optimizer"])
    again.setup_ema(decay=0.5)
    again.load_checkpoint_state(saved["state_dict_ema"], saved.get("task_state_ema"), ema=True)
    set_rng_state(random, device)
    assert train(again, optimizer) == expected
    for ema in (False, True):
        one, other = (t.get_eval_model(ema=ema).state_dict().values() for t in (task, again))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert again.get_task_state().keys() == saved["task_state"].keys()


def _plain(state: Any) -> bool:
    if isinstance(state, dict):
        return all(isinstance(key, str) and _plain(value) for key, value in state.items())
    return isinstance(state, (int, float, str, Tensor))
