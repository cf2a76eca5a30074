"""AlfaTask: ALFA as a ``timm.task``, the only bridge to timm's training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .attack import Init, Norm
from .batchnorm import BatchNormMode
from .blocks import format_blocks, list_blocks
from .eta import EtaSet
from .loss import AlfaLoss, Reduction
from .wrapper import AlfaWrapper, Gradient


class AlfaTask(ClassificationTask):
    """A classification task whose loss is ALFA's objective (Eq. 3).

    Everything that timm's ``train.py`` asks of a task holds: the trainable module, the evaluation model, EMA and
    checkpoints are those of the plain model.

    Args:
        model: The model to train, on its device.
        criterion: (output, target) -> scalar; ``None`` builds timm's from ``criterion_kwargs``.
        blocks: Whose outputs to perturb, see :func:`~timm_alfa.resolve_blocks`.
        criterion_kwargs: For ``timm.loss.create_classification_loss``, where ``criterion`` is ``None``.
        alpha, steps, eps, norm, init, grad, bn, learnable, eta_set: See :class:`~timm_alfa.AlfaWrapper`.
        lam, gamma, reduction: See :class:`~timm_alfa.AlfaLoss`.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log what the task does.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Callable[[Any, Any], Tensor] | None = None,
            blocks: str | Sequence[str] = "@last",
            *,
            criterion_kwargs: dict[str, Any] | None = None,
            alpha: float = 0.5 / 255,
            steps: int = 1,
            eps: float | None = None,
            norm: Norm = "linf",
            init: Init = "zero",
            grad: Gradient = "full",
            bn: BatchNormMode = "clean",
            lam: float = 1.0,
            gamma: float = 0.0,
            reduction: Reduction = "sum",
            learnable: bool = False,
            eta_set: EtaSet = "hyperplane",
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
    ):
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        alfa = AlfaWrapper(
            model, self.criterion, blocks, alpha=alpha, steps=steps, eps=eps, norm=norm, init=init, grad=grad, bn=bn,
            learnable=learnable, eta_set=eta_set,
        )
        # Not registered as a submodule: until DDP wraps the step, the trainable module is the bare model.
        self.__dict__["step"] = _AlfaStep(alfa, AlfaLoss(self.criterion, lam, gamma, reduction))
        self._averages = _Averages(alfa.blocks)

    @property
    def alfa(self) -> AlfaWrapper:
        """The wrapper around the model."""
        return self.__dict__["step"].module

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> AlfaTask:
        """Wrap the whole step in DDP: one DDP forward per step, whatever happens inside."""
        self.eval_model = self.alfa.module
        self.trainable_module = DistributedDataParallel(self.__dict__["step"], device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # as every timm task, not as nn.Module
            self,
            backend: str = "inductor",
            mode: str | None = None,
            **compile_kwargs: Any,
    ) -> nn.Module:
        """Compile the model's parts before, between and after the blocks; replays run between them."""
        self.alfa.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.alfa.module

    def forward(self, input: Any, target: Any) -> dict[str, Any]:
        """One step.

        Args:
            input: [B, C, H, W], or what the model takes.
            target: [B], [B, num_classes], or what the criterion takes.

        Returns:
            ``loss`` (to call ``backward`` on), ``output`` (clean), ``loss_clean``, ``loss_adv`` (mean over the blocks)
            and ``loss_adv_by_block`` (dict), the last three detached.
        """
        step = self.trainable_module if self.trainable_module is not self.alfa.module else self.__dict__["step"]
        result: dict[str, Any] = step(input, target)
        self._averages.add(result)
        return result

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """What a run should say at its start: the resolved blocks, their shapes and the share of FLOPs behind them."""
        alfa, loss = self.alfa, self.__dict__["step"].objective
        infos = [info for info in list_blocks(alfa.module, input_size, depth=None) if info.name in alfa.blocks]
        bound = "unbounded" if alfa.eps is None else f"eps {alfa.eps:.4g}"
        method = f"L-ALFA ({alfa.eta.eta_set}, gamma {loss.gamma:g})" if alfa.eta.learnable else "ALFA"
        head = (
            f"{method}: PGD-{alfa.steps}, alpha {alfa.alpha * 255:.4g}/255, {alfa.norm}, {bound}, "
            f"lambda {loss.lam:g}, {loss.reduction}, gradients {alfa.grad}, batch norm {alfa.bn}"
        )
        return [head, *format_blocks(infos).splitlines()]

    def interval_text(self) -> str:
        """For a log line: the last step's clean and adversarial loss, and in brackets their averages so far."""
        return self._averages.text()

    def epoch_metrics(self) -> dict[str, float]:
        """Averages since the last call, over all ranks (every rank has to call), for the epoch's summary."""
        return self._averages.take(self.device)


class _AlfaStep(nn.Module):
    """Everything that has to happen inside one DDP forward. ``module`` leads timm's ``unwrap_model`` to the model."""

    def __init__(self, alfa: AlfaWrapper, objective: AlfaLoss):
        super().__init__()
        self.module = alfa
        self.__dict__["objective"] = objective  # a criterion's parameters are not DDP's business

    def forward(self, input: Any, target: Any) -> dict[str, Any]:
        output = self.module(input, target)
        parts = self.__dict__["objective"](output, target)
        adversarial = list(parts.adversarial.values())
        return {
            "loss": parts.loss,
            "output": output.output,
            "loss_clean": parts.clean,
            "loss_adv": torch.stack(adversarial).mean() if adversarial else parts.clean,
            "loss_adv_by_block": parts.adversarial,
        }


class _Averages:
    """Running means of what a step reports, kept on the device so that no step waits for them."""

    def __init__(self, blocks: Sequence[str]):
        self.names = ["loss_clean", "loss_adv", *(f"loss_adv_{name}" for name in blocks if len(blocks) > 1)]
        self.total: Tensor | None = None
        self.last: Tensor | None = None
        self.steps = 0

    def add(self, result: Mapping[str, Any]) -> None:
        by_block = list(result["loss_adv_by_block"].values()) if len(self.names) > 2 else []
        self.last = torch.stack([result["loss_clean"], result["loss_adv"], *by_block]).float()
        self.total = self.last if self.total is None else self.total + self.last
        self.steps += 1

    def text(self) -> str:
        if self.last is None or self.total is None:
            return ""
        last, mean = self.last[:2].tolist(), (self.total[:2] / self.steps).tolist()
        return f"Clean: {last[0]:#.3g} ({mean[0]:#.3g})  Adv: {last[1]:#.3g} ({mean[1]:#.3g})"

    def take(self, device: torch.device) -> dict[str, float]:
        if self.total is None:
            return {}
        mean = self.total / self.steps
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean = mean / dist.get_world_size()
        self.total, self.last, self.steps = None, None, 0
        return dict(zip(self.names, mean.tolist(), strict=True))
