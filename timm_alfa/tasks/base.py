"""What all methods have in common: one DDP forward per step, a step count, their state, and averages for the logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationEvaluator, ClassificationTask, MultiLabelClassificationEvaluator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..engine.batchnorm import Statistics
from ..engine.compiler import allow_second_walks
from ..engine.cuda_graph import GraphedStep
from ..engine.inventory import Inventory
from ..engine.random_sources import Source, random_sources
from ..engine.randomness import RandomState, random_devices, step_generator
from ..errors import UsageError
from ..loss import scalar_loss
from .monitor import LossMonitor


class MethodTask(ClassificationTask):
    """A classification task with a training step of its own; subclasses say which in :meth:`compute`.

    Whatever timm's ``train.py`` asks of a task holds: the trainable module, the evaluation model, EMA and checkpoints
    are those of the plain model.

    Args:
        model: The model to train, on its device.
        criterion: (output, target) -> scalar; ``None`` builds timm's from ``criterion_kwargs``.
        criterion_kwargs: For ``timm.loss.create_classification_loss``, where ``criterion`` is ``None``.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log what the task does.
    """

    reported: tuple[str, ...] = ("loss_clean", "loss_adv")  # what the logs show of a step's result
    second_derivatives = False  # whether an optimizer may differentiate the loss twice
    monitor: LossMonitor

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        *,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(model, criterion, criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.models = _Models(model, model)
        self.threshold = 0.5  # of a label's probability, see set_multilabel
        self.monitor = LossMonitor(self.reported, self.device)
        self.graphed: GraphedStep | None = None

    def use_cuda_graph(self) -> None:
        """Launch each step as one CUDA graph, see :mod:`timm_alfa.engine.cuda_graph`.

        Raises:
            ValueError: The task is on no CUDA device, or its steps cannot be captured.
        """
        if self.device.type != "cuda":
            raise ValueError(f"cuda_graph: needs a CUDA device, found {self.device}")
        self.second_derivatives = False
        self.graphed = GraphedStep(self)  # type: ignore[arg-type]  # tasks that can be captured call this

    def set_multilabel(self, threshold: float = 0.5) -> None:
        """Expect targets of independent labels from now on, [B, num_classes] in floating point, as timm's own task.

        The criterion has to be one for such targets, for instance ``timm.loss.BinaryCrossEntropy``.

        Args:
            threshold: Probability from which on the F1 scores of the evaluator count a label, between 0 and 1.

        Raises:
            ValueError: The threshold is out of its range.
        """
        if not 0 < threshold < 1:
            raise ValueError(f"threshold: expected a probability between 0 and 1, found {threshold}")
        self.multi_label = True
        self.threshold = threshold

    def create_evaluator(self, **kwargs: Any) -> ClassificationEvaluator:
        """timm's evaluator: accuracy, or of independent labels mAP and F1.

        Args:
            kwargs: Of the evaluator, such as ``max_samples``.
        """
        if self.multi_label:
            return MultiLabelClassificationEvaluator(device=self.device, threshold=self.threshold, **kwargs)
        return ClassificationEvaluator(device=self.device, **kwargs)

    def targets(self, input: Any, target: Any) -> Any:
        """What a training step hands to the criterion.

        Args:
            input: [B, C, H, W], or what the model takes.
            target: Of the training data.
        """
        return target

    def plain_loss(self, input: Any, target: Any) -> Tensor:
        """The loss of a plain step, to compare the method's cost with.

        Args:
            input: [B, C, H, W], or what the model takes.
            target: What the criterion takes.
        """
        return scalar_loss(self.criterion, self.models.called(input), target)

    def compute(self, input: Any, target: Any) -> dict[str, Any]:
        """One training step.

        Args:
            input: [B, C, H, W], or what the model takes.
            target: [B], [B, num_classes], or what the criterion takes.

        Returns:
            ``loss`` to call ``backward`` on, ``output``, and whatever :attr:`reported` names, detached.
        """
        raise NotImplementedError

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """After a training step, outside of DDP: note what the logs show.

        Args:
            result: What :meth:`compute` returned.

        Returns:
            What the caller of the task gets.
        """
        self.monitor.add(result)
        return result

    def forward(self, input: Any, target: Any) -> dict[str, Any]:
        """One step; in evaluation mode and without gradients, the plain loss.

        Raises:
            ValueError: After :meth:`set_multilabel`, targets that are no labels [B, num_classes] in floating point.
        """
        if self.multi_label and isinstance(target, Tensor) and not (target.dim() == 2 and target.is_floating_point()):
            raise ValueError(
                "target: expected labels [B, num_classes] in floating point, found shape "
                f"{list(target.shape)}, {target.dtype}"
            )
        if not (self.models.bare.training and torch.is_grad_enabled()):
            output = self.models.called(input)
            loss = scalar_loss(self.criterion, output, target)
            return {"loss": loss, "output": output, **{name: loss.detach().clone() for name in self.reported}}
        distributed = isinstance(self.trainable_module, DistributedDataParallel)
        step = self.trainable_module if distributed else self.graphed or self.compute
        assert step is not None
        result: dict[str, Any] = step(input, target)
        return self.finish(result)

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> MethodTask:
        """Wrap the whole step in DDP: one DDP forward per step, however often the model runs inside."""
        self.eval_model = self.models.called
        step = _DistributedStep(self.models.called, self.criterion, self.graphed or self.compute)
        self.trainable_module = DistributedDataParallel(step, device_ids=device_ids, **ddp_kwargs)
        return self

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The model's parameters, on one rank and on several (where DDP also holds those of a criterion).

        Args:
            exclude_head: Leave out the last two.
        """
        parameters = list(self.models.bare.parameters())
        return parameters[:-2] if exclude_head else parameters

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What a checkpoint needs besides the weights.

        Args:
            module: Without effect; timm passes the module whose weights it saves.
            ema: Whether that is the average of the weights, which needs nothing more: an empty dict.
        """
        return {} if ema else self.method_state()

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
            UsageError: It is of another model, or of other blocks.
        """
        if ema or not state:
            return
        try:
            self.load_method_state(state)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def method_state(self) -> dict[str, Any]:
        """The method's part of a checkpoint."""
        return {}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`method_state`.

        Args:
            state: What that returned.

        Raises:
            ValueError: It does not fit.
        """

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """What a run should say at its start.

        Args:
            input_size: Shape of one image, [C, H, W]; None takes the model's own.
        """
        return []

    def interval_text(self) -> str:
        """For a log line: the last step's losses, in brackets their averages so far."""
        return self.monitor.text()

    def epoch_metrics(self) -> dict[str, float]:
        """Averages since the last call, over all ranks (every rank has to call), for the epoch's summary."""
        return self.monitor.take()

    def write_history(self, folder: Path | None) -> None:
        """Write what was recorded step by step into ``folder``; ranks without a folder drop it."""


