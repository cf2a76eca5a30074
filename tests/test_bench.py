"""The benchmark of step costs: its statistics, its floors, its peak memory, and what it runs."""

from __future__ import annotations

import copy
import json
import runpy
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.plain_alfa import plain_alfa
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from toys import Small, batch, family
from untouched import picture

from timm_alfa.bench import memory, step, timing
from timm_alfa.bench.timing import compare
from timm_alfa.bench.variants import Variant, alfa, plain, released, tail_shares, training_step

TINY = ["--model", "test_resnet", "--img-size", "32", "--batch-size", "8", "--rounds", "1", "--no-memory"]


class Clock:
    """Time that passes only inside the measured functions."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def function(self, name: str, *seconds: float) -> Any:
        remaining = iter(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += next(remaining)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: fake.now)
    return fake


def test_ratios_are_medians_of_rounds(clock: Clock) -> None:
    times = {"plain": [9.0, 9.0, 1.0, 2.0, 4.0, 2.0, 2.0], "method": [9.0, 9.0, 2.0, 3.0, 40.0, 3.0, 3.0]}
    found = compare({name: clock.function(name, *values) for name, values in times.items()}, rounds=5, warmup=2)
    assert found["plain"].seconds == 2.0
    assert (found["plain"].ratio, found["plain"].low, found["plain"].high) == (1.0, 1.0, 1.0)
    assert found["method"].seconds == 3.0
    assert found["method"].ratio == statistics.median([2.0, 1.5, 10.0, 1.5, 1.5]) == 1.5
    assert found["method"].low == 1.5
    assert 1.5 < found["method"].high <= 10.0
    assert found["method"].rounds == 5


def test_every_round_calls_each_function_once_in_changing_order(clock: Clock) -> None:
    compare({name: clock.function(name, *[1.0] * 12) for name in "abc"}, rounds=10, warmup=2)
    rounds = ["".join(clock.calls[index : index + 3]) for index in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1


def test_floors_by_hand() -> None:
    """A quarter of the FLOPs behind the block; a forward is 1/3 of a step, a backward for inputs alone another 1/3."""
    assert plain().floor([]) == 1
    assert alfa(["a"]).floor([0.25]) == pytest.approx(1.25)
    assert alfa(["a"], steps=5).floor([0.25]) == pytest.approx(1.25 + 4 * 0.25 * 2 / 3)
    assert released(["a"]).floor([0.25]) == pytest.approx(1 + 0.75 / 3 + 0.25 * 2 / 3 + 0.25)
    assert released(["a"], steps=5).floor([0.25]) == pytest.approx(1 + 0.75 / 3 + 5 * 0.25 * 2 / 3 + 0.25)
    # two blocks: the piece between them is walked once more for the first one's attack
    assert alfa(["a", "b"]).floor([0.5, 0.25]) == pytest.approx(1 + 0.5 + 0.25 + (0.5 - 0.25) / 3)
    assert alfa(["a", "b"], sample_blocks=1).floor([0.5, 0.25]) == pytest.approx(1 + (0.5 + 0.25) / 2)


def test_tails_come_in_order_of_execution() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8))  # 64, 32 and 32 products
    assert tail_shares(model, ["1", "0"], torch.zeros(1, 8)) == [0.5, 0.25]


def lively_resnet() -> tuple[nn.Module, Tensor, Tensor]:
    model, images, target = family("resnet")
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Dropout) or hasattr(module, "drop_prob"):
            module.p = module.drop_prob = 0.0
    model.drop_rate = 0.0
    return model, images, target


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("blocks", [["layer4"], ["layer2.0.bn2", "layer4"]])
def test_the_released_structure_trains_what_it_should(blocks: list[str], steps: int) -> None:
    """Half the clean loss and half the mean adversarial one, with detached features."""
    model, images, target = lively_resnet()
    before = picture(model)
    expected = plain_alfa(
        model, F.cross_entropy, images, target, blocks, alpha=0.5 / 255, steps=steps, grad="tail", reduction="mean"
    )
    loss = released(blocks, steps=steps).build(model, F.cross_entropy, images)(images, target)
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-9, atol=0)
    whole = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    for name, parameter in model.named_parameters():
        gradient = expected.gradients[name]
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found - gradient).norm() < 1e-9 * max(gradient.norm(), 1e-6 * whole), name
    assert picture(model) == before


def test_the_released_structure_names_a_block_that_does_not_run() -> None:
    from timm_alfa.bench.variants import _forward_to

    images, _ = batch(8, dtype=torch.float32)
    with pytest.raises(ValueError, match="'other' did not run"):
        _forward_to(Small(), "other", images)


@pytest.mark.parametrize("variant", [plain(), alfa(["block"], steps=2), alfa(["stem", "block"], learnable=True)])
def test_a_training_step_moves_the_weights(variant: Variant) -> None:
    model = Small().train()
    images, target = batch(8, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one = training_step(variant.build(model, F.cross_entropy, images), optimizer, lambda: torch.autocast("cpu"))
    one(images, target)
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert "head.weight" in moved
    assert "stem.0.weight" in moved


PEAKS = """
import torch
from timm_alfa.bench.memory import MIB, peak_memory

