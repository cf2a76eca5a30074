"""The objective's arithmetic, by hand, and what a criterion may return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import batch

from timm_alfa import AlfaLoss, AlfaOutput, AlfaTask, AlfaWrapper
from timm_alfa.loss import bernoulli_divergence
from timm_alfa.peers import AdvPropTask, FastAdvPropTask, NoiseTask, PgdTask
from timm_alfa.tasks.pixels import PixelAttack


def criterion(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).sum()


def outputs(eta: Tensor | None = None, blocks: int = 2) -> AlfaOutput:
    clean = torch.tensor([1.0, 2.0], requires_grad=True)
    adversarial = {f"block{i}": torch.tensor([3.0, float(i)], requires_grad=True) for i in range(blocks)}
    return AlfaOutput(clean, adversarial, {}, torch.ones(blocks) if eta is None else eta)


TARGET = torch.tensor([1.0, 10.0])  # clean 21, adversarial 3 and 13


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 37.0),
        ({"lam": 0.5}, 29.0),
        ({"lam": 0.0}, 21.0),
        ({"reduction": "mean"}, 14.5),
        ({"reduction": "mean", "lam": 3.0}, 11.25),
        ({"reduction": "mean", "lam": 0.0}, 21.0),
        ({"gamma": 5.0}, 37.0),  # eta is not learned
    ],
)
def test_values(options: dict[str, Any], expected: float) -> None:
    result = AlfaLoss(criterion, **options)(outputs(), TARGET)
    assert result.loss.item() == expected
    assert result.clean.item() == 21.0
    assert {name: value.item() for name, value in result.adversarial.items()} == {"block0": 3.0, "block1": 13.0}
    assert result.l1.item() == 0.0
    assert not any(part.requires_grad for part in (result.clean, result.l1, *result.adversarial.values()))


def test_gradients_carry_the_weights() -> None:
    output = outputs()
    AlfaLoss(criterion, lam=2.0, reduction="mean")(output, TARGET).loss.backward()
    torch.testing.assert_close(output.output.grad, TARGET / 3)
    for adversarial in output.adv_outputs.values():
        torch.testing.assert_close(adversarial.grad, TARGET / 3)


def test_learned_eta_pays_its_l1_norm() -> None:
    eta = torch.tensor([1.25, -0.25], dtype=torch.float64, requires_grad=True)
    result = AlfaLoss(criterion, gamma=2.0)(outputs(eta), TARGET)
    assert result.loss.item() == 40.0
    assert result.l1.item() == 1.5
    result.loss.backward()
    assert eta.grad is not None
    assert eta.grad.tolist() == [2.0, -2.0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_without_adversarial_outputs_it_is_the_clean_loss(reduction: Any) -> None:
    result = AlfaLoss(criterion, lam=2.0, reduction=reduction)(outputs(blocks=0), TARGET)
    assert result.loss.item() == 21.0
    assert result.adversarial == {}


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_changing_the_loss_in_place_changes_nothing_else(blocks: int) -> None:
    result = AlfaLoss(criterion, lam=0.0)(outputs(blocks=blocks), TARGET)
    result.loss /= 2
    assert result.loss.item() == 10.5
    assert result.clean.item() == 21.0


@pytest.mark.parametrize("name", ["lam", "gamma"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a finite number of at least 0, found {value}"):
        AlfaLoss(criterion, **{name: value})


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="reduction: expected one of sum, mean, found 'max'"):
        AlfaLoss(criterion, reduction="max")  # type: ignore[arg-type]


class Boxed(nn.Module):
    """Returns its loss as other libraries do."""

    def __init__(self, box: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.box = box

    def forward(self, output: Tensor, target: Tensor) -> Any:
        return self.box(F.cross_entropy(output, target, reduction="none"))


def _steps(criterion: Any, device: torch.device) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """One training step's loss by everything that calls a criterion."""
    attack = PixelAttack(eps=4.0, alpha=1.0, steps=1, mean=(0.5,) * 3, std=(0.25,) * 3)
    options: dict[str, Any] = {"verbose": False}

    def small() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("resnet20s", num_classes=10).to(device).train()

    wrapper = AlfaWrapper(small(), criterion, "layer3")
    tasks = [
        AlfaTask(small(), criterion, "layer3", **options),
        NoiseTask(small(), criterion, "layer3", **options),
        AdvPropTask(small(), criterion, attack, **options),
        FastAdvPropTask(small(), criterion, replace(attack, init="uniform"), **options),
        PgdTask(small(), criterion, attack, **options),
    ]
    by_wrapper = lambda images, target: AlfaLoss(criterion)(wrapper(images, target), target).loss  # noqa: E731
    return [by_wrapper, *((lambda images, target, task=task: task(images, target)["loss"]) for task in tasks)]


