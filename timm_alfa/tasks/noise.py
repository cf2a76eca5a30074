"""Random noise on features: ALFA's objective with N(0, sigma^2) in place of the perturbation (the paper's Table 7)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import pgd
from ..engine.batchnorm import BATCH_NORM_MODES, BatchNormMode
from ..engine.replay import Recording
from ..errors import BlockError, UsageError
from ..loss import REDUCTIONS, Reduction
from ..sizes import Relative, Size, checked_size, describe_size
from ..wrapper import GRADIENTS, AlfaWrapper, Gradient
from .alfa import AlfaTask
from .flags import Flag, at_least_zero, is_size_of_at_least_zero, number, size

FLAGS = (
    Flag("noise_blocks", ["@last"], "blocks whose outputs get noise, named as for --alfa-blocks", nargs="+"),
    Flag(
        "noise_sigma",
        0.5 / 255,
        "standard deviation, in feature units, or as a share of the feature's rms, such as 2%%",
        size,
        expected="a finite number of at least 0, or a share such as 2%",
        valid=is_size_of_at_least_zero,
    ),
    Flag(
        "noise_lambda",
        1.0,
        "weight of the losses with noise",
        number,
        expected="a finite weight of at least 0",
        valid=at_least_zero,
    ),
    Flag("noise_reduction", "sum", "add the losses with noise, or average them with the clean one", choices=REDUCTIONS),
    Flag("noise_grad", "full", "whether they also train the layers before their block", choices=GRADIENTS),
    Flag("noise_bn", "clean", "as --alfa-bn", choices=BATCH_NORM_MODES),
)


class NoiseWrapper(AlfaWrapper):
    """Perturbs features at random; tail passes, objective and batch norm are those of :class:`AlfaWrapper`."""

    sigma: Size = 0.0

    @property
    def starts_from_clean(self) -> bool:
        """Noise needs no gradient."""
        return False

    def find_delta(
        self,
        recording: Recording,
        name: str,
        target: Any,
        first_gradient: Sequence[Tensor] | None = None,
        note: Callable[[Sequence[Tensor]], object] | None = None,
    ) -> list[Tensor]:
        """N(0, sigma^2), drawn anew in every step and for every block; the global random state stays as it is."""
        features = recording.features[name].tensors
        parts = pgd.zeros(features)
        generator = torch.Generator(parts[0].device)
        index = self.blocks.index(name)
        generator.manual_seed((torch.initial_seed() + 1_000_003 * self.passes + 7_919 * index) % 2**63)
        noise = [part.normal_(0, 1, generator=generator) for part in parts]
        return pgd.scaled(noise, pgd.absolute(self.sigma, features))


class NoiseTask(AlfaTask):
    """crit(model(x), y) + lam * sum_i crit(T_i(f_i + noise_i), y).

    Args:
        model, criterion, blocks, criterion_kwargs, lam, reduction, grad, bn, device, dtype, verbose: See
            :class:`~timm_alfa.AlfaTask`.
        sigma: Standard deviation of the noise, at least 0, in units of the feature, or as a share of its rms, ``"2%"``.

    Raises:
        ValueError, TypeError: An argument is out of its range. BlockError: A block does not resolve.
    """

    wrapper_type = NoiseWrapper

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        blocks: str | Sequence[str] = "@last",
        *,
        sigma: float | str | Relative = 0.5 / 255,
        criterion_kwargs: dict[str, Any] | None = None,
        lam: float = 1.0,
        reduction: Reduction = "sum",
        grad: Gradient = "full",
        bn: BatchNormMode = "clean",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        size = checked_size("sigma", sigma, "a finite standard deviation of at least 0")
        super().__init__(
            model,
            criterion,
            blocks,
            criterion_kwargs=criterion_kwargs,
            lam=lam,
            reduction=reduction,
            grad=grad,
            bn=bn,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )
        assert isinstance(self.alfa, NoiseWrapper)
        self.alfa.sigma = size

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """The noise, then the blocks with their shapes and the share of FLOPs behind them."""
        alfa, loss = self.alfa, self.objective
        assert isinstance(alfa, NoiseWrapper)
        head = (
            f"Noise: sigma {describe_size(alfa.sigma)}, lambda {loss.lam:g}, {loss.reduction}, "
            f"gradients {alfa.grad}, batch norm {alfa.bn}"
        )
        return [head, *super().summary_lines(input_size)[1:]]


def build(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    input_size: tuple[int, int, int] | None,
    **common: Any,
) -> NoiseTask:
    """The task that checked arguments ask for; ``common`` holds device, dtype and verbose."""
    try:
        task = NoiseTask(
            model,
            criterion,
            args.noise_blocks,
            sigma=args.noise_sigma,
            lam=args.noise_lambda,
            reduction=args.noise_reduction,
            grad=args.noise_grad,
            bn=args.noise_bn,
            **common,
        )
        if input_size is not None:
            task.alfa.check_blocks(input_size)
    except BlockError as error:
        raise UsageError(f"--noise-blocks {' '.join(args.noise_blocks)}: {error}") from None
    return task
