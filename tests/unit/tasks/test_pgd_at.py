"""PGD adversarial training: the loss of perturbed images against a plain implementation, and the life cycle."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peers import MEAN, STD, check_life_cycle, checked, small, task_from, train
from rng import rng_state, set_rng_state
from torch import nn
from toys import batch

from timm_alfa import UsageError
from timm_alfa.peers import PgdTask, PixelAttack


def test_parity_with_a_plain_implementation(device: torch.device) -> None:
    images, target = batch(8, device=device)
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    low, high = (0 - mean) / std, (1 - mean) / std
    images = images.clamp(low, high)
    model, plain = small(device=device), small(device=device)
    task = PgdTask(model, nn.CrossEntropyLoss(), PixelAttack(8.0, 3.0, 4, MEAN, STD), verbose=False)
    state = rng_state(device)
    result = task(images, target)
    result["loss"].backward()
    end = rng_state(device)

    perturbed = images
    for _ in range(4):
        attacked = copy.deepcopy(plain)
        leaf = perturbed.detach().requires_grad_()
        set_rng_state(state, device)
        F.cross_entropy(attacked(leaf), target).backward()
        perturbed = leaf.detach() + 3 / 255 / std * leaf.grad.sign()
        perturbed = torch.minimum(torch.maximum(perturbed, images - 8 / 255 / std), images + 8 / 255 / std)
        perturbed = torch.minimum(torch.maximum(perturbed, low), high)
    set_rng_state(state, device)
    loss = F.cross_entropy(plain(perturbed), target)
    loss.backward()
    assert torch.equal(rng_state(device), end)
    torch.testing.assert_close(result["loss"], loss, rtol=1e-10, atol=0)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-8, atol=1e-13)
    for buffer, other in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-10, atol=1e-14)


def test_without_perturbation_it_is_plain_training_bit_for_bit(device: torch.device) -> None:
    images, target = batch(8, device=device)
    model, plain = small(device=device), small(device=device)
    task = PgdTask(model, nn.CrossEntropyLoss(), PixelAttack(0.0, 1.0, 2, MEAN, STD, "uniform"), verbose=False)
    state = rng_state(device)
    for _ in range(2):
        F.cross_entropy(plain(images), target).backward()
    set_rng_state(state, device)
    for _ in range(2):
        task(images, target)["loss"].backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    for buffer, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_life_cycle(device: torch.device) -> None:
    check_life_cycle("--method", "pgd-at", "--pgd-at-steps", "2", device=device)


def test_reports_the_adversarial_loss_only(device: torch.device) -> None:
    task = task_from(small(device=device), "--method", "pgd-at", "--pgd-at-steps", "2")
    (loss,) = train(task, torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1), steps=1)
    assert task.interval_text().startswith("Adv: ")
    assert task.epoch_metrics() == {"loss_adv": pytest.approx(loss.item(), rel=1e-6)}
    assert task.summary_lines() == ["PGD adversarial training: PGD-2, eps 8/255, alpha 2/255, uniform start"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "pgd-at", "--pgd-at-eps", "-8"], "--pgd-at-eps -8.0: expected at least 0"),
        (["--method", "pgd-at", "--pgd-at-alpha", "-1"], "--pgd-at-alpha -1.0: expected a finite step above 0"),
        (["--method", "pgd-at", "--pgd-at-steps", "0"], "--pgd-at-steps 0: expected a whole number of at least 1"),
        (["--method", "advprop", "--pgd-at-steps", "3"], "--pgd-at-steps 3: has no effect without --method pgd-at"),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked(*argv)