def test_a_criterion_may_return_one_number_in_any_shape(device: torch.device) -> None:
    images, target = batch(16, dtype=torch.float32, device=device)
    plain = [step(images, target) for step in _steps(Boxed(lambda losses: losses.mean()), device)]
    for box in (lambda losses: losses.mean().reshape(1), lambda losses: losses.mean().reshape(1, 1)):
        for loss, expected in zip([step(images, target) for step in _steps(Boxed(box), device)], plain, strict=True):
            assert loss.shape == ()
            assert torch.equal(loss, expected)
            loss.backward()


@pytest.mark.parametrize(
    ("box", "error", "message"),
    [
        (lambda losses: losses, ValueError, r"one number.*found a tensor of shape \[\d\].*reduction='mean'"),
        (lambda losses: (losses.mean(), 3), TypeError, r"found a tuple of 2 \(Tensor, int\)"),
        (lambda losses: {"loss": losses.mean()}, TypeError, "found a dict with keys 'loss'"),
        (lambda losses: losses.mean().item(), TypeError, r"found \d.*\(float\)"),
        (lambda losses: None, TypeError, "found None"),
        (lambda losses: losses.argmax(), TypeError, r"floating-point tensor.*torch.int64"),
    ],
)
def test_other_returns_of_a_criterion_are_named(
    box: Callable[[Tensor], Any], error: Any, message: str, device: torch.device
) -> None:
    images, target = batch(16, dtype=torch.float32, device=device)
    for step in _steps(Boxed(box), device):
        with pytest.raises(error, match=f"criterion: expected it to return .*{message}"):
            step(images, target)


def test_the_divergence_of_independent_labels_is_that_of_bernoulli_distributions() -> None:
    clean, perturbed = (torch.randn(5, 7, dtype=torch.float64).requires_grad_() for _ in range(2))
    found = bernoulli_divergence(clean, perturbed)
    p, q = (torch.distributions.Bernoulli(logits=logits) for logits in (clean.detach(), perturbed))
    expected = torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, perturbed)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
    assert not bernoulli_divergence(clean, perturbed.detach()).requires_grad  # the clean prediction is given
    assert bernoulli_divergence(clean, clean).item() == 0


def test_it_stays_finite_where_predictions_are_certain() -> None:
    certain = torch.tensor([[200.0, -200.0]])
    assert bernoulli_divergence(certain, certain).item() == 0
    leaf = (-certain).requires_grad_()
    loss = bernoulli_divergence(certain, leaf)
    assert loss.item() == pytest.approx(200)
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()
    half = bernoulli_divergence(certain.bfloat16(), -certain.bfloat16())
    assert half.dtype == torch.float32


def test_the_objective_takes_it_for_independent_labels() -> None:
    outputs = AlfaOutput(torch.randn(4, 3), {"a": torch.randn(4, 3)}, {}, torch.ones(1))
    target = torch.ones(4, 3)
    found = {
        multi_label: AlfaLoss(F.binary_cross_entropy_with_logits, objective="kl", multi_label=multi_label)(
            outputs, target
        ).adversarial["a"]
        for multi_label in (False, True)
    }
    assert torch.equal(found[True], bernoulli_divergence(outputs.output, outputs.adv_outputs["a"]))
    assert not torch.equal(found[False], found[True])
    with pytest.raises(TypeError, match=r"objective 'kl': expected a model that returns logits"):
        bernoulli_divergence(torch.ones(4), torch.ones(4))
