"""AlfaWrapper: a model whose training forward also returns adversarially perturbed outputs (sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks.resolve import resolve_blocks
from .engine.aux_batchnorm import AuxBatchNorms
from .engine.batchnorm import BatchNormMode
from .engine.compiler import stays_eager
from .engine.core import Engine, Gradient, check_model
from .engine.recording import Recording
from .eta import Eta, EtaSet, EtaStepper
from .perturbation import Perturbation, Pgd, Space, pgd_in
from .pgd import Init, Norm
from .sizes import Relative

JOINT = " + "  # between the names of blocks that were perturbed together


@dataclass
class AlfaOutput:
    """What ``alfa(input, target)`` returns.

    Args:
        output: The model's output for the clean input.
        adv_outputs: Block name -> the model's output with that block's feature perturbed; empty in evaluation mode.
            With ``joint`` one output with all of them perturbed, under ``"a + b"``.
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
        space: ``"values"`` perturbs the feature itself, ``"moments"`` the mean and deviation of its channels; alpha and
            eps are then shares of these, see :class:`~timm_alfa.perturbation.Moments`.
        grad: ``"full"``: the adversarial terms also train what comes before the block (Eq. 3). ``"tail"``: the feature
            is detached, as in the released code; what reaches the loss around the block stays connected.
        bn: ``"clean"``: running statistics move with the clean pass only. ``"shared"``: with every pass. ``"aux"``:
            adversarial passes have affine parameters and statistics of their own, which the optimizer has to be built
            after; they are no part of the ``state_dict`` (see ``aux``), and the first step costs a tail replay too.
        joint: Perturb all blocks in one adversarial pass from the first of them on, by one attack that follows the loss
            with all of them perturbed: one tail pass, and one per attack step, however many blocks there are. Each
            keeps a step size and a ball of its own.
        learnable: L-ALFA: eta is learned (Eq. 5). Otherwise eta is 1.
        eta_set: P, the set onto which eta is projected: ``"hyperplane"`` or ``"simplex"``.
        eta_lr: Learning rate of eta's own SGD, above 0; see :meth:`follow`.
        perturbation: Another way to find delta, in place of alpha, steps, eps, norm, init and space.

    Attributes:
        module: The model.
        engine: What records, perturbs and replays.

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
        alpha: float | str | Relative = Pgd.alpha,
        steps: int = Pgd.steps,
        eps: float | str | Relative | None = Pgd.eps,
        norm: Norm = Pgd.norm,
        init: Init = Pgd.init,
        space: Space = "values",
        grad: Gradient = "full",
        bn: BatchNormMode = "clean",
        joint: bool = False,
        learnable: bool = False,
        eta_set: EtaSet = "hyperplane",
        eta_lr: float = 0.01,
        perturbation: Perturbation | None = None,
    ):
        super().__init__()
        check_model(model)
        if perturbation is None:
            perturbation = pgd_in(space, model, alpha, steps, eps, norm, init)
        eta = partial(Eta, learnable=learnable, eta_set=eta_set, lr=eta_lr)
        self.engine = Engine(
            model, criterion, resolve_blocks(model, blocks), perturbation, grad=grad, bn=bn, joint=joint, eta=eta
        )
        self.module = model
        self.criterion = criterion

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that are perturbed."""
        return self.engine.blocks

    @property
    def eta(self) -> Eta:
        """Their strengths."""
        return self.engine.eta

    @property
    def aux(self) -> AuxBatchNorms | None:
        """The batch norms of adversarial passes, with ``bn="aux"``."""
        return self.engine.aux

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
        """Everything in one graph; :mod:`timm_alfa.engine.tail_by_tail` is the other order of work."""
        if all(parameter.grad is None for parameter in self.module.parameters()):
            self.eta.values.grad = None  # what a skipped step left goes with the weights' own gradients
        engine = self.engine
        recording = engine.record(input)
        with recording.end.left_as_is(), engine.without_side_effects():
            gradients = engine.clean_gradients(recording, target)
        with engine.adversarial_pass(recording):
            if engine.joint:
                return self._output(recording, *self._jointly(recording, target, gradients))
            deltas = {b: engine.find_delta(recording, b, target, gradients.get(b)) for b in self.blocks}
            adv_outputs = {b: engine.adversarial_output(recording, {b: deltas[b]}) for b in self.blocks}
        return self._output(recording, deltas, adv_outputs)

    def _jointly(self, recording: Recording, target: Any, gradients: dict[str, list[Tensor]]) -> tuple[Any, Any]:
        """Perturbations of all blocks, and the one output with all of them."""
        in_order = sorted(self.blocks, key=recording.order.__getitem__)
        features = {block: recording.features[block] for block in in_order}
        deltas = self.engine.find_deltas(recording, features, target, gradients)
        return deltas, {JOINT.join(self.blocks): self.engine.adversarial_output(recording, deltas)}

    def _output(self, recording: Recording, deltas: dict[str, list[Tensor]], adv_outputs: dict[str, Any]) -> AlfaOutput:
        shaped = {block: recording.features[block].rebuild(deltas[block]) for block in self.blocks}
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
        self.engine.check_blocks(input_size)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model's parts between and after the blocks; arguments are those of ``torch.compile``.

        Raises:
            ValueError: They make CUDA graphs (modes ``reduce-overhead`` and ``max-autotune``, on a CUDA device).
        """
        self.engine.compile(*args, **kwargs)

    def remove(self) -> None:
        """Take everything off the model. Afterwards only ``alfa(input)`` works. May be called again."""
        self.engine.remove()
