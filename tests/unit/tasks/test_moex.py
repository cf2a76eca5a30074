"""MoEx: moments against a loop over positions, both labels in the loss, alone and together with ALFA."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from peers import check_life_cycle, checked, small, task_from
from rng import rng_state, set_rng_state
from torch import Tensor, nn
from toys import Repeated, batch, family
from untouched import picture

from timm_alfa import BlockError, UsageError
from timm_alfa.peers import Moex, MoexTask
from timm_alfa.tasks.moex import exchange_moments


def _by_hand(feature: Tensor, order: Tensor) -> Tensor:
    """One position at a time, in plain numbers."""
    found = feature.clone()
    moments = {}
    for image in range(len(feature)):
        for row in range(feature.shape[2]):
            for column in range(feature.shape[3]):
                values = feature[image, :, row, column].tolist()
                mean = sum(values) / len(values)
                variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
                moments[image, row, column] = mean, math.sqrt(variance + 1e-5)
    for (image, row, column), (mean, std) in moments.items():
        other_mean, other_std = moments[int(order[image]), row, column]
        for channel in range(feature.shape[1]):
            value = feature[image, channel, row, column].item()
            found[image, channel, row, column] = (value - mean) / std * other_std + other_mean
    return found


def test_moments_are_exchanged(device: torch.device) -> None:
    feature = (torch.randn(3, 4, 2, 2, dtype=torch.float64) * 2 + 1).to(device)
    order = torch.tensor([1, 2, 0], device=device)
    found = exchange_moments(feature, order)
    torch.testing.assert_close(found, _by_hand(feature, order), rtol=1e-12, atol=1e-12)
    same = exchange_moments(feature, torch.arange(3, device=device))
    torch.testing.assert_close(same, feature, rtol=1e-12, atol=1e-12)
    low = exchange_moments(feature.bfloat16(), order)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, exchange_moments(feature.bfloat16().float(), order).bfloat16(), rtol=0, atol=0)


def _objective(model: Any, images: Tensor, target: Tensor, order: Tensor, lam: float) -> Tensor:
    """The loss of Small with moments exchanged behind its stem."""
    feature = model.block(exchange_moments(model.stem(images), order))
    output = model.head(model.neck(feature.mean(dim=(2, 3))))
    return lam * F.cross_entropy(output, target) + (1 - lam) * F.cross_entropy(output, target[order])


@pytest.mark.parametrize("soft", [False, True])
def test_loss_and_gradients(soft: bool, device: torch.device) -> None:
    images, target = batch(8, device=device)
    target = F.one_hot(target, 10) * 0.8 + 0.02 if soft else target
    model, plain = small(drop=0.0, device=device), small(drop=0.0, device=device)
    task = MoexTask(model, nn.CrossEntropyLoss(), Moex(model, "stem", lam=0.7), verbose=False)
    order = copy.copy(task.moex).draw(len(images), images.device)
    assert order is not None
    before = picture(model)
    result = task(images, target)
    assert picture(model) == before
    result["loss"].backward()
    expected = _objective(plain, images, target, order, 0.7)
    expected.backward()
    torch.testing.assert_close(result["loss"], expected, rtol=1e-12, atol=0)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("moex_block", ["stem", "stem.0", "block"])
def test_together_with_alfa(moex_block: str, device: torch.device) -> None:
    """Three steps, as replays learn from the first what they may leave out."""
    images, target = batch(8, device=device)
    model = small(drop=0.0, device=device)
    task: Any = task_from(
        model, "--alfa-blocks", "block", "--alfa-steps", "2", "--moex-block", moex_block, "--moex-lambda", "0.7"
    )
    plain = copy.deepcopy(model)

    def feature_of(order: Tensor) -> Tensor:
        x = plain.stem[0](images)
        x = exchange_moments(x, order) if moex_block == "stem.0" else x
        x = plain.stem[2](plain.stem[1](x))
        x = plain.block(exchange_moments(x, order) if moex_block == "stem" else x)
        return exchange_moments(x, order) if moex_block == "block" else x

    for _ in range(3):
        order = copy.copy(task.moex).draw(len(images), images.device)
        model.zero_grad()
        plain.zero_grad()

        def loss_of(value: Tensor, order: Tensor = order) -> Tensor:
            output = plain.head(plain.neck(value.mean(dim=(2, 3))))
            return 0.7 * F.cross_entropy(output, target) + 0.3 * F.cross_entropy(output, target[order])

        feature = feature_of(order)
        delta = torch.zeros_like(feature)
        for _ in range(2):
            leaf = delta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_of(feature.detach() + leaf), leaf)
            delta = delta + 0.5 / 255 * gradient.sign()
        expected = loss_of(feature) + loss_of(feature + delta)
        expected.backward()
        result = task(images, target)
        result["loss"].backward()
        torch.testing.assert_close(result["loss"], expected, rtol=1e-10, atol=0)
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-7, atol=1e-12, msg=name)
    assert task.summary_lines((3, 8, 8))[-1] == f"MoEx at {moex_block}, lambda 0.7, in 100% of the batches"


def test_probability_zero_is_plain_training_bit_for_bit(device: torch.device) -> None:
    images, target = batch(8, device=device)
    model, plain = small(device=device), small(device=device)
    task = MoexTask(model, nn.CrossEntropyLoss(), Moex(model, "stem", prob=0.0), verbose=False)
    state = rng_state(device)
    F.cross_entropy(plain(images), target).backward()
    set_rng_state(state, device)
    task(images, target)["loss"].backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_draws(device: torch.device) -> None:
    moex = Moex(small(device=device), "stem", prob=0.25)
    drawn = [moex.draw(8, device) for _ in range(400)]
    orders = [order for order in drawn if order is not None]
    assert 70 <= len(orders) <= 130
    assert all(sorted(order.tolist()) == list(range(8)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) > 60


def test_evaluation_is_clean(device: torch.device) -> None:
    images, target = batch(8, device=device)
    model = small(device=device).eval()
    task = MoexTask(model, nn.CrossEntropyLoss(), Moex(model, "stem"), verbose=False)
    assert torch.equal(task(images, target)["output"], copy.deepcopy(model)(images))


@pytest.mark.parametrize("extra", [(), ("--alfa-blocks", "block")])
def test_life_cycle(extra: tuple[str, ...], device: torch.device) -> None:
    check_life_cycle("--moex-block", "stem", "--moex-prob", "0.5", *extra, device=device)


def test_after_an_error_nothing_is_left(device: torch.device) -> None:
    model = small(device=device)
    before = picture(model)
    task = MoexTask(model, nn.CrossEntropyLoss(), Moex(model, "neck"), verbose=False)
    with pytest.raises(BlockError, match="'neck' does not return a feature map"):
        task(*batch(8, device=device))
    assert picture(model) == before


def test_checkpointed_blocks_are_refused(device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    model.set_grad_checkpointing()
    task = MoexTask(model, nn.CrossEntropyLoss(), Moex(model, "layer2.0"), verbose=False)
    with pytest.raises(BlockError, match="checkpointed part"):
        task(images, target)


def test_compiling_is_refused(device: torch.device) -> None:
    with pytest.raises(UsageError, match="does not go with MoEx"):
        task_from(small(device=device), "--moex-block", "stem").compile()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "moex"], "--method moex: needs --moex-block"),
        (["--moex-lambda", "0.5"], "--moex-lambda 0.5: has no effect without --moex-block"),
        (["--moex-block", "stem", "--moex-lambda", "1.5"], "--moex-lambda 1.5: expected 0 to 1"),
        (["--moex-block", "stem", "--moex-prob", "-1"], "--moex-prob -1.0: expected 0 to 1"),
        (["--method", "noise", "--moex-block", "stem"], "--moex-block stem: has no effect without"),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked(*argv)


@pytest.mark.parametrize(
    ("model", "block", "message"),
    [
        (small(), "stemm", "no block is called 'stemm'"),
        (small(), "neck", "'neck' does not return a feature map"),
        (small(), "stem.*", "matches 3 blocks; name one"),
        (Repeated(), "twice", "'twice' runs 2 times per forward"),
        (Repeated(), "never", "'never' runs 0 times per forward"),
        (timm.create_model("test_vit", img_size=8, patch_size=4), "blocks.0", "does not return a feature map"),
    ],
)
def test_bad_blocks(model: nn.Module, block: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"--moex-block .*{message}"):
        task_from(model, "--moex-block", block)