def peak(*sizes):
    remaining = iter(sizes)
    return peak_memory(lambda: torch.full((next(remaining) * MIB // 4,), 1.0), torch.device("cpu"))

print(peak(192, 192, 192, 192), peak(1, 1, 1, 1), peak(256, 256, 64, 64))
"""


def test_peak_memory_sees_what_steps_allocate_and_free_after_the_first_two() -> None:
    """In a process of its own, as the measurement is meant: nothing else comes and goes there."""
    command = [sys.executable, "-c", PEAKS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=memory.fresh_process_environment())
    large, small, late = map(float, done.stdout.split())
    assert abs(large - 192) < 32
    assert small < 32  # the earlier peak is forgotten
    assert abs(late - 64) < 32


def test_memory_of_a_fresh_process() -> None:
    flags = [*TINY, "--blocks", "layer4", "--steps", "1"]
    assert 1 < step.memory_in_fresh_process(flags, "ALFA PGD-1, layer4") < 1000


def test_step_writes_its_records(
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def measured(arguments: Any, name: str) -> float:
        asked.append(name)
        return 100.0 + 50.0 * (len(asked) - 1)

    monkeypatch.setattr(step, "memory_in_fresh_process", measured)
    output = tmp_path / "folder" / "cost"
    flags = ["--blocks", "layer3", "@last", "--steps", "1", "--l-alfa", "--released", "--output", str(output)]
    step.main([*(flag for flag in TINY if flag != "--no-memory"), *flags])
    names = [
        "plain", "plain again (A/A)", "ALFA PGD-1, layer3", "ALFA PGD-1, layer4", "released structure PGD-1, layer3",
        "released structure PGD-1, layer4", "L-ALFA PGD-1, 2 blocks", "L-ALFA PGD-1, 2 blocks, 1 drawn",
        "released structure PGD-1, 2 blocks",
    ]  # fmt: skip
    assert asked == names
    record = json.loads(output.with_suffix(".json").read_text())
    assert [row["name"] for row in record["rows"]] == names
    assert record["input"] == [8, 3, 32, 32]
    assert record["command"].startswith("python -m timm_alfa.bench step --model test_resnet ")
    for index, row in enumerate(record["rows"]):
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
        assert row["low"] <= row["ratio"] <= row["high"]
        assert row["memory_ratio"] == pytest.approx(1 + index / 2)
    assert record["rows"][2]["floor"] > record["rows"][3]["floor"] > record["rows"][0]["floor"] == 1
    table = output.with_suffix(".md").read_text()
    assert table == capsys.readouterr().out
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[6:]] == names
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_command_without_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "step", *TINY, "--steps", "1"])
    runpy.run_module("timm_alfa.bench", run_name="__main__")
    rows = capsys.readouterr().out.splitlines()[6:]
    assert [row.split(" | ")[0] for row in rows] == ["| plain", "| plain again (A/A)", "| ALFA PGD-1, layer4"]
    assert all(row.endswith("|  |") for row in rows)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--blocks", "layer9"], "--blocks layer9: no block is called 'layer9'"),
        (["--steps", "0"], "--steps"),
        (["--rounds", "0"], "--rounds"),
        (["--l-alfa"], "--l-alfa"),
        (["--model", "resnet20x"], "resnet20x"),
    ],
)
def test_mistakes(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        step.main([*TINY, *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m timm_alfa.bench step: error: ")
    assert expected in error


def test_an_unknown_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "speed"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("timm_alfa.bench", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "usage: python -m timm_alfa.bench {step} ...\n"
