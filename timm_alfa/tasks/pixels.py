"""Perturbed images: eps, alpha and steps in pixel values, for images that the data loader normalised."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from torch import Tensor, nn

from .. import pgd
from ..engine.float16 import attack_gradients
from ..engine.randomness import RandomState
from ..loss import scalar_loss
from ..pgd import Init
from .flags import above_zero, at_least_zero

AttackMode = Literal["train", "eval"]
ATTACK_MODES: tuple[AttackMode, ...] = ("train", "eval")


@dataclass(frozen=True)
class PixelAttack:
    """l_inf PGD on images [B, C, H, W] that were normalised as (pixel - mean) / std, pixels in [0, 1].

    Sizes are in 1/255 of the [0, 1] image. Per channel they become eps / std of the normalised image, and perturbed
    pixels stay in [(0 - mean) / std, (1 - mean) / std]; a pixel that was outside before (noise of random erasing) is
    not moved further out.

    Args:
        eps: Radius of the ball, at least 0.
        alpha: Step size, above 0.
        steps: How many, at least 1.
        mean: Per channel; a single value stands for all.
        std: Per channel, above 0.
        init: Start at the image, or uniformly in the ball.
        targeted: Step towards another class, drawn per image, rather than away from the true one.

    Raises:
        ValueError: An argument is out of its range.
    """

    eps: float
    alpha: float
    steps: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    init: Init = "zero"
    targeted: bool = False

    def __post_init__(self) -> None:
        if not at_least_zero(self.eps):
            raise ValueError(f"eps: expected a finite radius of at least 0, in 1/255, found {self.eps}")
        if not above_zero(self.alpha):
            raise ValueError(f"alpha: expected a finite step size above 0, in 1/255, found {self.alpha}")
        if self.steps < 1:
            raise ValueError(f"steps: expected a whole number of at least 1, found {self.steps}")
        if self.init not in pgd.INITS:
            raise ValueError(f"init: expected one of {', '.join(pgd.INITS)}, found {self.init!r}")
        if not all(above_zero(value) for value in self.std):
            raise ValueError(f"std: expected finite values above 0, found {self.std}")

    def __call__(
        self,
        model: nn.Module,
        criterion: Any,
        images: Tensor,
        target: Tensor,
        generator: torch.Generator | None = None,
        masks: RandomState | None = None,
    ) -> Tensor:
        """The perturbed images, in the dtype of ``images`` and with their graph, if they have one; delta is detached.

        Args:
            model: Used in the mode and with the norms that it has now.
            criterion: (output, target) -> scalar.
            images: [B, C, H, W], normalised.
            target: [B] class indices, or [B, num_classes].
            generator: For the random start and the classes drawn, on the images' device.
            masks: Random state that every step starts from, so that all see the same dropout masks; moved on after.
        """
        pixels = images.detach()
        drawn: list[Tensor] = []

        def gradient_at(delta: list[Tensor]) -> list[Tensor]:
            leaf = (pixels + delta[0]).to(images.dtype).requires_grad_()
            if masks is not None:
                masks.restore()
            output = model(leaf)
            if isinstance(output, (tuple, list)):
                output = output[0]
            if self.targeted and not drawn:
                drawn.append(other_classes(target, output.shape[-1], generator))
            if self.targeted:
                loss = -scalar_loss(criterion, output, drawn[0])
            else:
                loss = scalar_loss(criterion, output, target)
            (gradient,) = attack_gradients(loss, [leaf], output)
            assert gradient is not None  # every output depends on its image
            return [gradient]

        with weights_frozen(model):
            delta = self._perturb(pixels, self.start(pixels, generator), gradient_at, self.steps)
        return (images + delta).to(images.dtype)

    def start(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The perturbation that the first step starts from, [B, C, H, W], at least float32.

        Args:
            images: [B, C, H, W], normalised.
            generator: For a random start, on the images' device.
        """
        if self.init == "zero":
            return pgd.zeros([images])[0]
        eps = self.eps / 255 / self._per_channel(self.std, images)
        return self._valid(images)(pgd.uniform([images], eps, generator))[0]

    def step(self, images: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
        """The perturbation after one step along a gradient that is known.

        Args:
            images: [B, C, H, W], normalised.
            delta: The perturbation so far, of the same shape.
            gradient: Of what is to rise, with respect to it.
        """
        return self._perturb(images, delta, lambda _: [gradient], 1)

    def _perturb(
        self, images: Tensor, delta: Tensor, gradient_at: Callable[[list[Tensor]], list[Tensor]], steps: int
    ) -> Tensor:
        std = self._per_channel(self.std, images)
        alpha, eps = self.alpha / 255 / std, self.eps / 255 / std
        search = pgd.climb([delta], steps=steps, alpha=alpha, eps=eps, valid=self._valid(images))
        (found,) = pgd.follow(search, gradient_at)
        return found

    def _valid(self, images: Tensor) -> Callable[[list[Tensor]], list[Tensor]]:
        """Cuts perturbations so that no pixel leaves [0, 1], or moves further out."""
        mean, std = self._per_channel(self.mean, images), self._per_channel(self.std, images)
        low = torch.minimum((0 - mean) / std - images, images.new_zeros(()))
        high = torch.maximum((1 - mean) / std - images, images.new_zeros(()))
        return lambda delta: [part.maximum(low).minimum(high) for part in delta]

    @classmethod
    def for_model(cls, args: argparse.Namespace, model: nn.Module, **settings: Any) -> PixelAttack:
        """An attack on what the data loader makes of images.

        Args:
            args: The training command's flags, of which ``--mean`` and ``--std`` count.
            model: Whose own mean and standard deviation count without them.
            settings: The other arguments of the attack.
        """
        config = resolve_data_config(vars(args), model=model, verbose=False)
        return cls(mean=tuple(config["mean"]), std=tuple(config["std"]), **settings)

    def describe(self) -> str:
        """Steps, radius, step size and start in a few words, for the log."""
        towards = ", targeted" if self.targeted else ""
        return f"PGD-{self.steps}, eps {self.eps:g}/255, alpha {self.alpha:g}/255, {self.init} start{towards}"

    @staticmethod
    def _per_channel(values: tuple[float, ...], images: Tensor) -> Tensor:
        adapted = adapt_to_chs(values, images.shape[1])
        return torch.tensor(adapted, device=images.device, dtype=pgd.working_dtype(images.dtype)).view(-1, 1, 1)


def other_classes(target: Tensor, num_classes: int, generator: torch.Generator | None = None) -> Tensor:
    """For each image a class, drawn uniformly, that is not its own; in the form that ``target`` has.

    Args:
        target: [B] class indices, or [B, num_classes] whose largest entry counts as the image's class.
        num_classes: At least 2.
        generator: On the target's device.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2 for a class other than the true one, found {num_classes}")
    own = target if target.dim() == 1 else target.argmax(dim=1)
    step = torch.randint(1, num_classes, own.shape, device=own.device, generator=generator)
    other = (own + step) % num_classes
    if target.dim() == 1:
        return other
    return nn.functional.one_hot(other, num_classes).to(target.dtype)


@contextmanager
def weights_frozen(model: nn.Module) -> Iterator[None]:
    """Forwards inside keep nothing for gradients of weights, and compiled ones do not compute any."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
