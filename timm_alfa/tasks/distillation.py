"""ALFA with a teacher: timm's distillation tasks, whose whole loss the attack raises and the perturbed student pays.

With t(x), what the teacher makes of the clean images, found once per step and without gradients, the criterion of Eq. 3
to 5 is l(T_i(f_i), (y, t(x))): timm's sum of the task's loss and the distance to the teacher.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.task.distillation import FeatureDistillationTrainableModule
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional

from ..blocks.resolve import resolve_blocks
from ..engine.compiler import stays_eager
from . import alfa, noise
from .alfa import AlfaTask
from .base import MethodTask
from .noise import NoiseTask

DistillationTask: TypeAlias = LogitDistillationTask | FeatureDistillationTask | TokenDistillationTask
DISTILLATION_TASKS = (LogitDistillationTask, FeatureDistillationTask, TokenDistillationTask)


class Distilled(NamedTuple):
    """What a student is compared with.

    Attributes:
        labels: What the criterion takes, [B] or [B, num_classes].
        teacher: Of the clean images: logits [B, num_classes], or for feature distillation pre-logits [B, D].
    """

    labels: Any
    teacher: Tensor


class DistillationLoss(nn.Module):
    """w_task * crit(output, y) + w_distill * d(output, t(x)), in timm's own terms.

    d is for logits T^2 KL(softmax(t / T) || softmax(output / T)), for features the mean squared error, and for a
    distillation token either of the first kind or the cross-entropy with the teacher's class. Targets that are not
    :class:`Distilled` get the criterion alone.

    Args:
        task: timm's, whose criterion, weights and temperature count.
    """

    def __init__(self, task: DistillationTask):
        super().__init__()
        self.criterion = task.criterion
        self.weights = (task.task_loss_weight, task.distill_loss_weight)
        self.temperature = getattr(task, "temperature", 1.0)
        self.split = not isinstance(task, LogitDistillationTask)  # whether the student returns logits and a second part
        self.distance: Callable[[Tensor, Tensor], Tensor] = self._of_logits
        if isinstance(task, FeatureDistillationTask):
            self.distance = functional.mse_loss
        elif isinstance(task, TokenDistillationTask) and task.distill_type == "hard":
            self.distance = self._of_classes

    def forward(self, output: Any, target: Any) -> Tensor:
        """A scalar.

        Args:
            output: Of the student: logits, or logits and what is compared with the teacher.
            target: :class:`Distilled`, or what the criterion takes.
        """
        if not isinstance(target, Distilled):
            return self.criterion(logits_of(output), target)
        of_labels, of_teacher = self.parts(output, target)
        return self.weights[0] * of_labels + self.weights[1] * of_teacher

    def parts(self, output: Any, target: Distilled) -> tuple[Tensor, Tensor]:
        """The criterion and the distance to the teacher, each a scalar without its weight.

        Args:
            output: Of the student.
            target: Labels and the teacher's output.
        """
        logits, compared = output if self.split else (output, output)
        return self.criterion(logits, target.labels), self.distance(compared, target.teacher)

    def _of_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = (functional.log_softmax(logits / self.temperature, dim=-1) for logits in (student, teacher))
        return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * (self.temperature**2)

    @staticmethod
    def _of_classes(student: Tensor, teacher: Tensor) -> Tensor:
        return functional.cross_entropy(student, teacher.argmax(dim=-1))


def logits_of(output: Any) -> Any:
    """The logits [B, num_classes] among what a student returns."""
    return output[0] if isinstance(output, (tuple, list)) else output


class _Distilling:
    """Makes a task train timm's student with timm's teacher.

    Args:
        distillation: timm's task, just created: not compiled, not distributed, without EMA. Its student is trained.
        blocks: Of the student, whose outputs to perturb, see :func:`~timm_alfa.resolve_blocks`.
        options: The other arguments of the task; device, dtype and ``verbose`` are those of ``distillation``.

    Raises:
        ValueError, TypeError: An argument is out of its range, or needs a target or an output of another kind.
        BlockError: A block does not resolve.
    """

    reported = ("loss_clean", "loss_adv", "loss_task", "loss_distill")
    models: Any
    criterion: DistillationLoss

    def __init__(self, distillation: DistillationTask, blocks: str | Sequence[str] = "@last", **options: Any):
        if not isinstance(distillation, DISTILLATION_TASKS):
            raise TypeError(
                f"distillation: expected a distillation task of timm's, found {type(distillation).__name__}"
            )
        if options.get("objective") == "kl" and not isinstance(distillation, LogitDistillationTask):
            raise ValueError(
                "objective: 'kl' compares logits alone, which distils features or tokens no more; use 'ce'"
            )
        if options.get("unlabeled"):
            raise ValueError("unlabeled: does not go with a teacher")
        trained = distillation.trainable_module
        student = _student(trained)
        prefix = "student." if student is not trained else ""
        if hasattr(student, "output_fmt"):
            trained.output_fmt = student.output_fmt  # where channels are, for moments
        names = [prefix + name for name in resolve_blocks(student, blocks)]
        task: Any = super()
        task.__init__(
            trained,
            DistillationLoss(distillation),
            names,
            device=distillation.device,
            dtype=distillation.dtype,
            verbose=distillation.verbose,
            **options,
        )
        self.distillation = distillation

    def targets(self, input: Any, target: Any) -> Distilled:
        """What a step compares the student with: the labels, and the teacher's output, without gradients.

        Args:
            input: [B, C, H, W], normalised for the student.
            target: What the criterion takes.
        """
        task: Any = self.distillation
        with torch.no_grad():
            images = task.teacher.normalize_input(input, task.student_mean, task.student_std)
            features = isinstance(task, FeatureDistillationTask)
            return Distilled(target, task.teacher(images.detach(), return_features=features))

    def forward(self, input: Any, target: Any) -> dict[str, Any]:
        """One step; in evaluation mode and without gradients, the criterion alone.

        Args:
            input: [B, C, H, W], normalised for the student.
            target: [B], [B, num_classes], or what the criterion takes.

        Returns:
            As the task's; ``output`` holds the logits, ``loss_task`` and ``loss_distill`` are the two parts of
            ``loss_clean`` without their weights.
        """
        task: Any = super()
        if self.models.bare.training and torch.is_grad_enabled():
            target = self.targets(input, target)
        result: dict[str, Any] = task.forward(input, target)
        return {**result, "output": logits_of(result["output"])}

    @stays_eager
    def compute(self, input: Any, target: Any) -> dict[str, Any]:
        """The task's step, and the parts of the clean loss."""
        result: dict[str, Any] = super().compute(input, target)  # type: ignore[misc]
        with torch.no_grad():
            of_labels, of_teacher = self.criterion.parts(result["output"], target)
        return {**result, "loss_task": of_labels, "loss_distill": of_teacher}

    def plain_loss(self, input: Any, target: Any) -> Tensor:
        """The loss of timm's own task, with its teacher.

        Args:
            input: [B, C, H, W], normalised for the student.
            target: What the criterion takes.
        """
        loss: Tensor = self.distillation(input, target)["loss"]
        return loss

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> MethodTask:
        """Wrap the step in DDP; the teacher stays outside.

        Args:
            device_ids: As for DDP.
            ddp_kwargs: Its other arguments.
        """
        self.distillation.teacher.requires_grad_(False)
        task: Any = super()
        prepared: MethodTask = task.prepare_distributed(device_ids=device_ids, **ddp_kwargs)
        return prepared

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compile the student's parts, and what of the teacher is called.

        Args:
            backend: As for ``torch.compile``.
            mode: As for ``torch.compile``.
            compile_kwargs: Its other arguments.

        Returns:
            The student.

        Raises:
            ValueError: The mode makes CUDA graphs, see :meth:`AlfaWrapper.compile`.
        """
        task: Any = super()
        task.compile(backend=backend, mode=mode, **compile_kwargs)
        features = isinstance(self.distillation, FeatureDistillationTask)
        self.distillation.teacher.compile(
            backend=backend, mode=mode, compile_model=not features, compile_features=features, **compile_kwargs
        )
        return _student(self.models.bare)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The student, without the projection of feature distillation.

        Args:
            module: What to take it from; None takes what is trained.
            ema: Whether its average is asked for.
        """
        task: Any = super()
        found: nn.Module | None = task.get_eval_model(module=module, ema=ema)
        return None if found is None else _student(found)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The student's parameters and the projection's.

        Args:
            exclude_head: Leave out the last two of the student.
        """
        student = list(_student(self.models.bare).parameters())
        projection = _projection(self.models.bare)
        return [*(student[:-2] if exclude_head else student), *(projection.parameters() if projection else ())]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The task's, and the projection of feature distillation as timm has it.

        Args:
            module: Whose projection; None takes that of what is trained.
            ema: Whether of the average of the weights.
        """
        task: Any = super()
        state: dict[str, Any] = task.get_task_state(module=module, ema=ema)
        projection = _projection(module if module is not None else task.get_trainable_module(ema=ema))
        return state if projection is None else {**state, "projection": projection.state_dict()}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Continue from :meth:`get_task_state`, or from that of timm's own task.

        Args:
            state: What that returned; None or empty changes nothing.
            strict: Whether a projection has to fit.
            module: Which has the projection; None takes what is trained.
            ema: Whether it is for the average of the weights.

        Raises:
            UsageError: It is of another model, or of other blocks. RuntimeError: The projection is of another width.
        """
        task: Any = super()
        projection = _projection(module if module is not None else task.get_trainable_module(ema=ema))
        if state and projection is not None and "projection" in state:
            projection.load_state_dict(state["projection"], strict=strict)
        task.load_task_state(state, strict=strict, module=module, ema=ema)

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """The task's, and the teacher.

        Args:
            input_size: Shape of one image, [C, H, W]; None takes the student's own.
        """
        of_labels, of_teacher = self.criterion.weights
        line = (
            f"Teacher: {type(unwrap_model(self.distillation.teacher.model)).__name__}, "
            f"{type(self.distillation).__name__}, weights {of_labels:g} (labels) and {of_teacher:g} (teacher)"
        )
        task: Any = super()
        return [line, *task.summary_lines(input_size)]


class AlfaDistillationTask(_Distilling, AlfaTask):  # type: ignore[misc]  # as MoexAlfaTask
    """ALFA and L-ALFA for a student that timm distils: Eq. 3 and 5 with timm's whole loss as the criterion.

    The attack raises, and the adversarial terms are, w_task * crit + w_distill * distance at the perturbed output; the
    teacher's output is that of the clean images, found once per step. ``options`` are those of
    :class:`~timm_alfa.AlfaTask`; with ``lam=0`` this is timm's task bit for bit.

    Example::

        distillation = timm.task.LogitDistillationTask(student, teacher, criterion, temperature=4.0)
        task = AlfaDistillationTask(distillation, "layer4", alpha="2%")

    Args:
        distillation: timm's task for logits, features or a distillation token, just created: not compiled, not
            distributed, without EMA.
        blocks: Of the student, whose outputs to perturb, see :func:`~timm_alfa.resolve_blocks`.
        options: The other arguments of :class:`~timm_alfa.AlfaTask`; device, dtype and ``verbose`` are those of
            ``distillation``.

    Raises:
        ValueError, TypeError: An argument is out of its range, or asks for what a teacher does not go with
            (``unlabeled``; ``objective="kl"`` unless logits are distilled). BlockError: A block does not resolve.
    """


class NoiseDistillationTask(_Distilling, NoiseTask):  # type: ignore[misc]  # as above
    """Random noise on a distilled student's features; ``options`` are those of :class:`~timm_alfa.peers.NoiseTask`.

    Args:
        distillation: As for :class:`AlfaDistillationTask`.
        blocks: Of the student, whose outputs get noise.
        options: The other arguments of :class:`~timm_alfa.peers.NoiseTask`.
    """


METHODS: Mapping[str, tuple[Callable[..., MethodTask], Callable[..., MethodTask]]] = {
    "alfa": (alfa.build, AlfaDistillationTask),
    "noise": (noise.build, NoiseDistillationTask),
}


def build(
    args: argparse.Namespace, distillation: DistillationTask, *, input_size: tuple[int, int, int] | None
) -> MethodTask:
    """The task that checked arguments ask for, ``--method alfa`` or ``noise``, around timm's.

    Raises:
        UsageError: A block does not resolve or cannot be perturbed.
    """
    of_method, task_type = METHODS[args.method]
    create = partial(_create, task_type, distillation)
    return of_method(args, _student(distillation.trainable_module), None, input_size=input_size, task_type=create)


def _create(
    task_type: Callable[..., MethodTask],
    distillation: DistillationTask,
    student: nn.Module,
    criterion: None,
    **given: Any,
) -> MethodTask:
    del student, criterion  # which are the distillation task's
    return task_type(distillation, **given)


def _student(module: nn.Module) -> nn.Module:
    """The student inside of what is trained; of feature distillation that is one of two parts."""
    found = unwrap_model(module)
    return found.student if isinstance(found, FeatureDistillationTrainableModule) else module


def _projection(module: nn.Module | None) -> nn.Module | None:
    found = None if module is None else unwrap_model(module)
    return found.projection if isinstance(found, FeatureDistillationTrainableModule) else None
