"""``python -m timm_alfa.bench host``: what a step asks of the host, counted: Python calls and tensor operations.

On a GPU the host is what small models wait for. Counts are the same on every machine, but for what torch calls in its
own functions, which differs a little from version to version.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from timm.task import ClassificationTask
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UsageError
from ..tasks.alfa import AlfaTask
from ..train.arguments.parser import TrainParser
from . import common

SIZES = {"resnet20s": 32, "resnet50": 64, "test_vit": 160, "efficientnet_b0": 64, "convnext_atto": 64}
"""Models that are counted, and their images' size."""
VARIANTS: dict[str, dict[str, Any]] = {
    "PGD-1": {"blocks": "@last", "steps": 1},
    "PGD-5": {"blocks": "@last", "steps": 5},
    "L-ALFA at the stages": {"blocks": "@stages", "learnable": True},
    "the same, joint": {"blocks": "@stages", "learnable": True, "joint": True},
}
VIEWS = (
    "view", "expand", "detach", "alias", "aten.t.", "transpose", "select.", "slice.", "squeeze", "permute", "unbind",
    "split", "as_strided", "empty", "promote_types", "_local_scalar_dense",
)  # fmt: skip
"""Operations that launch no kernel."""


class Operations(TorchDispatchMode):
    """Counts operations that compute something; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(view in str(func) for view in VIEWS)
        return func(*args, **(kwargs or {}))


def training_step(name: str, options: dict[str, Any] | None) -> Callable[[], None]:
    """A whole update on two images, after four to warm up.

    Args:
        name: timm model.
        options: Of ``AlfaTask``; ``None`` is timm's plain task.
    """
    torch.manual_seed(0)
    size = SIZES[name]
    images, target = torch.randn(2, 3, size, size), torch.tensor([1, 2])
    model, criterion = timm.create_model(name, num_classes=10).train(), nn.CrossEntropyLoss()
    if options is None:
        task = ClassificationTask(model, criterion, verbose=False)
    else:
        task = AlfaTask(model, criterion, verbose=False, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        task(images, target)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step()
    return step


def python_calls(step: Callable[[], None]) -> int:
    """Calls of Python functions in one step."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def operations(step: Callable[[], None]) -> int:
    """Tensor operations in one step that compute something."""
    with Operations() as counted:
        step()
    return counted.count


def main(argv: Sequence[str]) -> None:
    """Count and print a table.

    Raises:
        UsageError: A model is none of those that are counted.
    """
    parser = TrainParser(prog="python -m timm_alfa.bench host", description="What a step asks of the host, counted.")
    parser.add_argument("--models", nargs="+", default=list(SIZES), metavar="NAME", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--output", default=None, metavar="PATH", help="write PATH.json and PATH.md")
    args: argparse.Namespace = parser.parse_args(argv)
    unknown = [name for name in args.models if name not in SIZES]
    if unknown:
        raise UsageError(f"--models {unknown[0]}: expected some of {', '.join(SIZES)}")
    rows = []
    for name in args.models:
        row: dict[str, Any] = {"model": name}
        for title, options in {"plain": None, **VARIANTS}.items():
            step = training_step(name, options)
            row[title] = [python_calls(step), operations(step)]
        rows.append(row)
    record = {
        "command": "python -m timm_alfa.bench host " + " ".join(argv),
        "machine": common.machine(torch.device("cpu")),
        "rows": rows,
    }
    common.write(record, _table(record), args.output)


def _table(record: dict[str, Any]) -> str:
    titles = ["plain", *VARIANTS]
    lines = [
        "# What a step asks of the host",
        "",
        f"`{record['command'].strip()}` ({record['machine']}, Python {sys.version.split()[0]})",
        "",
        "Of one update: Python calls, in brackets relative to a plain one; then tensor operations that compute",
        "something, in brackets how many more than in a plain one.",
        "",
        f"| model | {' | '.join(titles)} |",
        "| --- |" + " ---: |" * len(titles),
    ]
    for row in record["rows"]:
        calls, done = row["plain"]
        cells = [f"{calls}; {done}"]
        for title in titles[1:]:
            more_calls, more = row[title]
            cells.append(f"{more_calls} ({more_calls / calls:.2f}); {more} (+{more - done})")
        lines.append(f"| `{row['model']}` | {' | '.join(cells)} |")
    return "\n".join(lines)
