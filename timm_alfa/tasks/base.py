"""What the peers have in common: one DDP forward per step, a step count, and averages of their losses for the logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..engine.batchnorm import Statistics
from ..engine.compiler import allow_second_walks
from ..engine.random_sources import Source, random_sources
from ..engine.randomness import RandomState
from ..engine.replay import random_devices
from ..loss import scalar_loss
from ..utils.distributed import mean_over_ranks


class PeerTask(ClassificationTask):
    """A classification task whose step runs the model several times; subclasses say how in :meth:`compute`.

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

    reported: tuple[str, ...] = ("loss_clean", "loss_adv")

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
        self.passes = 0  # training steps made: what a step draws by itself follows from it
        self.statistics = Statistics(model)
        self._sources: tuple[Source, ...] | None = None
        # Not registered as submodules: until DDP wraps the step, the trainable module is the bare model.
        self.__dict__["model"] = model
        self.__dict__["step"] = _Step(model, self.compute)
        self._sum: Tensor | None = None
        self._last: Tensor | None = None
        self._count = 0

    def compute(self, model: nn.Module, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            model: To call: the model itself, or compiled.
            input: [B, C, H, W].
            target: [B] or [B, num_classes].

        Returns:
            ``loss`` with its graph, and detached ``output`` and whatever losses :attr:`reported` names.
        """
        raise NotImplementedError

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> PeerTask:
        """Wrap the whole step in DDP: one DDP forward per step, however often the model runs inside."""
        self.eval_model = self.__dict__["step"].module
        self.trainable_module = DistributedDataParallel(self.__dict__["step"], device_ids=device_ids, **ddp_kwargs)
        return self

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
        compiled = super().compile(backend=backend, mode=mode, **compile_kwargs)
        self.__dict__["step"].module = compiled
        return compiled

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One step; in evaluation mode and without gradients, the plain loss."""
        if not (self.__dict__["model"].training and torch.is_grad_enabled()):
            output = self.__dict__["step"].module(input)
            loss = scalar_loss(self.criterion, output, target)
            return {"loss": loss, "output": output, **{name: loss.detach().clone() for name in self.reported}}
        distributed = isinstance(self.trainable_module, DistributedDataParallel)
        result: dict[str, Tensor] = (self.trainable_module if distributed else self.__dict__["step"])(input, target)
        self.passes += 1
        self._last = torch.stack([result[name] for name in self.reported]).float()
        self._sum = self._last if self._sum is None else self._sum + self._last
        self._count += 1
        return result

    def random_state(self, input: Tensor) -> RandomState:
        """The random state now, of the CPU, and of the accelerators and other sources that the model may draw from."""
        if self._sources is None:
            self._sources = random_sources(self.__dict__["model"])
        return RandomState.capture(random_devices(self.__dict__["model"], (input,)), self._sources)

    def generator(self, device: torch.device) -> torch.Generator:
        """For what a step draws besides the model's own draws, anew in each step; the global state stays as it is."""
        generator = torch.Generator(device)
        generator.manual_seed((torch.initial_seed() + 1_000_003 * (self.passes + 1)) % 2**63)
        return generator

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """What a checkpoint needs besides the weights."""
        return {} if ema else {"passes": self.passes}

    def load_task_state(
        self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        """Continue from :meth:`get_task_state`; a checkpoint of plain training has none and starts afresh."""
        if not ema and state:
            self.passes = int(state.get("passes", 0))

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """What a run should say at its start.

        Args:
            input_size: Shape of one image, [C, H, W].
        """
        return []

    def interval_text(self) -> str:
        """For a log line: the last step's losses, in brackets their averages so far."""
        if self._last is None or self._sum is None:
            return ""
        last, mean = self._last.tolist(), (self._sum / self._count).tolist()
        titles = [name.removeprefix("loss_").capitalize() for name in self.reported]
        return "  ".join(f"{t}: {value:#.3g} ({m:#.3g})" for t, value, m in zip(titles, last, mean, strict=True))

    def epoch_metrics(self) -> dict[str, float]:
        """Averages of the losses since the last call, over all ranks (every rank has to call)."""
        nothing = torch.full((len(self.reported),), torch.nan, device=self.device)
        mean = mean_over_ranks(nothing if self._sum is None else self._sum / self._count)
        self._sum, self._last, self._count = None, None, 0
        return dict(zip(self.reported, mean.tolist(), strict=True))

    def write_history(self, folder: Path | None) -> None:
        """Nothing is recorded step by step."""


class _Step(nn.Module):
    """Everything that has to happen inside one DDP forward. ``module`` leads timm's ``unwrap_model`` to the model."""

    def __init__(self, model: nn.Module, compute: Callable[[nn.Module, Any, Any], dict[str, Tensor]]):
        super().__init__()
        self.module = model
        self.__dict__["compute"] = compute

    def forward(self, input: Any, target: Any) -> dict[str, Tensor]:
        result: dict[str, Tensor] = self.__dict__["compute"](self.module, input, target)
        return result


@contextmanager
def from_same_start(start: RandomState) -> Iterator[None]:
    """A pass that draws what the pass before drew (dropout masks), and leaves the random state as that one did."""
    end = start.again()
    start.restore()
    with end.left_as_is():
        yield
