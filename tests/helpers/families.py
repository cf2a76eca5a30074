"""Whether ALFA holds for a family of timm: replays bit for bit, gradients by comparison with plain hooks.

``python tests/helpers/families.py --output results/families.md`` goes through all families and writes the table.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from parity import gradient_errors, relative
from reference.plain_alfa import PlainResult, plain_alfa
from rng import rng_state, set_rng_state
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper, list_blocks, resolve_blocks
from timm_alfa.engine.replay import Replay

# By family: the cheapest model of each of timm 1.0.31's model modules, at the smallest input that it runs at. Options
# are small where the model's own numbers would be out of proportion: fewer layers, each of them as it is.
DATA = Path(__file__).parent / "data" / "timm_families.json"

ALPHA = 1.0 / 255

HEADER = """# ALFA on every model family of timm

The cheapest model of each of timm's model modules; its middle stage (or block) and its last, as `@stages` and `@last`
resolve them. The share of the tail is that of the forward's FLOPs at the tested input, batch by channels by height by
width. *Replay*: whether the logits of a replay with delta = 0 equal the clean ones bit for bit, in evaluation mode and
float32, at both blocks. *Error*: the largest deviation of the loss or of any parameter's gradient from an independent
implementation with plain hooks, relative to its norm, in training mode (dropout and stochastic depth on where the model
has them) and float64, over two steps with both blocks perturbed; with `AlfaWrapper` and with `AlfaTask`. Below 1e-8 is
demanded, and below 1e-5 where a model computes parts in float32 whatever its dtype. Buffers agree bit for bit.
"""
COLUMNS = (
    "family",
    "model",
    "input",
    "block",
    "tail",
    "last block",
    "tail",
    "dtype",
    "replay",
    "error",
    "error (task)",
)


@dataclass(frozen=True)
class Family:
    """One line of the data.

    Args:
        name: timm's module.
        model: Architecture.
        size: Height and width of the input.
        batch_size: Of the input.
        options: Of ``timm.create_model``.
        single: Whether it computes some things in float32 even if its weights are float64.
    """

    name: str
    model: str
    size: int
    batch_size: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    single: bool = False

    @property
    def tolerance(self) -> float:
        """For relative errors of loss and gradients."""
        return 1e-5 if self.single else 1e-8

    @property
    def changed(self) -> str:
        """Options that make it another model than timm's, other than its input size and rates."""
        return "".join(
            f", {key}={value}" for key, value in self.options.items() if key != "img_size" and "rate" not in key
        )


@dataclass(frozen=True)
class Outcome:
    """What was found: names and tail shares of the middle and the last block, errors, and how much there was to see.

    Args:
        exact: Whether every replay gave the clean logits.
        errors: Of ``AlfaWrapper`` and of ``AlfaTask``, the largest.
        moved: By how much the perturbations changed the loss, at least.
        seconds: CPU time.
    """

    family: Family
    blocks: list[str]
    tail_shares: list[float]
    exact: bool
    errors: tuple[float, float]
    moved: float
    seconds: float

    def row(self) -> str:
        """A line of the table."""
        (middle, last), (middle_share, last_share) = self.blocks, self.tail_shares
        cells = [
            self.family.name,
            f"{self.family.model}{self.family.changed}",
            f"{self.family.batch_size}x3x{self.family.size}x{self.family.size}",
            f"`{middle}`",
            f"{middle_share:.1%}",
            f"`{last}`",
            f"{last_share:.1%}",
            "float64, parts float32" if self.family.single else "float64",
            "exact" if self.exact else "DIFFERS",
            *(f"{error:.0e}" for error in self.errors),
        ]
        return "| " + " | ".join(cells) + " |"


def load() -> dict[str, Family]:
    """All families."""
    return {name: Family(name, **values) for name, values in json.loads(DATA.read_text()).items()}


