"""Perturbations by themselves: moments against a plain implementation, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from parity import gradient_errors
from torch import Tensor, nn
from toys import Small, batch

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.perturbation import Gaussian, Moments, Pgd, pgd_in


class Shaped(nn.Module):
    """A block whose output has a given shape, and a tail."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.block = nn.Sequential(
            nn.Flatten(), nn.Linear(192, int(torch.tensor(shape).prod())), nn.Unflatten(1, shape)
        )
        self.head = nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(int(torch.tensor(shape).prod()), 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


def plain_delta(model: Shaped, images: Tensor, target: Tensor, dims: tuple[int, ...], **options: Any) -> Tensor:
    """By autograd on (1 + m) mean + (1 + s) (f - mean)."""
    alpha, steps, norm, eps = (options[name] for name in ("alpha", "steps", "norm", "eps"))
    feature = model.block(images).detach()
    mean = feature.mean(dim=dims, keepdim=True) if dims else feature
    m, s = torch.zeros_like(mean), torch.zeros_like(mean)
    for _ in range(steps):
        m.requires_grad_(), s.requires_grad_()
        loss = F.cross_entropy(model.head((1 + m) * mean + (1 + s) * (feature - mean)), target)
        gradients = torch.autograd.grad(loss, (m, s))
        if norm == "linf":
            m, s = (part.detach() + alpha * gradient.sign() for part, gradient in zip((m, s), gradients, strict=True))
            m, s = m.clamp(-eps, eps), s.clamp(-eps, eps)
        else:
            together = torch.stack(gradients, dim=1).flatten(2).flatten(1)
            length = together.norm(dim=1).view(-1, *[1] * (m.dim() - 1))
            scale = together.shape[1] ** 0.5
            m, s = (part.detach() + scale * alpha * g / length for part, g in zip((m, s), gradients, strict=True))
            size = torch.stack((m, s), dim=1).flatten(2).flatten(1).norm(dim=1).view_as(length)
            factor = (scale * eps / size).clamp(max=1)
            m, s = m * factor, s * factor
    return m * mean + s * (feature - mean)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("shape", "dims", "last"),
    [((4, 3, 3), (2, 3), False), ((3, 3, 4), (1, 2), True), ((6, 4), (1,), False), ((7,), (), False)],
    ids=["NCHW", "NHWC", "tokens", "vector"],
)
def test_moments_are_those_of_autograd(
    shape: tuple[int, ...], dims: tuple[int, ...], last: bool, steps: int, norm: Any, device: torch.device
) -> None:
    torch.manual_seed(3)
    model = Shaped(shape).double().to(device)
    images, target = torch.randn(4, 3, 8, 8, dtype=torch.float64).to(device), torch.arange(4, device=device)
    pgd = Moments("5%", steps=steps, eps="8%", norm=norm, channels_last=last)
    alfa = AlfaWrapper(model.train(), F.cross_entropy, "block", perturbation=pgd)
    found = alfa(images, target).deltas["block"]
    expected = plain_delta(model, images, target, dims, alpha=0.05, steps=steps, norm=norm, eps=0.08)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_random_start_lies_in_the_ball_and_differs_from_step_to_step(device: torch.device) -> None:
    model = Shaped((4, 3, 3)).to(device).train()
    images, target = torch.randn(4, 3, 8, 8).to(device), torch.arange(4, device=device)
    pgd = Moments("0.0001%", eps="10%", init="uniform")
    alfa = AlfaWrapper(model, F.cross_entropy, "block", perturbation=pgd)
    first, second = (alfa(images, target).deltas["block"] for _ in range(2))
    assert not torch.equal(first, second)
    feature = model.block(images)
    mean = feature.mean(dim=(2, 3), keepdim=True)
    assert bool((first.abs() <= 0.1001 * (mean.abs() + (feature - mean).abs())).all())


def test_which_space() -> None:
    model = nn.Identity()
    assert pgd_in("values", model, 0.1, 1, None, "linf", "zero") == Pgd(0.1)
    assert pgd_in("moments", model, "5%", 2, None, "l2", "zero") == Moments("5%", 2, norm="l2")
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    assert pgd_in("moments", swin, "5%", 1, None, "linf", "zero") == Moments("5%", channels_last=True)
    with pytest.raises(ValueError, match="space: expected one of values, moments, found 'spectrum'"):
        AlfaWrapper(Small(), F.cross_entropy, "block", space="spectrum")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "perturbation", [Pgd("5%", steps=2), Moments("5%"), Gaussian("5%")], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_divergence_by_both_orders_of_work_and_by_hand(
    perturbation: Any, reduction: Any, device: torch.device
) -> None:
    torch.manual_seed(0)
    model = Small(drop=0.0).double().to(device).train()
    images, target = batch(8, device=device)
    models = [copy.deepcopy(model) for _ in range(3)]
    torch.manual_seed(1)
    task = AlfaTask(
        models[0], F.cross_entropy, ["stem", "block"], perturbation=perturbation, objective="kl", lam=0.7,
        reduction=reduction, verbose=False,
    )  # fmt: skip
    found = task(images, target)
    found["loss"].backward()
    torch.manual_seed(1)
    alfa = AlfaWrapper(models[1], F.cross_entropy, ["stem", "block"], perturbation=perturbation)
    output = alfa(images, target)
    result = AlfaLoss(F.cross_entropy, 0.7, reduction=reduction, objective="kl")(output, target)
    result.loss.backward()
    torch.testing.assert_close(found["loss"].detach(), result.loss.detach(), rtol=1e-9, atol=0)

    plain = models[2]
    stem = plain.stem(images)
    block = plain.block(stem)
    tail = lambda feature: plain.head(plain.neck(feature.mean(dim=(2, 3))))  # noqa: E731
    clean = tail(block)
    p = clean.detach().softmax(1)
    perturbed = tail(plain.block(stem + output.deltas["stem"])), tail(block + output.deltas["block"])
    terms = [(p * (p.log() - logits.log_softmax(1))).sum(1).mean() for logits in perturbed]
    crit = F.cross_entropy(clean, target)
    loss = crit + 0.7 * sum(terms) if reduction == "sum" else (crit + 0.7 * sum(terms) / 2) / 1.7
    loss.backward()
    torch.testing.assert_close(result.loss.detach(), loss.detach(), rtol=1e-9, atol=0)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert max(gradient_errors(models[0], expected).values()) < 1e-9
    assert max(gradient_errors(models[1], expected).values()) < 1e-9
    for block_name, term in zip(("stem", "block"), terms, strict=True):
        torch.testing.assert_close(found["loss_adv_by_block"][block_name], term.detach(), rtol=1e-9, atol=1e-15)
    metrics = task.epoch_metrics()
    assert metrics["loss_rise_block"] == pytest.approx(float(terms[1].detach() / crit.detach()), rel=1e-5)


def test_the_divergence_needs_logits(device: torch.device) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = Small(drop=0.0)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            output = self.small(x)
            return output, output

    task = AlfaTask(
        Pair().to(device).train(),
        lambda output, target: F.cross_entropy(output[0], target),
        "small.block",
        objective="kl",
        verbose=False,
    )
    with pytest.raises(TypeError, match="objective 'kl': expected a model that returns logits"):
        task(*batch(8, dtype=torch.float32, device=device))
    with pytest.raises(ValueError, match="objective: expected one of ce, kl, found 'js'"):
        AlfaLoss(F.cross_entropy, objective="js")  # type: ignore[arg-type]
