"""AlfaTask: ALFA and L-ALFA as a ``timm.task``, the only bridge to timm's training loop."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..blocks.resolve import format_blocks, list_blocks, resolve_blocks
from ..engine.batchnorm import BATCH_NORM_MODES, BatchNormMode
from ..engine.compiler import stays_eager
from ..engine.core import GRADIENTS, Engine, Gradient, check_model
from ..engine.inventory import Inventory
from ..engine.tail_by_tail import TailByTailStep
from ..errors import BlockError, UsageError
from ..eta import ETA_SETS, Eta, EtaSet, EtaStepper
from ..loss import OBJECTIVES, REDUCTIONS, AlfaLoss, Objective, Reduction
from ..perturbation import SPACES, Perturbation, Pgd, Space, pgd_in
from ..pgd import INITS, NORMS, Init, Norm
from ..sizes import Relative
from .base import MethodTask
from .flags import (
    Flag,
    above_zero,
    at_least_one,
    at_least_zero,
    is_size_above_zero,
    is_size_of_at_least_zero,
    number,
    settings,
    size,
)
from .monitor import FeatureMonitor, norms
from .unlabeled import LabelledLoss, VirtualLoss
from .visibility import advise, describe_effects

_logger = logging.getLogger(__name__)

FEATURES = "ALFA: which features"
ATTACK = "ALFA: the attack"
OBJECTIVE = "ALFA: the objective"
LEARNING = "L-ALFA: learned strengths"
WEIGHT = "a finite weight of at least 0"

# fmt: off
FLAGS = (
    Flag(
        "alfa_blocks", ["@last"], "blocks whose outputs are perturbed; switches ALFA on. Names, globs such as "
        "'blocks.*', @last or @stages", nargs="+", group=FEATURES, argument="blocks", source="i in Eq. 3",
    ),
    Flag(
        "alfa_alpha", Pgd.alpha, "step size in feature units, such as 0.002 or 0.5/255, or as a share of the feature's "
        "rms, such as 2%%", size, expected="a finite step size above 0, such as 0.5/255 or 2%",
        valid=is_size_above_zero, group=ATTACK, argument="alpha", source="alpha in Eq. 4",
    ),
    Flag(
        "alfa_steps", Pgd.steps, "steps of the attack; the first is nearly free", int,
        expected="a whole number of at least 1", valid=at_least_one, group=ATTACK, argument="steps",
        source="K in Eq. 4",
    ),
    Flag(
        "alfa_eps", Pgd.eps, "bound on the perturbation's norm, a number or a share as above", size,
        expected="a finite bound of at least 0, or a share such as 8%", valid=is_size_of_at_least_zero, group=ATTACK,
        argument="eps", source="Proj in Eq. 4",
    ),
    Flag(
        "alfa_norm", Pgd.norm, "sign of the gradient, or the gradient over its l2 norm; also the bound's norm",
        choices=NORMS, group=ATTACK, argument="norm", source="Eq. 4",
    ),
    Flag(
        "alfa_init", Pgd.init, "where the perturbation starts; uniform needs --alfa-eps", choices=INITS, group=ATTACK,
        argument="init", source="Eq. 4",
    ),
    Flag(
        "alfa_space", "values", "what is perturbed: the feature's values, or the mean and deviation of its channels "
        "(alpha is then a share, such as 5%%)", choices=SPACES, group=ATTACK, argument="space",
        source="AdvBN",
    ),
    Flag(
        "alfa_objective", "ce", "an adversarial term: the loss on the perturbed output, or the divergence of its "
        "prediction from the clean one", choices=OBJECTIVES, group=OBJECTIVE, argument="objective",
        source="Eq. 3; kl as in VAT",
    ),
    Flag(
        "alfa_joint", False, "perturb all blocks together, by one attack and in one adversarial pass from the first on",
        bool, group=OBJECTIVE, argument="joint", source="as the all-layer margin (Wei and Ma 2020)",
    ),
    Flag(
        "alfa_lambda", 1.0, "weight of the adversarial losses; 0 is plain training", number, expected=WEIGHT,
        valid=at_least_zero, group=OBJECTIVE, argument="lam", source="lambda in Eq. 3",
    ),
    Flag(
        "alfa_reduction", "sum", "add the adversarial losses, or average them with the clean one", choices=REDUCTIONS,
        group=OBJECTIVE, argument="reduction", source="Eq. 3",
    ),
    Flag(
        "alfa_grad", "full", "whether adversarial losses also train the layers before their block", choices=GRADIENTS,
        group=OBJECTIVE, argument="grad", source="Eq. 3",
    ),
    Flag(
        "alfa_bn", "clean", "whether adversarial passes move the running statistics too (shared), or have batch norms "
        "of their own (aux); clean: neither", choices=BATCH_NORM_MODES, group=OBJECTIVE, argument="bn",
    ),
    Flag(
        "alfa_learnable", False, "learn how strongly each block is perturbed (eta)", bool, group=LEARNING,
        argument="learnable", source="eta in Eq. 5",
    ),
    Flag(
        "alfa_gamma", 0.0, "weight of the l1 norm of eta; the paper tunes it in 0.5, 1, 2", number, expected=WEIGHT,
        valid=at_least_zero, group=LEARNING, only_with="alfa_learnable", argument="gamma", source="gamma in Eq. 5",
    ),
    Flag(
        "alfa_eta_lr", 0.01, "learning rate of eta, constant", number, expected="a finite learning rate above 0",
        valid=above_zero, group=LEARNING, only_with="alfa_learnable", argument="eta_lr", source="Algorithm 1",
    ),
    Flag(
        "alfa_eta_set", "hyperplane", "where eta lives: sum 1, or sum 1 and no negative entry", choices=ETA_SETS,
        group=LEARNING, only_with="alfa_learnable", argument="eta_set", source="P in Eq. 5",
    ),
    Flag(
        "alfa_sample_blocks", None, "perturb this many of the blocks per step, drawn at random and weighted "
        "accordingly; none is all", int, expected="a whole number of at least 1", valid=at_least_one, group=LEARNING,
        argument="sample_blocks",
    ),
)
# fmt: on


class AlfaTask(MethodTask):
    """A classification task whose loss is ALFA's objective (Eq. 3), or L-ALFA's (Eq. 5, Algorithm 1).

    Everything that timm's ``train.py`` asks of a task holds: the trainable module, the evaluation model, EMA and
    checkpoints are those of the plain model, and eta is in ``task_state``. The gradients are those of
    ``AlfaLoss(criterion)(AlfaWrapper(model, ...)(input, target), target)``, but each tail is differentiated once and
    freed at once, see :mod:`timm_alfa.engine.tail_by_tail`.

    ``alpha``, ``steps``, ``eps``, ``norm``, ``init``, ``space``, ``grad``, ``bn``, ``joint``, ``learnable`` and
    ``eta_set`` are as for :class:`~timm_alfa.AlfaWrapper`. ``lam``, ``gamma``, ``reduction`` and ``objective`` are as
    for :class:`~timm_alfa.AlfaLoss`.

    Args:
        model: The model to train, on its device.
        criterion: (output, target) -> scalar; ``None`` builds timm's from ``criterion_kwargs``.
        blocks: Whose outputs to perturb, see :func:`~timm_alfa.resolve_blocks`.
        criterion_kwargs: For ``timm.loss.create_classification_loss``, where ``criterion`` is ``None``.
        eta_lr: Learning rate of eta's own SGD (momentum 0.9, constant rate, no weight decay), above 0.
        sample_blocks: Perturb this many of the r blocks per step, drawn anew each time, alike on all ranks, and
            weighted r / N so that the objective's mean stays the same; ``None`` perturbs all.
        unlabeled: Whether batches may end with images that have no target, see :mod:`timm_alfa.tasks.unlabeled`; with
            the objective ``"kl"`` and the init ``"uniform"``.
        seed: Of the draws of ``sample_blocks``.
        perturbation: Another way to find delta, in place of alpha, steps, eps, norm, init and space.
        cuda_graph: Launch each step as one CUDA graph, see :mod:`timm_alfa.engine.cuda_graph`.
        device: Device of the task.
        dtype: Dtype of the task.
        verbose: Log what the task does.

    Raises:
        ValueError, TypeError: An argument is out of its range, or does not go with ``cuda_graph``. BlockError: A block
            does not resolve.
    """

    title = "ALFA"
    size_flag = "--alfa-alpha"
    monitor: FeatureMonitor

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        blocks: str | Sequence[str] = "@last",
        *,
        criterion_kwargs: dict[str, Any] | None = None,
        alpha: float | str | Relative = Pgd.alpha,
        steps: int = Pgd.steps,
        eps: float | str | Relative | None = Pgd.eps,
        norm: Norm = Pgd.norm,
        init: Init = Pgd.init,
        space: Space = "values",
        grad: Gradient = "full",
        bn: BatchNormMode = "clean",
        joint: bool = False,
        lam: float = 1.0,
        gamma: float = 0.0,
        reduction: Reduction = "sum",
        objective: Objective = "ce",
        learnable: bool = False,
        eta_set: EtaSet = "hyperplane",
        eta_lr: float = 0.01,
        sample_blocks: int | None = None,
        unlabeled: bool = False,
        seed: int = 0,
        perturbation: Perturbation | None = None,
        cuda_graph: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ):
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose
        )
        check_model(model)
        if perturbation is None:
            perturbation = pgd_in(space, model, alpha, steps, eps, norm, init)
        raised: Callable[[Any, Any], Tensor] = self.criterion
        if unlabeled:
            if objective != "kl" or getattr(perturbation, "init", init) != "uniform":
                raise ValueError("unlabeled: needs objective='kl' and init='uniform', which work without a target")
            raised = VirtualLoss(self.criterion)
            self.criterion = LabelledLoss(self.criterion)
        eta = partial(Eta, learnable=learnable, eta_set=eta_set, lr=eta_lr)
        self.engine = Engine(
            model, raised, resolve_blocks(model, blocks), perturbation, grad=grad, bn=bn, joint=joint, eta=eta
        )
        found = self.engine.blocks
        if joint and sample_blocks is not None:
            raise ValueError("sample_blocks: joint=True perturbs all blocks for the price of one; expected None")
        if sample_blocks is not None and not 1 <= sample_blocks <= len(found):
            raise ValueError(f"sample_blocks: expected 1 to {len(found)}, the number of blocks, found {sample_blocks}")
        asked = [blocks] if isinstance(blocks, str) else list(blocks)
        if verbose and asked != found:
            _logger.info(f"blocks {' '.join(asked)}: {', '.join(found)}")
        self.sample_blocks = sample_blocks
        self.seed = seed
        self.objective = AlfaLoss(self.criterion, lam, gamma, reduction, objective)
        self.step = TailByTailStep(self.engine, self.objective)
        self.monitor = FeatureMonitor(self.reported, self.device, self.engine, divergence=objective == "kl")
        self._others_noted = False
        self._advised: set[str] = set()  # blocks
        self._described = False
        self._stepper: EtaStepper | None = None
        if learnable:
            self._stepper = EtaStepper(self.engine.eta, model.parameters())
            self._stepper.listen()
        if cuda_graph:
            if sample_blocks is not None:
                raise ValueError("cuda_graph: sample_blocks draws blocks anew in each step; leave one of them out")
            if getattr(perturbation, "init", "zero") != "zero" or not isinstance(perturbation, Pgd):
                raise ValueError("cuda_graph: would repeat the attack's random start; expected Pgd with init='zero'")
            self.use_cuda_graph()

    def graph_inventory(self) -> Inventory:
        """Of the model."""
        return self.engine.inventory

    def graph_variant(self) -> Hashable:
        """Some steps also take the perturbations' norms."""
        return self.monitor.norms_due

    @contextmanager
    def graph_mode(self) -> Iterator[None]:
        """Nothing is asked of random states, and no step is counted."""
        passes = self.engine.passes
        try:
            with self.engine.frozen():
                yield
        finally:
            self.engine.passes = passes

    def graph_replayed(self) -> None:
        """Count the step."""
        self.engine.passes += 1

    def set_multilabel(self, threshold: float = 0.5) -> None:
        """As for every method; the objective ``"kl"`` becomes the divergence of Bernoulli distributions.

        Args:
            threshold: Probability from which on the F1 scores of the evaluator count a label, between 0 and 1.

        Raises:
            ValueError: The threshold is out of its range, or images without labels have their loss of one class.
        """
        if isinstance(self.criterion, LabelledLoss):
            raise ValueError("unlabeled: is for one class per image, not for independent labels")
        super().set_multilabel(threshold)
        self.objective.multi_label = True

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
            ValueError: The mode makes CUDA graphs, see :meth:`AlfaWrapper.compile`, or the task does.
        """
        if self.graphed is not None:
            raise ValueError("cuda_graph: does not go with torch.compile; leave one of them out")
        self.engine.compile(backend=backend, mode=mode, **compile_kwargs)
        return self.engine.model

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
        return {"loss_adv_by_block": {}, "finite": {}, **super().forward(input, target)}

    @stays_eager
    def compute(self, input: Any, target: Any) -> dict[str, Any]:
        """Clean pass, attacks, adversarial passes, and all gradients behind the first block."""
        of_clean, weights = self._weights()
        found = self.step(input, target, of_clean, weights, norms if self.monitor.norms_due else None)
        result = {
            "loss": found.loss,
            "output": found.output,
            "loss_clean": found.clean,
            "loss_adv": mean_of(list(found.adversarial.values())),
            "loss_adv_by_block": found.adversarial,
            "finite": found.finite,
            "observed": found.observed,
            "survives": found.survives,
            "others": found.others,
        }
        if self.engine.eta.learnable:
            result |= {"eta": self.engine.eta.values.detach().clone(), "eta_gradient": found.eta_gradient}
        return result

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Note what the logs show, and hand eta's gradient on, which waits for the optimizer's step.

        Args:
            result: What :meth:`compute` returned.
        """
        result = super().finish(result)
        gradient, _, _ = result.pop("eta_gradient", None), result.pop("observed"), result.pop("survives")
        self._note_others(result.pop("others"))
        if self._stepper is not None and gradient is not None:
            self._stepper.add(gradient)
        return result

    def _weights(self) -> tuple[float, dict[str, float]]:
        """Factors of the clean loss and of the adversarial losses of this step's blocks."""
        blocks = self.engine.blocks
        of_clean, of_adversarial = self.objective.weights(1 if self.engine.joint else len(blocks))
        if self.sample_blocks is None:
            return of_clean, dict.fromkeys(blocks, of_adversarial)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.engine.passes) % 2**63)
        drawn = torch.randperm(len(blocks), generator=generator)[: self.sample_blocks].sort().values.tolist()
        return of_clean, {blocks[i]: of_adversarial * len(blocks) / self.sample_blocks for i in drawn}

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

    def method_state(self) -> dict[str, Any]:
        """The step count, eta with its momentum, auxiliary batch norms."""
        state: dict[str, Any] = {**super().method_state(), "passes": self.engine.passes}
        if self.engine.eta.learnable:
            state["eta"] = self.engine.eta.state_dict()
        if self.engine.aux is not None:
            state["aux"] = self.engine.aux.state_dict()
        return state

    def load_method_state(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`method_state`.

        Args:
            state: What that returned.

        Raises:
            ValueError: eta was learned for another list of blocks, or auxiliary batch norms are of another model.
        """
        super().load_method_state(state)
        self.engine.passes = int(state.get("passes", 0))
        if self.engine.eta.learnable and "eta" in state:
            self.engine.eta.load_state_dict(state["eta"])
        if self.engine.aux is not None and "aux" in state:
            self.engine.aux.load_state_dict(state["aux"])

    def summary_lines(self, input_size: tuple[int, ...] | None = None) -> list[str]:
        """What a run should say at its start: the resolved blocks, their shapes and the share of FLOPs behind them.

        Args:
            input_size: Shape of one image, [C, H, W]; None takes the model's own.
        """
        engine, loss = self.engine, self.objective
        infos = [info for info in list_blocks(engine.model, input_size, depth=None) if info.name in engine.blocks]
        title = f"L-ALFA ({engine.eta.eta_set}, gamma {loss.gamma:g})" if engine.eta.learnable else self.title
        kind = ", divergence" if loss.objective == "kl" else ""
        head = (
            f"{title}: {engine.perturbation.describe()}, lambda {loss.lam:g}, {loss.reduction}{kind}, "
            f"gradients {engine.grad}, batch norm {engine.bn}{', all blocks together' if engine.joint else ''}"
        )
        return [head, *format_blocks(infos).splitlines()]

    def epoch_metrics(self) -> dict[str, float]:
        """Averages since the last call, over all ranks; logs what the perturbations did, and advice where it is due."""
        first = not self._described
        metrics = super().epoch_metrics()
        effects = self.effects(metrics)
        if self.verbose and effects:
            self._described = True
            _logger.info(f"{self.title}: {effects}")
            for block, line in self.advice(metrics, first=first).items():
                if block not in self._advised:
                    self._advised.add(block)
                    _logger.warning(line)
        return metrics

    def effects(self, metrics: Mapping[str, float]) -> str:
        """What the perturbations did, in a line; empty where nothing was measured.

        Args:
            metrics: As an epoch's.
        """
        return describe_effects(metrics, self.engine.blocks, self.step.rounding.dtype)

    def advice(self, metrics: Mapping[str, float], *, first: bool = True) -> dict[str, str]:
        """By block, a line where its perturbation does next to nothing or too much, or is mostly rounded away.

        Args:
            metrics: As an epoch's.
            first: Whether they are a run's first.
        """
        steps = getattr(self.engine.perturbation, "steps", 1)
        half = self.step.rounding.dtype
        return advise(metrics, self.engine.blocks, self.size_flag, steps=steps, first=first, half=half)

    def write_history(self, folder: Path | None) -> None:
        """Append eta of every step since the last call to ``eta.csv`` in ``folder``; ranks without a folder drop it."""
        self.monitor.history.write(folder)


def mean_of(losses: list[Tensor]) -> Tensor:
    """The mean of some scalars."""
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def check_arguments(args: argparse.Namespace) -> None:
    """What one flag alone does not show.

    Raises:
        UsageError: Naming the flag, and what would be right.
    """
    if args.alfa_init == "uniform" and args.alfa_eps is None:
        raise UsageError("--alfa-init uniform: starts within a bound; give one with --alfa-eps")
    if args.alfa_joint and args.alfa_sample_blocks is not None:
        raise UsageError(
            f"--alfa-sample-blocks {args.alfa_sample_blocks}: --alfa-joint perturbs all blocks for the price of one; "
            "leave one of them out"
        )
    if getattr(args, "cuda_graph", False):
        check_graph(args)


def check_graph(args: argparse.Namespace) -> None:
    """What a CUDA graph would repeat instead of drawing it anew.

    Raises:
        UsageError: Naming the flag.
    """
    if args.alfa_sample_blocks is not None:
        raise UsageError(
            f"--cuda-graph: does not go with --alfa-sample-blocks {args.alfa_sample_blocks}, which draws blocks in "
            "each step; leave one of the two out"
        )
    if args.alfa_init != "zero":
        raise UsageError(f"--cuda-graph: would repeat the random start of --alfa-init {args.alfa_init}; expected zero")


def build(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: nn.Module | None,
    *,
    input_size: tuple[int, int, int] | None,
    task_type: Callable[..., AlfaTask] = AlfaTask,
    **common: Any,
) -> AlfaTask:
    """The task that checked arguments ask for; ``common`` holds device, dtype and verbose.

    Raises:
        UsageError: A block does not resolve or cannot be perturbed.
    """
    try:
        blocks = list(resolve_blocks(model, args.alfa_blocks))
        if args.alfa_sample_blocks is not None and args.alfa_sample_blocks > len(blocks):
            raise UsageError(
                f"--alfa-sample-blocks {args.alfa_sample_blocks}: expected at most the number of blocks, "
                f"{len(blocks)} ({', '.join(blocks)})"
            )
        arguments = {**settings(args, FLAGS), "blocks": blocks, "unlabeled": bool(getattr(args, "unlabeled_dir", ""))}
        arguments["cuda_graph"] = getattr(args, "cuda_graph", False)
        task = task_type(model, criterion, **arguments, seed=getattr(args, "seed", 0), **common)
        if input_size is not None:
            task.engine.check_blocks(input_size)
    except BlockError as error:
        raise UsageError(f"--alfa-blocks {' '.join(args.alfa_blocks)}: {error}") from None
    return task