def check(family: Family, device: torch.device | str = "cpu") -> Outcome:
    """Try the family out, with the same weights and images on every device."""
    start = time.process_time()
    torch.manual_seed(0)
    model = timm.create_model(family.model, num_classes=10, **family.options)
    scatter_constants(model)
    images = torch.randn(family.batch_size, 3, family.size, family.size)
    target = torch.arange(family.batch_size)
    stages = list(resolve_blocks(model, "@stages"))
    blocks = [stages[(len(stages) - 1) // 2], *resolve_blocks(model, "@last")]
    shares = {info.name: info.tail_share for info in list_blocks(model, (3, family.size, family.size), depth=None)}
    model, images, target = model.to(device), images.to(device), target.to(device)
    exact = replays_exactly(model.eval(), images, blocks)
    expected, errors = step_errors(model.double().train(), images.double(), target, blocks)
    return Outcome(
        family,
        blocks,
        [shares[block] for block in blocks],
        exact,
        errors,
        min(float((loss - expected.clean).detach().abs()) for loss in expected.adversarial.values()),
        time.process_time() - start,
    )


@torch.no_grad()
def scatter_constants(model: nn.Module) -> None:
    """Parameters that start out as a constant, such as zero, would hide much of the model from its gradients."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter += 0.1 * torch.randn_like(parameter)


def replays_exactly(model: nn.Module, images: Tensor, blocks: Sequence[str]) -> bool:
    """Whether replays with the recorded features give the plain output; in the second round without copies."""
    plain = tree_leaves(model(images))
    replay = Replay(model, resolve_blocks(model, blocks))
    outputs = []
    for _ in range(2):
        recording = replay.record((images,))
        outputs.append(recording.output)
        for name, feature in recording.features.items():
            outputs.append(replay.replay(recording, name, feature.rebuild(feature.tensors)))
    return all(torch.equal(*pair) for output in outputs for pair in zip(tree_leaves(output), plain, strict=True))


def step_errors(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    blocks: Sequence[str],
    criterion: Callable[[Any, Any], Tensor] = F.cross_entropy,
) -> tuple[PlainResult, tuple[float, float]]:
    """The reference, and the largest errors of two steps of ``AlfaWrapper`` and of ``AlfaTask`` from the same state."""
    device = images.device
    state, before = rng_state(device), [buffer.clone() for buffer in model.buffers()]
    expected = plain_alfa(model, criterion, images, target, blocks, alpha=ALPHA, steps=1)
    end, after = rng_state(device), [buffer.clone() for buffer in model.buffers()]

    def largest(step: Callable[[], Tensor]) -> float:
        errors = []
        for _ in range(2):
            set_rng_state(state, device)
            with torch.no_grad():
                for buffer, value in zip(model.buffers(), before, strict=True):
                    buffer.copy_(value)
            model.zero_grad()
            loss = step()
            loss.backward()
            errors += [relative(loss, expected.loss), *gradient_errors(model, expected.gradients).values()]
            assert all(map(torch.equal, model.buffers(), after)), "buffers are not as the clean pass leaves them"
            assert torch.equal(rng_state(device), end), "the random state is not as the clean pass leaves it"
        return max(errors)

    alfa, loss_fn = AlfaWrapper(model, criterion, blocks, alpha=ALPHA), AlfaLoss(criterion)
    of_wrapper = largest(lambda: loss_fn(alfa(images, target), target).loss)
    alfa.remove()
    task = AlfaTask(model, criterion, blocks, alpha=ALPHA, verbose=False)
    return expected, (of_wrapper, largest(lambda: task(images, target)["loss"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Go through the families."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="all by default")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # of the models themselves
    lines = [HEADER, "| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for name, family in load().items():
        if not args.families or name in args.families:
            outcome = check(family)
            lines.append(outcome.row())
            print(lines[-1], f"{outcome.seconds:.0f} s, loss moved by {outcome.moved:.1g}", flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + f"\n\ntorch {torch.__version__}, timm {timm.__version__}, CPU.\n")


if __name__ == "__main__":
    main()
