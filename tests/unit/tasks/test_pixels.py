"""Attacks on images: per-channel sizes, valid pixels, targets, and gradients of images alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rng import rng_state
from torch import Tensor, nn
from toys import batch

from timm_alfa.peers import AdvPropTask, FastAdvPropTask, PgdTask, PixelAttack
from timm_alfa.tasks.pixels import other_classes

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


def _attack(**settings: object) -> PixelAttack:
    return PixelAttack(**{"eps": 4.0, "alpha": 1.0, "steps": 1, "mean": MEAN, "std": STD, **settings})  # type: ignore


def _column(values: tuple[float, ...], images: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=images.device).view(-1, 1, 1)


def _normalised(pixels: Tensor) -> Tensor:
    return (pixels - _column(MEAN, pixels)) / _column(STD, pixels)


def _pixels(images: Tensor) -> Tensor:
    return images * _column(STD, images) + _column(MEAN, images)


class Linear(nn.Module):
    """Class 0 scores the weighted sum of pixels, class 1 nothing: the loss of class 1 rises along the weights."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.weight).sum(dim=(1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], dim=1)


@pytest.mark.parametrize(("steps", "moved"), [(1, 1.0), (3, 3.0), (7, 4.0)])
def test_pixels_move_by_steps_within_the_ball(steps: int, moved: float, device: torch.device) -> None:
    weight = torch.randn(3, 4, 4, dtype=torch.float64).to(device)
    pixels = (torch.rand(2, 3, 4, 4, dtype=torch.float64) * 0.8 + 0.1).to(device)
    target = torch.ones(2, dtype=torch.long, device=device)
    perturbed = _attack(steps=steps)(Linear(weight), F.cross_entropy, _normalised(pixels), target)
    torch.testing.assert_close(_pixels(perturbed), pixels + moved / 255 * weight.sign(), rtol=0, atol=1e-12)


def test_pixels_stay_valid() -> None:
    weight = torch.ones(3, 1, 1, dtype=torch.float64)
    pixels = torch.tensor([0.0, 0.5, 0.999, 1.0, 1.2], dtype=torch.float64).view(5, 1, 1, 1).expand(5, 3, 1, 1)
    attack = _attack(alpha=2.0, steps=5)
    up = _pixels(attack(Linear(weight), F.cross_entropy, _normalised(pixels), torch.ones(5, dtype=torch.long)))
    expected = torch.tensor([4 / 255, 0.5 + 4 / 255, 1.0, 1.0, 1.2], dtype=torch.float64).view(5, 1, 1, 1)
    torch.testing.assert_close(up, expected.expand(5, 3, 1, 1), rtol=0, atol=1e-12)
    down = _pixels(attack(Linear(-weight), F.cross_entropy, _normalised(1 - pixels), torch.ones(5, dtype=torch.long)))
    torch.testing.assert_close(down, 1 - expected.expand(5, 3, 1, 1), rtol=0, atol=1e-12)


def test_random_starts_fill_the_ball_and_leave_the_global_state(device: torch.device) -> None:
    images = _normalised(torch.full((8, 3, 6, 6), 0.5, dtype=torch.float64, device=device))
    model = Linear(torch.zeros(3, 6, 6, dtype=torch.float64, device=device))
    target = torch.ones(8, dtype=torch.long, device=device)
    state = rng_state(device)
    moves = _pixels(_attack(init="uniform")(model, F.cross_entropy, images, target, torch.Generator(device))) - 0.5
    assert torch.equal(rng_state(device), state)
    assert (moves.abs() <= 4 / 255 + 1e-12).all()
    assert moves.amax(dim=(0, 2, 3)).min() > 3.5 / 255
    assert moves.amin(dim=(0, 2, 3)).max() < -3.5 / 255


def test_targeted_attacks_lower_the_loss_of_the_other_class() -> None:
    weight = torch.randn(3, 4, 4, dtype=torch.float64)
    images, target = _normalised(torch.full((2, 3, 4, 4), 0.5, dtype=torch.float64)), torch.tensor([0, 1])
    perturbed = _pixels(_attack(targeted=True)(Linear(weight), F.cross_entropy, images, target)) - 0.5
    torch.testing.assert_close(perturbed[0], -weight.sign() / 255, rtol=0, atol=1e-12)  # towards class 1
    torch.testing.assert_close(perturbed[1], weight.sign() / 255, rtol=0, atol=1e-12)


def test_other_classes(device: torch.device) -> None:
    target = torch.arange(4, device=device).repeat(500)
    other = other_classes(target, 4)
    assert (other != target).all()
    counts = torch.bincount((other - target) % 4, minlength=4)
    assert counts[1:].min() > 550
    soft = F.one_hot(target, 4) * 0.6 + 0.1
    drawn = other_classes(soft, 4)
    assert drawn.shape == soft.shape
    assert drawn.dtype == soft.dtype
    assert (drawn.sum(1) == 1).all()
    assert (drawn.argmax(1) != target).all()
    with pytest.raises(ValueError, match="at least 2"):
        other_classes(target, 1)


class Watched(torch.autograd.Function):
    """Identity that notes whether the gradient of a weight is asked for."""

    asked: list[bool]

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        Watched.asked.append(ctx.needs_input_grad[1])  # type: ignore[attr-defined]
        return gradient, None


def test_only_gradients_of_images_are_computed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))
            self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return Watched.apply(x, self.weight).mean(dim=(2, 3))

    Watched.asked, model = [], Model()
    _attack(steps=3)(model, F.cross_entropy, torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))
    assert Watched.asked == [False] * 3
    assert model.weight.requires_grad
    assert not model.frozen.requires_grad
    assert model.weight.grad is None


def test_one_channel_and_low_precision(device: torch.device) -> None:
    images, target = torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16, device=device), torch.tensor([0, 0], device=device)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(device).bfloat16()
    perturbed = _attack(mean=(0.5,), std=(0.5,))(model, F.cross_entropy, images, target)
    assert perturbed.dtype == torch.bfloat16
    torch.testing.assert_close(perturbed.abs(), torch.full_like(images, 2 / 255))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -1.0}, "eps: .* found -1"),
        ({"eps": float("nan")}, "eps: "),
        ({"alpha": 0.0}, "alpha: .* found 0"),
        ({"steps": 0}, "steps: .* found 0"),
        ({"init": "middle"}, "init: .* found 'middle'"),
        ({"std": (0.2, 0.0, 0.1)}, "std: "),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _attack(**settings)


@pytest.mark.parametrize(("kind", "times"), [(PgdTask, 1), (AdvPropTask, 2), (FastAdvPropTask, 1)])
def test_a_stem_in_front_learns_from_perturbed_images_too(kind: Any, times: int, device: torch.device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).double().to(device)
    stem = nn.Conv2d(3, 3, 1).double().to(device)
    images, target = batch(8, device=device)
    init = "uniform" if kind is FastAdvPropTask else "zero"
    task = kind(model, F.cross_entropy, PixelAttack(0.0, 1.0, 1, (0.5,), (0.25,), init), verbose=False)
    result = task(stem(images), target)
    found = torch.autograd.grad(result["loss"] + result["output"].square().mean(), list(stem.parameters()))
    count = len(result["output"])  # Fast AdvProp attacks some of the images, the others are clean
    output = model(stem(images))
    loss = times * F.cross_entropy(output, target)
    if kind is FastAdvPropTask:
        share = 1 - count / len(images)
        loss = (1 - share) * F.cross_entropy(output[:count], target[:count])
        loss = loss + share * F.cross_entropy(output[count:], target[count:])
    expected = torch.autograd.grad(loss + output[:count].square().mean(), list(stem.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
