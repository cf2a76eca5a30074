"""AlfaTask: ALFA and L-ALFA as a ``timm.task``, the only bridge to timm's training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..blocks.resolve import format_blocks, list_blocks
from ..engine.batchnorm import BatchNormMode
from ..engine.compiler import stays_eager
from ..engine.tail_by_tail import Sweep
from ..errors import UsageError
from ..eta import EtaSet
from ..eta_step import EtaStepper
from ..loss import AlfaLoss, Reduction, scalar_loss
from ..pgd import Init, Norm, l2_norms, linf_norms
from ..sizes import Relative, describe_size
from ..wrapper import AlfaWrapper, Gradient
from .monitor import Monitor

_logger = logging.getLogger(__name__)


class AlfaTask(ClassificationTask):
    """A classification task whose loss is ALFA's objective (Eq. 3), or L-ALFA's (Eq. 5, Algorithm 1).

    Everything that timm's ``train.py`` asks of a task holds: the trainable module, the evaluation model, EMA and
    checkpoints are those of the plain model, and eta is in ``task_state``. The gradients are those of
    ``AlfaLoss(criterion)(AlfaWrapper(model, ...)(input, target), target)``, but each tail is walked once and freed at
    once, see :mod:`timm_alfa.engine.tail_by_tail`.

    Args:
        model: The model to train, on its device.
        criterion: (output, target) -> scalar; ``None`` builds timm's from ``criterion_kwargs``.
        blocks: Whose outputs to perturb, see :func:`~timm_alfa.resolve_blocks`.
        criterion_kwargs: For ``timm.loss.create_classification_loss``, where ``criterion`` is ``None``.
        alpha, steps, eps, norm, init, grad, bn, learnable, eta_set: See :class:`~timm_alfa.AlfaWrapper`.
        lam, gamma, reduction: See :class:`~timm_alfa.AlfaLoss`.
        eta_lr: Learning rate of eta's own SGD (momentum 0.9, constant rate, no weight decay), above 0.
        sample_blocks: Perturb this many of the r blocks per step, drawn anew each time, alike on all ranks, and
            weighted r / N so that the objective's mean stays the same; ``None`` perturbs all.
        seed: Of the draws of ``sample_blocks``.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log what the task does.

    Raises:
        ValueError, TypeError: An argument is out of its range. BlockError: A block does not resolve.
    """

    wrapper_type = AlfaWrapper  # what finds the perturbations

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        blocks: str | Sequence[str] = "@last",
        *,
        criterion_kwargs: dict[str, Any] | None = None,
        alpha: float | str | Relative = 0.5 / 255,
        steps: int = 1,
        eps: float | str | Relative | None = None,
        norm: Norm = "linf",
        init: Init = "zero",
        grad: Gradient = "full",
        bn: BatchNormMode = "clean",
        lam: float = 1.0,
        gamma: float = 0.0,
        reduction: Reduction = "sum",
        learnable: bool = False,
        eta_set: EtaSet = "hyperplane",
        eta_lr: float = 0.01,
        sample_blocks: int | None = None,
        seed: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        alfa = self.wrapper_type(
            model,
            self.criterion,
            blocks,
            alpha=alpha,
            steps=steps,
            eps=eps,
            norm=norm,
            init=init,
            grad=grad,
            bn=bn,
            learnable=learnable,
            eta_set=eta_set,
            eta_lr=eta_lr,
        )
        if sample_blocks is not None and not 1 <= sample_blocks <= len(alfa.blocks):
            raise ValueError(
                f"sample_blocks: expected 1 to {len(alfa.blocks)}, the number of blocks, found {sample_blocks}"
            )
        asked = [blocks] if isinstance(blocks, str) else list(blocks)
        if verbose and asked != alfa.blocks:
            _logger.info(f"blocks {' '.join(asked)}: {', '.join(alfa.blocks)}")
        self.objective = AlfaLoss(self.criterion, lam, gamma, reduction)
        self.monitor = Monitor(alfa)
        # Not registered as a submodule: until DDP wraps the step, the trainable module is the bare model.
        self.__dict__["step"] = _AlfaStep(alfa, self.objective, self.monitor, sample_blocks, seed)
        self._others_noted = False
        self._stepper: EtaStepper | None = None
        if learnable:
            self._stepper = EtaStepper(alfa.eta, model.parameters())
            self._stepper.listen()

    @property
    def alfa(self) -> AlfaWrapper:
        """The wrapper around the model."""
        alfa: AlfaWrapper = self.__dict__["step"].module
        return alfa

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> AlfaTask:
        """Wrap the whole step in DDP: one DDP forward per step, whatever happens inside."""
        self.eval_model = self.alfa.module
        self.trainable_module = DistributedDataParallel(self.__dict__["step"], device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]  # as every timm task, not as nn.Module
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the model's parts before, between and after the blocks; replays run between them.

        Args:
            backend: As for ``torch.compile``.
            mode: As for ``torch.compile``.
            compile_kwargs: Its other arguments.

        Returns:
            The model.

        Raises:
            ValueError: The mode makes CUDA graphs, see :meth:`AlfaWrapper.compile`.
        """
        self.alfa.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.alfa.module

    def forward(self, input: Any, target: Any) -> dict[str, Any]:
        """One step.

        Args:
            input: [B, C, H, W], or what the model takes.
            target: [B], [B, num_classes], or what the criterion takes.

        Returns:
            ``loss`` (to call ``backward`` on, once), ``output`` (clean), ``loss_clean``, ``loss_adv`` (mean over the
            blocks), ``loss_adv_by_block`` (dict), ``finite`` (dict: what has to be finite -> whether it is) and for
            L-ALFA ``eta`` [r], all but the first detached. Perturbations that are not finite are not added.
        """
        if self._stepper is not None:
            self._stepper.begin_batch()
        distributed = isinstance(self.trainable_module, DistributedDataParallel)
        result: dict[str, Any] = (self.trainable_module if distributed else self.__dict__["step"])(input, target)
        gradient, observed = result.pop("eta_gradient", None), result.pop("observed", {})
        self._note_others(result.pop("others", []))
        if self._stepper is not None and gradient is not None:
            self._stepper.add(gradient)
        if result["loss_adv_by_block"]:
            self.monitor.add(result, observed)
        return result

    def _note_others(self, others: list[Tensor]) -> None:
        """Say once what DDP will not average: it knows the parameters of the model and of a criterion that is a module.

        Args:
            others: Leaves outside of the model that a step found.
        """
        if self._others_noted or not others or not isinstance(self.trainable_module, DistributedDataParallel):
            return
        averaged = {id(parameter) for parameter in self.trainable_module.parameters()}
        shapes = [str(list(leaf.shape)) for leaf in others if id(leaf) not in averaged]
        if shapes:
            self._others_noted = True
            _logger.warning(
                f"the loss depends on {len(shapes)} tensors outside of the model and the criterion's modules (of shape "
                f"{', '.join(shapes[:5])}), whose gradients each rank keeps to itself; make the criterion a module "
                "that holds them, or average them yourself"
            )

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The model's parameters, on one rank and on several (where DDP also holds those of a criterion).

        Args:
            exclude_head: Leave out the last two.
        """
        parameters = list(self.alfa.module.parameters())
        return parameters[:-2] if exclude_head else parameters

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What a checkpoint needs besides the weights: the step count, eta with its momentum, auxiliary batch norms.

        Args:
            module: Without effect; timm passes the module whose weights it saves.
            ema: Whether that is the average of the weights, which needs nothing more: an empty dict.
        """
        if ema:
            return {}
        state: dict[str, Any] = {"passes": self.alfa.passes}
        if self.alfa.eta.learnable:
            state["eta"] = self.alfa.eta.state_dict()
        if self.alfa.aux is not None:
            state["aux"] = self.alfa.aux.state_dict()
        return state

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Continue from :meth:`get_task_state`; a checkpoint of plain training has none and starts afresh.

        Args:
            state: What that returned; None or empty changes nothing.
            strict: Without effect, what is there is checked in any case.
            module: Without effect.
            ema: Whether it is for the average of the weights, which has no state of its own.

        Raises:
            UsageError: eta was learned for another list of blocks, or auxiliary batch norms are of another model.
        """
        if ema or not state:
            return
        self.alfa.passes = int(state.get("passes", 0))
        try:
            if self.alfa.eta.learnable and "eta" in state:
                self.alfa.eta.load_state_dict(state["eta"])
            if self.alfa.aux is not None and "aux" in state:
                self.alfa.aux.load_state_dict(state["aux"])
        except ValueError as error:
            raise UsageError(str(error)) from None

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """What a run should say at its start: the resolved blocks, their shapes and the share of FLOPs behind them.

        Args:
            input_size: Shape of one image, [C, H, W]; None takes the model's own.
        """
        alfa, loss = self.alfa, self.objective
        infos = [info for info in list_blocks(alfa.module, input_size, depth=None) if info.name in alfa.blocks]
        bound = "unbounded"
        if alfa.eps is not None:
            bound = f"eps {alfa.eps}" if isinstance(alfa.eps, Relative) else f"eps {alfa.eps:.4g}"
        method = f"L-ALFA ({alfa.eta.eta_set}, gamma {loss.gamma:g})" if alfa.eta.learnable else "ALFA"
        head = (
            f"{method}: PGD-{alfa.steps}, alpha {describe_size(alfa.alpha)}, {alfa.norm}, {bound}, "
            f"lambda {loss.lam:g}, {loss.reduction}, gradients {alfa.grad}, batch norm {alfa.bn}"
        )
        return [head, *format_blocks(infos).splitlines()]

    def interval_text(self) -> str:
        """For a log line: the last step's losses, in brackets their averages so far, and eta if it is learned."""
        return self.monitor.text()

    def epoch_metrics(self) -> dict[str, float]:
        """Averages since the last call, over all ranks (every rank has to call), for the epoch's summary."""
        return self.monitor.take()

    def write_history(self, folder: Path | None) -> None:
        """Append eta of every step since the last call to ``eta.csv`` in ``folder``; ranks without a folder drop it."""
        self.monitor.history.write(folder)


