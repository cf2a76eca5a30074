"""What there is to run, each part a process with a time limit of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm_alfa

MODES: dict[str, tuple[str, ...]] = {"eager": (), "graph": ("--cuda-graph",), "compiled": ("--compile",)}
GROUPS = ("tests", *MODES)
# Seconds after which a part is cut off.
TESTS_LIMIT, LIMITS = 300, {"eager": 60, "graph": 60, "compiled": 150}
TESTS = Path(timm_alfa.__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Args:
        name: Architecture.
        batch_size: Images per step.
        img_size: Height and width.
        rounds: Measurements of each method.
        advprop: Steps of AdvProp's attack.
    """

    name: str
    batch_size: int
    img_size: int
    rounds: int = 11
    advprop: tuple[int, ...] = (1,)


MODELS = (
    Model("resnet50", 256, 224, advprop=(1, 5)),
    Model("resnet20s", 128, 32, rounds=21),
    Model("efficientnet_b0", 128, 224),
    Model("vit_small_patch16_224", 128, 224),
    Model("convnext_tiny", 128, 224),
    Model("resnet18_cifar", 128, 32, rounds=21, advprop=(1, 5)),
)
SMOKE_MODELS = (Model("test_resnet", 4, 32, rounds=1, advprop=(1, 5)), Model("test_convnext", 4, 32, rounds=1))


@dataclass(frozen=True)
class Part:
    """One process.

    Args:
        name: Of its files.
        group: One of :data:`GROUPS`.
        argv: Arguments of ``bench step``, or of pytest.
        limit: Seconds.
        model: What is measured; None for the tests.
    """

    name: str
    group: str
    argv: tuple[str, ...]
    limit: float
    model: Model | None = None


def list_parts(models: Sequence[Model], device: str, *, smoke: bool) -> list[Part]:
    """All parts, the most telling first: tests; ALFA at the last block, eager and as a graph; all stages; compiled."""
    tests = [str(TESTS / "unit" / "engine" / "test_randomness.py"), "-n0"] if smoke else ["--maxprocesses=8"]
    parts = [Part("tests", "tests", ("-x", "--device", device, *tests), TESTS_LIMIT)]
    threads = ("--threads", "1") if smoke else ()
    for modes in (("eager", "graph"), ("compiled",)):
        for methods in (_at_the_last_block, _at_all_stages):
            for mode in modes:
                for model in models:
                    suffix, flags = methods(model)
                    argv = (*_common(model, device), *threads, *flags, *MODES[mode])
                    parts.append(Part(f"{model.name}-{suffix}{mode}", mode, argv, LIMITS[mode], model))
    return parts


def _common(model: Model, device: str) -> list[str]:
    return [
        "--model", model.name, "--batch-size", str(model.batch_size), "--img-size", str(model.img_size),
        "--rounds", str(model.rounds), "--amp", "bfloat16", "--channels-last", "--device", device, "--no-memory",
    ]  # fmt: skip


def _at_the_last_block(model: Model) -> tuple[str, list[str]]:
    """PGD-1 and PGD-5; AdvProp where it is measured with both, too."""
    methods = ["alfa", "advprop"] if 5 in model.advprop else ["alfa"]
    return "", ["--methods", *methods, "--blocks", "@last", "--steps", "1", "5"]


def _at_all_stages(model: Model) -> tuple[str, list[str]]:
    """L-ALFA, and AdvProp where one step of it is enough."""
    methods = ["l-alfa"] if 5 in model.advprop else ["l-alfa", "advprop"]
    return "stages-", ["--methods", *methods, "--blocks", "@stages", "--steps", "1"]
