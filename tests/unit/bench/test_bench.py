"""The benchmarks: their statistics, peak memory, what they run, and their commands."""

from __future__ import annotations

import copy
import json
import runpy
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
import torch.nn.functional as F
from reference.plain_alfa import plain_alfa
from timm.task import ClassificationTask
from timm.utils import AverageMeter
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from toys import Small, batch, family
from untouched import picture

from timm_alfa.bench import common, loader, loop, memory, rounding, step, timing, variants
from timm_alfa.bench.gpu import command as gpu
from timm_alfa.bench.paper import command as paper
from timm_alfa.bench.released import _forward_to, released
from timm_alfa.bench.timing import compare
from timm_alfa.bench.variants import Variant, alfa, alfa_wrapper, l_alfa, plain, training_step
from timm_alfa.train.arguments.command_line import parse_args

COMMANDS = ("step", "loop", "loader", "host", "rounding", "paper", "finetune", "gpu")
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


def lively_resnet(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    model, images, target = family("resnet", device=device)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.Dropout) or hasattr(module, "drop_prob"):
            module.p = module.drop_prob = 0.0
    model.drop_rate = 0.0
    return model, images, target


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("blocks", [["layer4"], ["layer2.0.bn2", "layer4"]])
def test_the_released_structure_trains_what_it_should(blocks: list[str], steps: int, device: torch.device) -> None:
    """Half the clean loss and half the mean adversarial one, with detached features."""
    model, images, target = lively_resnet(device)
    before = picture(model)
    expected = plain_alfa(
        model, F.cross_entropy, images, target, blocks, alpha=0.5 / 255, steps=steps, grad="tail", reduction="mean"
    )
    loss = released(blocks, steps=steps).build(model, images, "eager")(images, target)
    loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-9, atol=0)
    whole = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    for name, parameter in model.named_parameters():
        gradient = expected.gradients[name]
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found - gradient).norm() < 1e-9 * max(gradient.norm(), 1e-6 * whole), name
    assert picture(model) == before


def test_the_released_structure_names_a_block_that_does_not_run() -> None:
    images, _ = batch(8, dtype=torch.float32)
    with pytest.raises(ValueError, match="'other' did not run"):
        _forward_to(Small(), "other", images)