class _AlfaStep(nn.Module):
    """Everything that has to happen inside one DDP forward. ``module`` leads timm's ``unwrap_model`` to the model."""

    def __init__(self, alfa: AlfaWrapper, objective: AlfaLoss, monitor: Monitor, sample_blocks: int | None, seed: int):
        super().__init__()
        self.module = alfa
        self.monitor = monitor
        self.sample_blocks = sample_blocks
        self.seed = seed
        # What holds the criterion once more is not registered: `alfa` holds it, and DDP averages its parameters there.
        self.__dict__["objective"] = objective
        self.__dict__["sweep"] = Sweep(alfa, objective.criterion, objective.gamma)

    def forward(self, input: Any, target: Any) -> dict[str, Any]:
        alfa: AlfaWrapper = self.module
        if not (alfa.module.training and torch.is_grad_enabled()):
            output = alfa(input)
            clean = scalar_loss(self.__dict__["objective"].criterion, output, target)
            return {
                "loss": clean,
                "output": output,
                "loss_clean": clean.detach().clone(),
                "loss_adv": clean.detach().clone(),
                "loss_adv_by_block": {},
                "finite": {},
            }
        return self._train(input, target)

    @stays_eager
    def _train(self, input: Any, target: Any) -> dict[str, Any]:
        alfa: AlfaWrapper = self.module
        of_clean, weights = self._weights()
        observe = _norms if self.monitor.norms_due else None
        swept = self.__dict__["sweep"](input, target, of_clean, weights, observe)
        result = {
            "loss": swept.loss,
            "output": swept.output,
            "loss_clean": swept.clean,
            "loss_adv": torch.stack(list(swept.adversarial.values())).mean(),
            "loss_adv_by_block": swept.adversarial,
            "finite": swept.finite,
            "observed": swept.observed,
            "others": swept.others,
        }
        if alfa.eta.learnable:
            result |= {"eta": alfa.eta.values.detach().clone(), "eta_gradient": swept.eta_gradient}
        return result

    def _weights(self) -> tuple[float, dict[str, float]]:
        """Factors of the clean loss and of the adversarial losses of this step's blocks."""
        alfa: AlfaWrapper = self.module
        blocks = alfa.blocks
        of_clean, of_adversarial = self.__dict__["objective"].weights(len(blocks))
        if self.sample_blocks is None:
            return of_clean, dict.fromkeys(blocks, of_adversarial)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + alfa.passes) % 2**63)
        drawn = torch.randperm(len(blocks), generator=generator)[: self.sample_blocks].sort().values.tolist()
        return of_clean, {blocks[i]: of_adversarial * len(blocks) / self.sample_blocks for i in drawn}


def _norms(delta: Sequence[Tensor], feature: Sequence[Tensor]) -> Tensor:
    """[3]: mean over the batch of ||delta||_2 and ||delta||_inf, and rms(delta) / rms(f)."""
    l2 = l2_norms(delta)
    total = torch.stack([part.detach().float().square().sum() for part in feature]).sum()
    ratio = l2.square().sum().sqrt() / total.sqrt()
    return torch.stack([l2.mean(), linf_norms(delta).mean(), ratio.to(l2)]).float()
