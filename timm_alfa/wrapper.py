"""AlfaWrapper: a model whose training forward also returns adversarially perturbed outputs (sections 3.2 and 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import pgd
from .blocks.resolve import blank_input, resolve_blocks
from .engine.aux_batchnorm import AuxBatchNorms, norms_behind
from .engine.batchnorm import BATCH_NORM_MODES, BatchNormMode, Statistics
from .engine.compiler import is_compiled, stays_eager
from .engine.float16 import attack_gradients
from .engine.random_sources import random_sources
from .engine.randomness import RandomState
from .engine.replay import Feature, Recording, Replay, random_devices
from .engine.trace import evaluating
from .errors import BlockError
from .eta import ETA_SETS, Eta, EtaSet
from .eta_step import EtaStepper
from .loss import scalar_loss
from .pgd import INITS, NORMS, Init, Norm
from .sizes import Relative, Size, checked_size

Gradient = Literal["full", "tail"]
GRADIENTS: tuple[Gradient, ...] = ("full", "tail")


@dataclass
class AlfaOutput:
    """What ``alfa(input, target)`` returns.

    Args:
        output: The model's output for the clean input.
        adv_outputs: Block name -> the model's output with that block's feature perturbed; empty in evaluation mode.
        deltas: Block name -> delta before eta scales it, detached, in the structure of the block's output.
        eta: [r], one strength per block: ones, or the learned values of L-ALFA.
    """

    output: Any
    adv_outputs: dict[str, Any]
    deltas: dict[str, Any]
    eta: Tensor


class AlfaWrapper(nn.Module):
    """Adds ALFA to a model: ``alfa(input)`` is ``model(input)``, ``alfa(input, target)`` also perturbs features.

    The model itself is not changed; its ``state_dict`` is what to save. Wrap the ``AlfaWrapper`` in
    ``DistributedDataParallel`` rather than the model, and compile with :meth:`compile`.

    Example::

        alfa = AlfaWrapper(model, criterion, blocks=["layer4"])
        loss_fn = AlfaLoss(criterion)
        result = loss_fn(alfa(images, target), target)  # images [B, C, H, W], target [B]
        result.loss.backward()

    Args:
        model: Any timm model, any module. Whether it trains is its own ``training`` flag.
        criterion: (output, target) -> scalar, the loss that the perturbation raises.
        blocks: Whose outputs to perturb, see :func:`~timm_alfa.resolve_blocks`. Each gets its own tail pass.
        alpha: Step size of the attack (Eq. 4), above 0, in units of the feature, or as a share of it: with ``"2%"`` a
            step in ``linf`` is 0.02 rms(f) sgn(g) with the rms of each sample, in ``l2`` 0.02 ||f||_2 g / ||g||_2.
        steps: K, how many steps, at least 1.
        eps: Radius of the ball that delta stays in, at least 0, a number or a share as alpha, or ``None`` for no bound
            (the paper's choice).
        norm: ``"linf"`` steps along sgn(g), ``"l2"`` along g / ||g||_2 per sample; also the norm of the ball.
        init: delta starts at 0 (``"zero"``; the first step then takes its gradient from the clean pass), or uniform
            in [-eps, eps] (``"uniform"``).
        grad: ``"full"``: the adversarial terms also train what comes before the block (Eq. 3). ``"tail"``: the feature
            is detached, as in the released code; what reaches the loss around the block stays connected.
        bn: ``"clean"``: running statistics move with the clean pass only. ``"shared"``: with every pass. ``"aux"``:
            adversarial passes have affine parameters and statistics of their own, which the optimizer has to be built
            after; they are no part of the ``state_dict`` (see ``aux``), and the first step costs a tail replay too.
        learnable: L-ALFA: eta is learned (Eq. 5). Otherwise eta is 1.
        eta_set: P, the set onto which eta is projected: ``"hyperplane"`` or ``"simplex"``.
        eta_lr: Learning rate of eta's own SGD, above 0; see :meth:`follow`.

    Raises:
        ValueError: An argument is out of its range. TypeError: The criterion cannot be called.
        BlockError: A block does not resolve; in the first step, one that cannot be perturbed.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        blocks: str | Sequence[str],
        *,
        alpha: float | str | Relative = 0.5 / 255,
        steps: int = 1,
        eps: float | str | Relative | None = None,
        norm: Norm = "linf",
        init: Init = "zero",
        grad: Gradient = "full",
        bn: BatchNormMode = "clean",
        learnable: bool = False,
        eta_set: EtaSet = "hyperplane",
        eta_lr: float = 0.01,
    ):
        super().__init__()
        _check_model(model)
        if not callable(criterion):
            raise TypeError(f"criterion: expected something to call with (output, target), found {criterion!r}")
        alpha, eps = _check_attack(alpha, steps, eps, init)
        if not (math.isfinite(eta_lr) and eta_lr > 0):
            raise ValueError(f"eta_lr: expected a finite learning rate above 0, found {eta_lr}")
        for name, value, choices in (
            ("norm", norm, NORMS),
            ("init", init, INITS),
            ("grad", grad, GRADIENTS),
            ("bn", bn, BATCH_NORM_MODES),
            ("eta_set", eta_set, ETA_SETS),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {value!r}")
        modules = resolve_blocks(model, blocks)
        self.module = model
        self.criterion = criterion
        self.blocks = list(modules)
        self.alpha = alpha
        self.steps = steps
        self.eps = eps
        self.norm: Norm = norm
        self.init: Init = init
        self.grad: Gradient = grad
        self.bn: BatchNormMode = bn
        self.eta = Eta(self.blocks, learnable=learnable, eta_set=eta_set, lr=eta_lr)
        self.passes = 0  # how many training steps were made: random starts are drawn anew in each
        self.aux = AuxBatchNorms(model) if bn == "aux" else None
        self._aux_checked = False
        self._replay: Replay | None = Replay(model, modules)
        self._statistics = Statistics(model)

    def forward(self, input: Any, target: Any = None) -> Any:
        """The model's output, or with a target an :class:`AlfaOutput`.

        Args:
            input: What the model takes, [B, ...].
            target: What the criterion takes. In evaluation mode, and without gradients, nothing is perturbed.
        """
        if target is None:
            return self.module(input)
        if not (self.module.training and torch.is_grad_enabled()):
            return AlfaOutput(self.module(input), {}, {}, self.eta.values)
        return self._train(input, target)

    @stays_eager
    def _train(self, input: Any, target: Any) -> AlfaOutput:
        if all(parameter.grad is None for parameter in self.module.parameters()):
            self.eta.values.grad = None  # what a skipped step left goes with the weights' own gradients
        recording = self.record(input)
        with recording.end.left_as_is(), self.extra_walk():
            gradients = self.clean_gradients(recording, target)
        with self.adversarial_pass(recording):
            deltas = {name: self.find_delta(recording, name, target, gradients.get(name)) for name in self.blocks}
            adv_outputs = {name: self.adversarial_output(recording, name, deltas[name]) for name in self.blocks}
        shaped = {name: recording.features[name].rebuild(delta) for name, delta in deltas.items()}
        return AlfaOutput(recording.output, adv_outputs, shaped, self.eta.values)

    def follow(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None) -> None:
        """Learn eta in a loop of your own: it steps whenever ``optimizer``, which holds the weights, steps.

        Args:
            optimizer: The weights' optimizer, as it is or inside Lightning's or Accelerate's; its schedule, clipping
                and weight decay do not concern eta.
            scaler: The loss scaler, if there is one: eta's gradient is divided by its scale.
        """
        stepper = EtaStepper(self.eta, self.module.parameters())

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if self.eta.values.grad is not None:
                stepper.add(self.eta.values.grad / (scaler.get_scale() if scaler is not None else 1.0))
                self.eta.values.grad = None
                stepper.step(optimizer)

        # Accelerate's and Lightning's wrappers are no working torch optimizers; the one inside takes the steps.
        getattr(optimizer, "optimizer", optimizer).register_step_post_hook(after_step)

    def check_blocks(self, input_size: tuple[int, ...]) -> None:
        """Try the blocks out on two blank inputs, before training starts; nothing of the model moves.

        Args:
            input_size: Shape of one input, [C, H, W].

        Raises:
            BlockError: A block that runs several times per forward, not at all, or that cannot be perturbed.
        """
        trace_blocks = Replay(self.module, resolve_blocks(self.module, self.blocks))
        start = RandomState.capture(random_devices(self.module, ()), random_sources(self.module))
        with start.left_as_is(), evaluating(self.module), torch.enable_grad():
            recording = trace_blocks.record((blank_input(self.module, input_size, batch_size=2),))
            for name, feature in recording.features.items():
                trace_blocks.replay(recording, name, feature.rebuild(feature.tensors))
        if self.aux is not None:
            self.aux.keep_only(norms_behind(self.module, self.blocks, blank_input(self.module, input_size)))

    # The steps of a training forward, for those who arrange them differently.

    def record(self, input: Any, *, cut: Collection[str] = ()) -> Recording:
        """The clean pass.

        Args:
            input: What the model takes, [B, ...].
            cut: Blocks at which the graph is cut.
        """
        replay = self._active_replay()
        if self.aux is not None and not self._aux_checked:
            norms_behind(self.module, self.blocks, input)
            self._aux_checked = True
        with self._statistics.observed():
            recording = replay.record((input,), cut=cut)
        self.eta.to(next(iter(recording.features.values())).tensors[0].device)
        self.passes += 1
        return recording

    @contextmanager
    def adversarial_pass(self, recording: Recording) -> Iterator[None]:
        """Around attacks and adversarial outputs: keeps the random state, and the statistics if ``bn`` says so.

        Args:
            recording: Of the clean pass.
        """
        with recording.end.left_as_is():
            if self.aux is not None:
                with self.aux.active(), self._statistics.kept_outside_batch_norms():
                    yield
            else:
                with self._statistics.kept() if self.bn == "clean" else nullcontext():
                    yield

    @property
    def starts_from_clean(self) -> bool:
        """Whether the first step of an attack takes its gradient from the clean pass: delta = 0 must be that pass."""
        return self.init == "zero" and self.aux is None

    def extra_walk(self) -> AbstractContextManager[None]:
        """Around a walk of the clean graph that a plain step does not make."""
        return self._statistics.kept_in_recomputation() if self.bn != "shared" else nullcontext()

    def clean_gradients(self, recording: Recording, target: Any) -> dict[str, list[Tensor]]:
        """d crit(model(x), y) / d f_i for every block at once: the gradient of the first step, as delta starts at 0.

        Args:
            recording: Of the clean pass.
            target: What the criterion takes.

        Returns:
            By block, one gradient per floating-point tensor of its feature; empty unless :attr:`starts_from_clean`.

        Raises:
            BlockError: A block has no influence on the loss.
        """
        if not self.starts_from_clean:
            return {}
        tensors = [tensor for feature in recording.features.values() for tensor in feature.tensors]
        gradients = iter(self._gradient(recording.output, target, tensors, tensors, retain_graph=True))
        return {
            name: reaching(name, [next(gradients) for _ in feature.tensors], feature.tensors)
            for name, feature in recording.features.items()
        }

    def find_delta(
        self,
        recording: Recording,
        name: str,
        target: Any,
        first_gradient: Sequence[Tensor] | None = None,
        note: Callable[[Sequence[Tensor]], object] | None = None,
    ) -> list[Tensor]:
        """The perturbation of one block after K steps of Eq. 4; finite, whatever the gradients are.

        Args:
            recording: Of the clean pass.
            name: The block.
            target: What the criterion takes.
            first_gradient: The gradient at delta = 0, if it is known; else every step is a tail replay.
            note: Called with the gradient of every step.

        Returns:
            One tensor per floating-point tensor of the feature, detached, at least float32.
        """
        feature = recording.features[name]

        def gradient_at(delta: list[Tensor]) -> list[Tensor]:
            leaves = [part.detach().requires_grad_() for part in delta]
            value = feature.rebuild(_add(feature, [tensor.detach() for tensor in feature.tensors], leaves))
            output = self._active_replay().replay(recording, name, value, detach=True)
            found = reaching(name, self._gradient(output, target, leaves, feature.tensors), leaves)
            if note is not None:
                note(found)
            return found

        alpha = pgd.absolute(self.alpha, feature.tensors)
        eps = None if self.eps is None else pgd.absolute(self.eps, feature.tensors)
        if first_gradient is not None:
            if note is not None:
                note(first_gradient)
            delta = pgd.pgd_step(None, first_gradient, alpha=alpha, norm=self.norm, eps=eps)
        elif self.init == "uniform":
            assert eps is not None
            generator = torch.Generator(feature.tensors[0].device)
            generator.manual_seed((torch.initial_seed() + 1_000_003 * self.passes) % 2**63)
            delta = pgd.uniform(feature.tensors, eps, generator)
        else:
            delta = pgd.zeros(feature.tensors)
        steps = self.steps - (first_gradient is not None)
        with self._statistics.kept() if self.aux is not None else nullcontext():  # only what is trained on counts
            return pgd.pgd(gradient_at, delta, steps=steps, alpha=alpha, norm=self.norm, eps=eps)

    def adversarial_output(self, recording: Recording, name: str, delta: Sequence[Tensor]) -> Any:
        """T_i(f_i + eta_i * delta_i), connected to the weights, to eta, and in ``grad="full"`` to f_i.

        Args:
            recording: Of the clean pass.
            name: The block.
            delta: What :meth:`find_delta` returned.
        """
        feature = recording.features[name]
        tensors = feature.tensors if self.grad == "full" else [tensor.detach() for tensor in feature.tensors]
        return self.replay(recording, name, feature.rebuild(self.perturbed(name, feature, tensors, delta)))

    def perturbed(
        self, name: str, feature: Feature, tensors: Sequence[Tensor], delta: Sequence[Tensor]
    ) -> list[Tensor]:
        """f_i + eta_i * delta_i.

        Args:
            name: The block.
            feature: Its output.
            tensors: The floating-point tensors of it, each [B, ...], as they are or detached.
            delta: One tensor of the same shape for each.
        """
        if self.eta.learnable:
            strength = self.eta.values[self.blocks.index(name)]
            delta = [strength.to(part.dtype) * part for part in delta]
        return _add(feature, tensors, delta)

    def replay(self, recording: Recording, name: str, value: Any) -> Any:
        """T_i(value): only the tail of the block computes.

        Args:
            recording: Of the clean pass.
            name: The block.
            value: What it returns, nested as in the clean pass.
        """
        return self._active_replay().replay(recording, name, value)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model's parts between and after the blocks; arguments are those of ``torch.compile``.

        Raises:
            ValueError: They make CUDA graphs (modes ``reduce-overhead`` and ``max-autotune``, on a CUDA device).
        """
        self._active_replay().compile(*args, **kwargs)

    def remove(self) -> None:
        """Take everything off the model. Afterwards only ``alfa(input)`` works. May be called again."""
        self._replay = None
        if self.aux is not None:
            self.aux.remove()

    def _active_replay(self) -> Replay:
        if self._replay is None:
            raise RuntimeError("this AlfaWrapper was removed from its model; build a new one")
        return self._replay

    def _gradient(
        self, output: Any, target: Any, inputs: Sequence[Tensor], features: Sequence[Tensor], retain_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        loss = scalar_loss(self.criterion, output, target)
        return attack_gradients(loss, inputs, (output, features), retain_graph=retain_graph)


def _add(feature: Feature, tensors: Sequence[Tensor], delta: Sequence[Tensor]) -> list[Tensor]:
    """f + delta in the precision of delta. Under autocast it stays there, where rounding to bfloat16 would lose it."""
    sums = [tensor + part for tensor, part in zip(tensors, delta, strict=True)]
    if feature.autocast:
        return sums
    return [total.to(tensor.dtype) for total, tensor in zip(sums, tensors, strict=True)]


def reaching(name: str, gradients: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """A block's gradients, with zeros where one of its tensors leads nowhere.

    Raises:
        BlockError: None of them reaches the loss.
    """
    if all(gradient is None for gradient in gradients):
        raise BlockError(f"block {name!r} has no influence on the loss; choose one that the output depends on")
    return [
        torch.zeros_like(tensor) if gradient is None else gradient
        for gradient, tensor in zip(gradients, tensors, strict=True)
    ]


def _check_model(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model: wrap the AlfaWrapper in DistributedDataParallel, not the model inside it")
    if is_compiled(model):
        raise ValueError("model: pass the model as it was before torch.compile, then call AlfaWrapper.compile()")


def _check_attack(alpha: Any, steps: int, eps: Any, init: str) -> tuple[Size, Size | None]:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected a whole number of at least 1, found {steps}")
    if init == "uniform" and eps is None:
        raise ValueError("init: 'uniform' starts in [-eps, eps] and needs eps, found eps=None")
    size = checked_size("alpha", alpha, "a finite step size above 0, such as 0.5/255", positive=True)
    if eps is not None:
        eps = checked_size("eps", eps, "a finite radius of at least 0, or None for no bound")
    return size, eps