class PixelTask(MethodTask):
    """A task whose step runs the whole model several times, on images."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.passes = 0  # training steps made: what a step draws follows from it
        self.inventory = Inventory(self.models.bare)
        self.statistics = Statistics(self.models.bare, self.inventory)
        self._sources: tuple[Source, ...] | None = None

    def compile(  # type: ignore[override]  # as every timm task, not as nn.Module
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the model, as timm's classification task does, such that an attack may walk its graph twice.

        Args:
            backend: As for ``torch.compile``.
            mode: As for ``torch.compile``.
            compile_kwargs: Its other arguments.

        Returns:
            The compiled model.
        """
        allow_second_walks()
        self.models.called = super().compile(backend=backend, mode=mode, **compile_kwargs)
        return self.models.called

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Count the step."""
        self.passes += 1
        return super().finish(result)

    def method_state(self) -> dict[str, Any]:
        """The step count."""
        return {**super().method_state(), "passes": self.passes}

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`method_state`."""
        super().load_method_state(state)
        self.passes = int(state.get("passes", 0))

    def random_state(self, input: Tensor) -> RandomState:
        """The random state now, of the CPU, and of the accelerators and other sources that the model may draw from."""
        self.inventory.refresh()
        if self._sources is None:
            self._sources = random_sources(self.models.bare)
        return RandomState(random_devices(self.inventory, (input,)), self._sources)

    def generator(self, device: torch.device) -> torch.Generator:
        """For what this step draws besides the model's own draws."""
        return step_generator(self.passes + 1, device)


@dataclass(eq=False)
class _Models:
    """The model as it was given and as it is called (compiled, for one): no submodules of the task.

    Until DDP wraps the step, the trainable module is the bare model, and only it is registered.
    """

    bare: nn.Module
    called: nn.Module


class _DistributedStep(nn.Module):
    """Everything that has to happen inside one DDP forward. ``module`` leads timm's ``unwrap_model`` to the model.

    DDP also averages the gradients of a criterion that is a module.
    """

    def __init__(self, model: nn.Module, criterion: Any, compute: Callable[[Any, Any], dict[str, Any]]):
        super().__init__()
        self.module = model
        self.criterion = criterion
        self.compute = compute

    def forward(self, input: Any, target: Any) -> dict[str, Any]:
        return self.compute(input, target)


@contextmanager
def from_same_start(start: RandomState) -> Iterator[None]:
    """A pass that draws what the pass before drew (dropout masks), and leaves the random state as that one did."""
    end = start.again()
    start.restore()
    with end.left_as_is():
        yield
