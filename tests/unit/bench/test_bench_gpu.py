"""What a GPU is wanted for: which parts there are, in what order they run, what becomes of them, and the tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from timm_alfa.bench import step
from timm_alfa.bench.common import run
from timm_alfa.bench.gpu import command
from timm_alfa.bench.gpu.parts import MODELS, MODES, SMOKE_MODELS, Part, list_parts
from timm_alfa.bench.gpu.process import Outcome, run_part
from timm_alfa.bench.gpu.report import write_report
from timm_alfa.errors import UsageError

PARTS = list_parts(SMOKE_MODELS, "cpu", smoke=True)
NAMES = [part.name for part in PARTS]


def states(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in outcomes}


def test_every_model_is_measured_in_every_mode_with_every_method() -> None:
    parts = list_parts(MODELS, "cuda", smoke=False)
    assert len({part.name for part in parts}) == len(parts) == 1 + 2 * len(MODELS) * len(MODES)
    assert parts[0].argv == ("-x", "--device", "cuda", "--maxprocesses=8")
    for mode, flags in MODES.items():
        for model in MODELS:
            argvs = [part.argv for part in parts if part.group == mode and part.model == model]
            found = []
            for argv in argvs:
                assert argv[len(argv) - len(flags) :] == flags
                args = step.build_parser().parse_args([flag for flag in argv if flag not in flags])
                assert (args.model, args.batch_size, args.amp) == (model.name, model.batch_size, "bfloat16")
                found += [(method, steps) for method in args.methods for steps in args.steps]
            advprop = [("advprop", steps) for steps in model.advprop]
            assert sorted(found) == sorted([("alfa", 1), ("alfa", 5), ("l-alfa", 1), *advprop])
    assert sum(5 in model.advprop for model in MODELS) == 2


def test_what_was_tried_in_vain_comes_last_and_what_is_done_not_at_all() -> None:
    outcomes = {NAMES[0]: Outcome(NAMES[0], "failed"), NAMES[1]: Outcome(NAMES[1], "done")}
    outcomes[NAMES[3]] = Outcome(NAMES[3], "left")
    found = command.list_pending(PARTS, ("tests", "eager", "graph", "compiled"), outcomes)
    assert [part.name for part in found] == [*NAMES[2:], NAMES[0]]
    assert [part.name for part in command.list_pending(PARTS, ("tests",), {})] == ["tests"]


def test_nothing_is_begun_that_cannot_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = command.read_outcomes(tmp_path, "a machine")
    tried = command.run_parts(PARTS[:2], tmp_path, "a machine", PARTS, outcomes, command.SHORTEST)
    assert states(tried) == dict.fromkeys(NAMES[:2], "left")
    assert f"left: {NAMES[0]}, {NAMES[1]}" in capsys.readouterr().out
    assert command.read_outcomes(tmp_path, "a machine") == {}
    with pytest.raises(UsageError, match=r"--output .*: has the results of a machine; name another folder"):
        command.read_outcomes(tmp_path, "another")


def record(name: str, *rows: tuple[str, float]) -> dict[str, Any]:
    common = {"floor": 1.0, "low": 0.9, "high": 1.1, "rounds": 1, "images_per_second": 8.0}
    return {
        "command": f"python -m timm_alfa.bench step --model {name} --output /somewhere/{name}",
        "machine": "a machine",
        "input": [4, 3, 32, 32],
        "rows": [{"name": row, "ratio": ratio, "seconds": ratio / 100, **common} for row, ratio in rows],
        "left_out": {},
    }


def test_tables_are_made_of_the_records(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    one = record("test_resnet", ("plain", 1.0), ("ALFA PGD-1, layer4", 1.04), ("ALFA PGD-5, layer4", 1.08))
    one["rows"] += record("", ("AdvProp PGD-1", 2.7), ("AdvProp PGD-5", 5.4))["rows"]
    two = record("test_resnet", ("plain", 1.1), ("L-ALFA PGD-1, 5 blocks", 3.25))
    for name, found in (("test_resnet-eager", one), ("test_resnet-stages-eager", two)):
        (folder / f"{name}.json").write_text(json.dumps(found))
    outcomes = [Outcome("tests", "failed", 12.3, "1 failed | 5 passed"), Outcome("test_resnet-eager", "done", 9.0)]
    write_report(tmp_path, "a machine", PARTS, outcomes)
    page = (tmp_path / "README.md").read_text()
    assert "| `test_resnet`, 4 | 10.0 | 1.04 | 1.08 | 3.25, 5 | 2.70, 5.40 |" in page
    assert "| tests | failed | 12 | 1 failed / 5 passed |" in page
    assert "Compiled" not in page
    table = (tmp_path / "test_resnet.md").read_text()
    assert table.count("| plain | 1.000 |") == table.count("| plain | 1.100 |") == 1
    assert "/somewhere" not in table
    assert len((tmp_path / "step.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--minutes", "0"], "--minutes 0.0: expected a time above 0"),
        (["--parts", "tables"], "argument --parts: invalid choice: 'tables'"),
        (["--device", "cuda:x"], "--device cuda:x: not a device"),
    ],
)
def test_mistakes(flags: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("gpu", command.main, ["--output", str(tmp_path / "out"), *flags])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"timm_alfa.bench gpu: error: {expected}")
    assert not (tmp_path / "out").exists()


def test_without_tests_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "TESTS", tmp_path / "tests")
    with pytest.raises(UsageError, match="--parts tests: there are no tests beside this package"):
        command.main(["--smoke", "--output", str(tmp_path / "out")])


def test_a_part_is_cut_off_at_its_limit_and_a_refusal_is_told(tmp_path: Path) -> None:
    wrong = Part("wrong", "eager", ("--model", "test_resnet", "--blocks", "layer9"), 600)
    log = tmp_path / "wrong.log"
    found = run_part(wrong, log, tmp_path / "wrong", 600)
    assert found.state == "refused"
    assert found.detail.startswith("timm_alfa.bench step: error: --blocks layer9: no block is called 'layer9'")
    endless = Part("endless", "eager", ("--model", "test_resnet", "--rounds", "1000000", "--no-memory"), 2)
    assert run_part(endless, log, tmp_path / "endless", 600).state == "cut off"
    assert run_part(endless, log, tmp_path / "endless", 1).state == "left"
    missing = Part("tests", "tests", (str(tmp_path / "no_such_test.py"), "-n0"), 600)
    found = run_part(missing, log, tmp_path / "tests", 600)
    assert found.state == "failed"
    assert "no_such_test.py" in log.read_text()


@pytest.mark.slow
def test_the_trial_runs_everything_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--smoke", "--minutes", "60", "--output", str(tmp_path)]
    command.main([*flags, "--parts", "tests", "eager"])
    assert "5 of 5 parts done" in capsys.readouterr().out
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    command.main(flags)
    printed = capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in logs.items())
    tried = [json.loads(line)["name"] for line in (tmp_path / command.STATE).read_text().splitlines()[1:]]
    assert sorted(tried) == sorted(NAMES)  # each once
    assert "failed" not in printed
    assert "cut off" not in printed
    assert printed.count(": refused") == 4  # there is no CUDA graph on a CPU
    assert all(f"{name}: done" in printed for name in NAMES if name.endswith("compiled"))
    page = (tmp_path / "README.md").read_text()
    assert page.count("| `test_resnet`, 4 |") == page.count("| `test_convnext`, 4 |") == 2
    assert (tmp_path / "test_resnet.md").read_text().count("| AdvProp PGD-5 |") == 2
    assert "3 passed" in page