@pytest.mark.parametrize(
    "variant", [plain(), alfa(["block"], steps=2), l_alfa(["stem", "block"]), alfa_wrapper(["block"])]
)
def test_a_training_step_moves_the_weights(variant: Variant, device: torch.device) -> None:
    model = Small().to(device).train()
    images, target = batch(8, dtype=torch.float32, device=device)
    before = copy.deepcopy(model.state_dict())
    loss_of = variant.build(model, images, "eager")
    one = training_step(loss_of, torch.optim.SGD(model.parameters(), lr=0.1), lambda: torch.autocast(device.type))
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def measured(arguments: Any, name: str) -> float:
        asked.append(name)
        return 100.0 + 50.0 * (len(asked) - 1)

    monkeypatch.setattr(step, "memory_in_fresh_process", measured)
    output = tmp_path / "folder" / "cost"
    methods = [
        "alfa",
        "alfa-wrapper",
        "l-alfa",
        "l-alfa-drawn",
        "released",
        "advprop",
        "fast-advprop",
        "noise",
        "moex",
        "pgd-at",
    ]
    flags = ["--methods", *methods, "--blocks", "layer3", "@last", "--steps", "1", "--output", str(output)]
    step.main([*(flag for flag in TINY if flag != "--no-memory"), *flags])
    names = [
        "plain", "plain again (A/A)", "ALFA PGD-1, layer3", "ALFA PGD-1, layer4", "ALFA (AlfaWrapper) PGD-1, layer3",
        "ALFA (AlfaWrapper) PGD-1, layer4", "L-ALFA PGD-1, 2 blocks", "L-ALFA PGD-1, 1 drawn of 2 blocks",
        "released structure PGD-1, layer3", "released structure PGD-1, layer4", "AdvProp PGD-1", "Fast AdvProp",
        "noise, layer3", "noise, layer4", "MoEx, act1", "adversarial training PGD-1",
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
    floors = {row["name"]: row["floor"] for row in record["rows"]}
    assert floors["ALFA PGD-1, layer3"] > floors["ALFA PGD-1, layer4"] > floors["plain"] == floors["MoEx, act1"] == 1
    both = floors["ALFA PGD-1, layer3"] + floors["ALFA PGD-1, layer4"]
    assert floors["L-ALFA PGD-1, 1 drawn of 2 blocks"] == pytest.approx(both / 2)
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


def test_only_all_blocks_together(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(step, "compare", lambda steps, **_: {name: timing.Ratio(1, 1, 1, 1, 1) for name in steps})
    chosen = ["--methods", "l-alfa", "l-alfa-drawn", "released", "--together", "--blocks", "@stages"]
    step.main([*TINY, *chosen, "--steps", "1", "3"])
    names = [line.split(" | ")[0].removeprefix("| ") for line in capsys.readouterr().out.splitlines()[8:]]
    assert names == [
        "L-ALFA PGD-1, 5 blocks",
        "L-ALFA PGD-3, 5 blocks",
        "L-ALFA PGD-1, 1 drawn of 5 blocks",
        "L-ALFA PGD-3, 1 drawn of 5 blocks",
        "released structure PGD-1, 5 blocks",
        "released structure PGD-3, 5 blocks",
    ]


def test_what_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(variants.torch, "compile", lambda model: compiled.append(model) or model)
    step.main([*TINY, "--methods", "moex", "released", "--steps", "1", "--compile"])
    out = capsys.readouterr().out
    assert "Left out: MoEx, act1 (does not go with MoEx" in out
    assert "Left out: released structure PGD-1, layer4 (runs eagerly, as its original does)." in out
    assert "| plain again (A/A) |" in out
    assert "| MoEx" not in out
    assert len(compiled) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_compiled(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = torch.compile

    def graphs_alone(*args: Any, **options: Any) -> Any:
        return real(*args, **{**options, "backend": "aot_eager"})  # not their code

    monkeypatch.setattr(torch, "compile", graphs_alone)
    torch.compiler.reset()
    step.main([*TINY, "--methods", "alfa", "advprop", "--steps", "1", "--compile"])
    torch.compiler.reset()
    out = capsys.readouterr().out
    assert "| ALFA PGD-1, layer4 |" in out
    assert "| AdvProp PGD-1 |" in out
    assert "Left out" not in out


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        ("step", ["--blocks", "layer9"], "--blocks layer9: no block is called 'layer9'"),
        ("step", ["--blocks", "layer1.0.drop_path"], "--blocks layer1.0.drop_path: "),
        ("step", ["--steps", "1", "0"], "--steps 1 0: expected whole numbers of at least 1"),
        ("step", ["--rounds", "0"], "--rounds 0: "),
        ("step", ["--methods", "l-alfa"], "--methods l-alfa: needs several blocks, found --blocks layer4"),
        ("step", ["--together"], "--together: needs several blocks"),
        ("step", ["--methods", "mixup"], "argument --methods: invalid choice: 'mixup'"),
        ("step", ["--methods", "moex", "--moex-block", "fc"], "--moex-block fc: "),
        ("step", ["--moex-block", "act1"], "--moex-block act1: has no effect without --methods moex"),
        ("step", ["--model", "resnet20x"], "--model resnet20x: timm has no such model"),
        ("step", ["--device", "gpu"], "--device gpu: not a device"),
        ("loop", ["--batches", "0"], "--batches 0: "),
        ("loop", ["--amp", "float16"], "--amp float16: needs a loss scaler"),
        ("loop", ["--metods", "alfa"], "unrecognized arguments: --metods alfa"),
    ],
)
def test_mistakes(command: str, flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = TINY if command == "step" else TINY[:-1]
    with pytest.raises(SystemExit) as caught:
        common.run(command, {"step": step.main, "loop": loop.main}[command], [*tiny, *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"timm_alfa.bench {command}: error: {expected}")
    assert error.count("\n") == 1


def test_the_loops_train_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same losses, batch by batch, from the same weights, images and order."""
    losses: dict[str, list[float]] = {"plain": [], "command": []}
    update = AverageMeter.update

    def noted(meter: AverageMeter, value: float, count: int = 1) -> None:
        if count == 4:  # not the meters of time
            losses[now].append(value)
        update(meter, value, count)

    monkeypatch.setattr(AverageMeter, "update", noted)
    monkeypatch.setitem(loop.OPTIMIZER, "lr", 0.1)
    flags = ["--model", "test_resnet", "--img-size", "32", "--batch-size", "4", "--device", "cpu"]
    args = loop.build_parser().parse_args(flags)
    images = loop.Images(12, 32)
    for now, create in (("plain", loop.plain_epoch), ("command", loop.command_epoch)):
        epoch: Any = create(args, images)
        if now == "command":
            assert type(epoch.args[0].task) is ClassificationTask
            epoch.args[0].module.load_state_dict(common.create_model(args, num_classes=10).state_dict())
        torch.manual_seed(1)
        epoch()
    assert len(losses["plain"]) == 3
    assert losses["plain"] == losses["command"]


def test_loop_writes_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "loop"
    loop.main([*TINY[:-1], "--batches", "2", "--output", str(output)])
    record = json.loads(output.with_suffix(".json").read_text())
    names = ["plain loop", "plain loop again (A/A)", "train_alfa.py, ALFA off"]
    assert [row["name"] for row in record["rows"]] == names
    assert record["input"] == [8, 3, 32, 32]
    assert all(row["images_per_second"] == pytest.approx(16 / row["seconds"]) for row in record["rows"])
    table = output.with_suffix(".md").read_text()
    assert table == capsys.readouterr().out
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[6:]] == names


@pytest.mark.parametrize(
    "line", [line for page in pages.PAGES for line in pages.command_lines(page) if " timm_alfa.bench " in line]
)
def test_the_commands_of_the_documentation_parse(line: str) -> None:
    command, *flags = shlex.split(line)[3:]
    if command == "rounding":
        own, others = rounding.build_parser().parse_known_args(flags)
        assert all(map(rounding.parse_size, own.sizes))
        assert parse_args(others).amp
        return
    args = (
        {"step": step, "loop": loop, "loader": loader, "paper": paper, "gpu": gpu}[command]
        .build_parser()
        .parse_args(flags)
    )
    if command in ("step", "loop"):
        common.check_arguments(args)


def test_an_unknown_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "speed"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("timm_alfa.bench", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"usage: python -m timm_alfa.bench {{{','.join(COMMANDS)}}} ...\n"


def test_help_has_a_line_per_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    runpy.run_module("timm_alfa.bench", run_name="__main__")
    usage, blank, *lines = capsys.readouterr().out.splitlines()
    assert usage.startswith("usage: ")
    assert blank == ""
    assert [line.split(":")[0].split()[-1] for line in lines] == list(COMMANDS)
