"""Random noise on features: ALFA's objective and passes, with drawn perturbations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peers import check_life_cycle, checked, small, task_from
from rng import rng_state, set_rng_state
from torch import nn
from toys import batch

from timm_alfa import AlfaWrapper, UsageError
from timm_alfa.peers import NoiseTask
from timm_alfa.perturbation import Gaussian


def _task(model: nn.Module, sigma: float, blocks: list[str], **options: object) -> NoiseTask:
    return NoiseTask(model, nn.CrossEntropyLoss(), blocks, sigma=sigma, verbose=False, **options)  # type: ignore


@pytest.mark.parametrize("blocks", [["block"], ["stem", "block"]])
def test_without_noise_the_clean_loss_counts_once_more_per_block(blocks: list[str], device: torch.device) -> None:
    images, target = batch(8, device=device)
    model, plain = small(device=device), small(device=device)
    state = rng_state(device)
    loss = F.cross_entropy(plain(images), target)
    loss.backward()
    set_rng_state(state, device)
    result = _task(model, 0.0, blocks)(images, target)
    result["loss"].backward()
    torch.testing.assert_close(result["loss"], (1 + len(blocks)) * loss, rtol=1e-12, atol=0)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, (1 + len(blocks)) * other.grad, rtol=1e-9, atol=1e-14)
    for buffer, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, other)


def test_noise_has_its_size_and_changes_from_step_to_step_and_block_to_block(device: torch.device) -> None:
    images, target = batch(16, batch_size=16, device=device)
    alfa = AlfaWrapper(small(device=device), F.cross_entropy, ["stem", "block"], perturbation=Gaussian(0.25))
    found = [alfa(images, target).deltas for _ in range(2)]
    for delta in (found[0]["stem"], found[0]["block"]):
        assert delta.std().item() == pytest.approx(0.25, rel=0.05)
        assert abs(delta.mean().item()) < 0.01
    assert not torch.equal(found[0]["stem"], found[1]["stem"])
    assert not torch.equal(found[0]["stem"].flatten()[:64], found[0]["block"].flatten()[:64])


def test_weight_zero_is_plain_training_bit_for_bit(device: torch.device) -> None:
    images, target = batch(8, device=device)
    model, plain = small(device=device), small(device=device)
    task = _task(model, 0.1, ["block"], lam=0.0)
    state = rng_state(device)
    for _ in range(2):
        F.cross_entropy(plain(images), target).backward()
    end = rng_state(device)
    set_rng_state(state, device)
    for _ in range(2):
        task(images, target)["loss"].backward()
    assert torch.equal(rng_state(device), end)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_gradients_are_those_of_the_objective(device: torch.device) -> None:
    images, target = batch(8, device=device)
    model = small(drop=0.0, device=device)
    task = _task(model, 0.1, ["block"], lam=0.5)
    plain = copy.deepcopy(model)
    alfa = AlfaWrapper(copy.deepcopy(model), F.cross_entropy, ["block"], perturbation=Gaussian(0.1))
    delta = alfa(images, target).deltas["block"]  # the same step draws the same noise
    feature = plain.block(plain.stem(images))
    outputs = [plain.head(plain.neck(value.mean(dim=(2, 3)))) for value in (feature, feature + delta)]
    (F.cross_entropy(outputs[0], target) + 0.5 * F.cross_entropy(outputs[1], target)).backward()
    task(images, target)["loss"].backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("extra", [(), ("--noise-bn", "aux")])
def test_life_cycle(extra: tuple[str, ...], device: torch.device) -> None:
    check_life_cycle("--method", "noise", "--noise-blocks", "stem", "--noise-sigma", "0.1", *extra, device=device)


def test_summary(device: torch.device) -> None:
    task = task_from(small(device=device), "--method", "noise", "--noise-blocks", "block", "--noise-sigma", "1/255")
    lines = task.summary_lines((3, 8, 8))
    assert lines[0] == "Noise: sigma 1/255, lambda 1, sum, gradients full, batch norm clean"
    assert any("block" in line for line in lines[1:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "noise", "--noise-sigma", "-1"], "--noise-sigma -1.0: expected a finite number of at least 0"),
        (["--method", "noise", "--noise-lambda", "inf"], "--noise-lambda inf: expected a finite weight"),
        (["--noise-sigma", "0.1"], "--noise-sigma 0.1: has no effect without --method noise"),
        (["--alfa-blocks", "stem", "--noise-blocks", "stem"], "--noise-blocks stem: has no effect without"),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked(*argv)


def test_bad_blocks(device: torch.device) -> None:
    with pytest.raises(UsageError, match="--noise-blocks stemm: no block is called 'stemm'"):
        task_from(small(device=device), "--method", "noise", "--noise-blocks", "stemm")
    with pytest.raises(ValueError, match=r"sigma: .* found -1"):
        _task(small(device=device), -1.0, ["block"])
