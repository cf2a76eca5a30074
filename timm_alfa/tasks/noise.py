"""Random noise on features: ALFA's objective with N(0, sigma^2) in place of the perturbation (the paper's Table 7)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.batchnorm import BATCH_NORM_MODES, BatchNormMode
from ..engine.core import GRADIENTS, Gradient
from ..errors import BlockError, UsageError
from ..loss import OBJECTIVES, REDUCTIONS, Objective, Reduction
from ..perturbation import Gaussian
from ..sizes import Relative
from .alfa import AlfaTask
from .flags import Flag, at_least_zero, is_size_of_at_least_zero, number, settings, size

# fmt: off
FLAGS = (
    Flag(
        "noise_blocks", ["@last"], "blocks whose outputs get noise, named as for --alfa-blocks", nargs="+",
        argument="blocks",
    ),
    Flag(
        "noise_sigma", Gaussian.sigma, "standard deviation, in feature units, or as a share of the feature's rms, such "
        "as 2%%", size, expected="a finite number of at least 0, or a share such as 2%",
        valid=is_size_of_at_least_zero, argument="sigma",
    ),
    Flag(
        "noise_lambda", 1.0, "weight of the losses with noise", number, expected="a finite weight of at least 0",
        valid=at_least_zero, argument="lam",
    ),
    Flag(
        "noise_reduction", "sum", "add the losses with noise, or average them with the clean one", choices=REDUCTIONS,
        argument="reduction",
    ),
    Flag(
        "noise_objective", "ce", "as --alfa-objective; with kl this is R3F's noise", choices=OBJECTIVES,
        argument="objective",
    ),
    Flag(
        "noise_grad", "full", "whether they also train the layers before their block", choices=GRADIENTS,
        argument="grad",
    ),
    Flag("noise_bn", "clean", "as --alfa-bn", choices=BATCH_NORM_MODES, argument="bn"),
)
# fmt: on


class NoiseTask(AlfaTask):
    """crit(model(x), y) + lam * sum_i crit(T_i(f_i + noise_i), y).

    ``model``, ``criterion``, ``blocks``, ``criterion_kwargs``, ``lam``, ``reduction``, ``objective``, ``grad``, ``bn``,
    ``device``, ``dtype`` and ``verbose`` are as for :class:`~timm_alfa.AlfaTask`.

    Args:
        sigma: Standard deviation of the noise, at least 0, in units of the feature, or as a share of its rms, ``"2%"``.

    Raises:
        ValueError, TypeError: An argument is out of its range. BlockError: A block does not resolve.
    """

    title = "Noise"
    size_flag = "--noise-sigma"

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        blocks: str | Sequence[str] = "@last",
        *,
        sigma: float | str | Relative = Gaussian.sigma,
        criterion_kwargs: dict[str, Any] | None = None,
        lam: float = 1.0,
        reduction: Reduction = "sum",
        objective: Objective = "ce",
        grad: Gradient = "full",
        bn: BatchNormMode = "clean",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(
            model,
            criterion,
            blocks,
            criterion_kwargs=criterion_kwargs,
            perturbation=Gaussian(sigma),
            lam=lam,
            reduction=reduction,
            objective=objective,
            grad=grad,
            bn=bn,
            device=device,
            dtype=dtype,
            verbose=verbose,
        )


def build(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    input_size: tuple[int, int, int] | None,
    task_type: Callable[..., NoiseTask] = NoiseTask,
    **common: Any,
) -> NoiseTask:
    """The task that checked arguments ask for; ``common`` holds device, dtype and verbose.

    Raises:
        UsageError: A block does not resolve or cannot be perturbed.
    """
    try:
        task = task_type(model, criterion, **settings(args, FLAGS), **common)
        if input_size is not None:
            task.engine.check_blocks(input_size)
    except BlockError as error:
        raise UsageError(f"--noise-blocks {' '.join(args.noise_blocks)}: {error}") from None
    return task
