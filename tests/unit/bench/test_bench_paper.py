"""The paper's experiments as commands: the list of runs, their processes, and the report."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from launch import ROOT
from matplotlib.figure import Figure
from PIL import Image

from timm_alfa.bench.common import run
from timm_alfa.bench.paired import compare_pairs, t_quantile, t_within
from timm_alfa.bench.paper import command as paper
from timm_alfa.bench.paper import jobs as paper_jobs
from timm_alfa.bench.paper.jobs import Job, append_result, read_results, run_all
from timm_alfa.bench.paper.report import lines_of, write_report
from timm_alfa.bench.paper.runs import TUNED, Run
from timm_alfa.bench.paper.sheets import RUNS, SHEETS
from timm_alfa.train import main as train
from timm_alfa.train.arguments.command_line import parse_args


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of 32x32 for each of two classes to train on, two to test on."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 11])
def test_students_t(degrees: int):
    for t in (0.0, 0.1, 1.0, 2.5, 20.0):
        assert t_within(t, degrees) == pytest.approx(1 - 2 * scipy.stats.t.sf(t, degrees), abs=1e-12)
    assert t_quantile(0.975, degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-9)


def test_paired_differences():
    differences = [0.3, -0.1, 0.4, 0.2, 0.5]
    expected = scipy.stats.ttest_1samp(differences, 0)
    interval = expected.confidence_interval()
    result = compare_pairs(differences)
    assert (result.count, result.mean) == (5, pytest.approx(0.26))
    assert (result.low, result.high, result.p) == pytest.approx((interval.low, interval.high, expected.pvalue))
    single = compare_pairs([0.5])
    assert single.mean == 0.5
    assert math.isnan(single.p)
    assert compare_pairs([0.0, 0.0]).p == 1
    assert compare_pairs([0.5, 0.5]).p == 0


def test_every_table_and_figure_is_there():
    assert list(SHEETS) == [f"table {n}" for n in range(1, 11)] + [f"figure {n}" for n in (2, 3, 4)] + ["controls"]
    for sheet in SHEETS.values():
        for row in sheet.rows:
            assert RUNS[row.run.name] == row.run  # a name means one run everywhere
            assert not row.run.plain or RUNS[row.run.plain].plain == ""


@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_a_command(name: str):
    chosen = RUNS[name]
    args = parse_args(["--config", chosen.recipe, *chosen.flags])
    assert args.test_split
    if name.endswith("-alfa") and chosen.dataset == "cifar10":
        assert (args.alfa_alpha, args.alfa_steps) == (float(TUNED[name.split("-")[1]]) / 255, 5)
    if chosen.plain == "":
        assert args.method == "standard"


@pytest.mark.parametrize(
    ("name", "epochs", "expected"),
    [
        ("cifar10-resnet20s", None, ""),
        ("cifar10-resnet20s", 30, "--epochs 30 --decay-milestones 8 22 --warmup-updates 30"),
        ("cifar10-resnet20s", 1, "--epochs 1 --decay-milestones 1 2 --warmup-updates 1"),
        ("imagenet-resnet50", 45, "--epochs 45 --decay-epochs 15"),
    ],
)
def test_schedules_are_scaled_in_proportion(name: str, epochs: int | None, expected: str):
    assert " ".join(paper.scaled_schedule(RUNS[name], epochs)) == expected


def test_list_prints_commands_that_can_be_run(images: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        paper.main(["--table", "2", "--only", "*20s*", "--seeds", "3", "--epochs", "2", "--data-dir", str(images),
                    "--list", "--", "--amp"])  # fmt: skip
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "# Table 2: CIFAR-10\n\n## cifar10-resnet20s, plain (paper: 91.25): cifar10-resnet20s\n" in text
    commands = [line.split() for line in text.splitlines() if line.startswith("python ")]
    assert [command[:3] for command in commands] == [["python", "-m", "timm_alfa.train"]] * 2
    args = parse_args(commands[1][3:])
    assert (args.seed, args.epochs, args.amp, args.data_dir) == (3, 2, True, str(images))
    assert args.alfa_steps == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--table 2 --only none*", "--only none*: none of the runs has such a name"),
        (
            "--table 3 --data-dir x",
            "--data-dir x: the runs need several datasets; say which it is: cifar100=DIR imagenet",
        ),
        ("--table 2 --data-dir mnist=x", "--data-dir mnist=x: expected cifar10=DIR, cifar100=DIR or imagenet=DIR"),
        ("--table 2", "--data-dir: cifar10 is missing, expected cifar10=DIR"),
        (
            "--table 2 --data-dir nowhere",
            "--data-dir cifar10=nowhere: expected a folder 'train' of images per class in it, "
            "or torchvision's cifar-10-batches-py",
        ),
        ("--table 2 --jobs 0", "--jobs 0: expected a whole number of at least 1"),
        ("--table 2 --list -- --epoch-s 3", "unrecognized arguments: --epoch-s (nearest: --epochs"),
        ("--table 2 --list -- --test-split=", "--test-split '': the runs' results are those of the test split"),
        ("--report --output nowhere", "--report: no results of these runs in nowhere"),
        ("--table 2 --against cifar10-resnet20s-alfa", "--against cifar10-resnet20s-alfa: is for --report"),
        ("--report --against alfa", "--against alfa: there is no such run; --list shows the names"),
        (
            "--report --against cifar10-resnet20s-alfa --output nowhere",
            "--against cifar10-resnet20s-alfa: no results of this run in nowhere",
        ),
        ("--table 11", "argument --table: invalid choice: '11'"),
    ],
)
def test_mistakes_are_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        run("paper", paper.main, flags.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_torchvision_keeps_is_found(tmp_path: Path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    sheets = {"table 2": SHEETS["table 2"]}
    assert paper.data_folders([f"cifar10={tmp_path}"], sheets, needed=True) == {
        "cifar10": ["--data-dir", str(tmp_path), "--dataset", "torch/cifar10"]
    }


def test_a_result_line_that_was_cut_short_is_left_out(tmp_path: Path):
    append_result(tmp_path, {"run": "a"})
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"run": "b", "see')
    append_result(tmp_path, {"run": "c"})
    assert [record["run"] for record in read_results(tmp_path)] == ["a", "c"]
    assert (tmp_path / "results.jsonl").read_bytes().endswith(b'}\n{"run": "b", "see\n{"run": "c"}\n')


FINISH = """
import json, pathlib, sys, time
folder = pathlib.Path({folder!r})
folder.mkdir(parents=True)
(folder / "summary.csv").write_text("epoch,train_delta_ratio_layer3\\n0,0.5\\n3,0.25\\n")  # --val-interval 3
(folder / "environment.yaml").write_text("{{hardware: half a machine, torch: 2.1, timm: 1.2, timm-alfa: 0.3}}")
meet = [folder.parent / name for name in {meet!r}]
deadline = time.monotonic() + 60
while not all(path.exists() for path in meet) and time.monotonic() < deadline:
    time.sleep(0.01)
(folder / "test.json").write_text(json.dumps({{"top1": 50.0, "loss": 1.0, "epoch": 1, "validation": 51.0}}))
sys.exit(0 if all(path.exists() for path in meet) else 3)
"""


def _stub(monkeypatch: pytest.MonkeyPatch, meet: list[Job], fail: str = "") -> None:
    """Makes jobs end quickly: ``fail`` fails, the others wait for all of ``meet`` to have been started."""

    def command(self: Job, output: Path) -> list[str]:
        if self.run == fail:
            return [sys.executable, "-c", "print('no luck'); raise SystemExit(7)"]
        text = FINISH.format(folder=str(output / self.name), meet=[job.name for job in meet])
        return [sys.executable, "-c", text]

    monkeypatch.setattr(Job, "command", command)


def _jobs(*runs: str) -> list[Job]:
    return [Job(run, 0, "", ("--config", run, "--seed", "0"), ()) for run in runs]


def test_several_runs_at_a_time_and_none_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs = _jobs("a", "b")
    _stub(monkeypatch, meet=jobs)
    assert run_all(jobs, tmp_path, at_once=2) == []
    results = read_results(tmp_path)
    assert {(record["run"], record["top1"], record["best_epoch"]) for record in results} == {("a", 50, 1), ("b", 50, 1)}
    assert all(record["delta_ratio"] == {"layer3": 0.25} for record in results)
    assert all(record["seconds_per_epoch"] > 0 for record in results)
    machine = "half a machine, torch 2.1, timm 1.2, timm-alfa 0.3, 2 runs at a time"  # the run's, not this process's
    assert all(record["machine"] == machine for record in results)
    assert paper_jobs._epochs_done(tmp_path / jobs[0].name) == 4
    monkeypatch.setattr(paper_jobs, "_start", None)
    assert run_all(jobs, tmp_path, at_once=2) == []


def test_a_run_that_fails_stops_no_other_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    jobs = _jobs("a", "b")
    _stub(monkeypatch, meet=[], fail="a")
    assert run_all(jobs, tmp_path, at_once=1) == jobs[:1]
    assert "a-seed0-" in (text := capsys.readouterr().out)
    assert "failed, ended with code 7: no luck (see " in text
    assert [record["run"] for record in read_results(tmp_path)] == ["b"]


@pytest.mark.skipif(os.name != "posix", reason="the lock is a POSIX one")
def test_a_run_that_another_program_trains_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (job,) = _jobs("a")
    _stub(monkeypatch, meet=[])
    (tmp_path / "logs").mkdir()
    with open(tmp_path / "logs" / f"{job.name}.log", "ab") as log:
        holder = "import fcntl, sys; fcntl.flock(1, fcntl.LOCK_EX); print(file=sys.stderr); sys.stdin.read()"
        process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=log,
                                   stderr=subprocess.PIPE)  # fmt: skip
    assert process.stderr.readline() == b"\n"  # it holds the lock
    assert run_all([job], tmp_path, at_once=1) == [job]
    assert "another program is training it" in capsys.readouterr().out
    process.communicate()
    assert run_all([job], tmp_path, at_once=1) == []


def _record(run: str, seed: int, top1: float, **changed) -> dict:
    return {"run": run, "seed": seed, "setting": "", "top1": top1, "seconds_per_epoch": 2.0, "machine": "a machine",
            "delta_ratio": {"layer2": 0.5, "layer3": 0.25} if "alfa" in run else {},
            "command": f"train {run} {seed}", **changed}  # fmt: skip


def test_lines_pair_seeds_and_keep_the_papers_numbers():
    base = "cifar10-resnet20s"
    records = [_record(base, 0, 80.0), _record(base, 1, 81.0), _record(base, 2, 99.0),
               _record(f"{base}-alfa", 0, 80.5, delta_ratio={"layer3": math.nan}), _record(f"{base}-alfa", 1, 70.0),
               _record(f"{base}-alfa", 1, 81.5, seconds_per_epoch=None)]  # fmt: skip
    plain, alfa, *others = lines_of(SHEETS["table 2"], records)
    assert (plain.paper, plain.gain, plain.paper_gain) == (91.25, None, None)
    assert plain.top1 == {0: 80.0, 1: 81.0, 2: 99.0}
    assert alfa.top1 == {0: 80.5, 1: 81.5}  # the last result of a seed
    assert (alfa.gain.count, alfa.gain.mean) == (2, 0.5)
    assert alfa.paper_gain == pytest.approx(1.27)
    assert alfa.seconds == 2.0
    assert alfa.delta == 0.25  # of the seeds that have one
    assert not any(line.top1 for line in others)


@pytest.mark.parametrize("key", ["controls", "table 2"])
def test_gains_over_a_control(key: str):
    base = "cifar10-resnet20s"
    top1 = {
        base: (80.0, 81.0),
        f"{base}-alfa": (81.5, 82.0),
        f"{base}-alfa-delta0": (81.0, 81.0),
        "cifar10-resnet56s": (90.0, 90.0),
    }
    records = [_record(name, seed, value) for name, values in top1.items() for seed, value in enumerate(values)]
    sheet = SHEETS[key]
    lines = zip(sheet.rows, lines_of(sheet, records, against=RUNS[f"{base}-alfa-delta0"]), strict=True)
    gains = {row.run.name: line.gain.mean for row, line in lines if line.gain is not None}
    assert gains == {base: -0.5, f"{base}-alfa": 0.75}  # nothing of another model


def test_the_report_separates_settings(tmp_path: Path):
    base = "cifar10-resnet20s"
    records = [_record(base, 0, 80.0), _record(f"{base}-alfa", 0, 80.25),
               _record(base, 0, 60.0, setting="--epochs 3 --amp", machine="b machine")]  # fmt: skip
    report = write_report({key: SHEETS[key] for key in ("table 2", "table 10")}, records, tmp_path).read_text()
    assert report.count("## Table 2: CIFAR-10") == 2
    assert "Table 10" not in report
    assert "Trained on: a machine; b machine." in report
    assert "| cifar10-resnet20s, ALFA | 92.52 | 80.25 | 1 | +1.27 | +0.25 |  | 0.25 | 2.0 |" in report
    assert "With `--epochs 3 --amp`." in report
    assert "train cifar10-resnet20s-alfa 0\n" in report
    against = write_report({"table 2": SHEETS["table 2"]}, records, tmp_path, against=RUNS[f"{base}-alfa"])
    assert against.name == "report-against-cifar10-resnet20s-alfa.md"
    assert "differences to `cifar10-resnet20s-alfa` with" in against.read_text()
    assert "| cifar10-resnet20s, plain | 91.25 | 80.00 | 1 | -1.27 | -0.25 |  |" in against.read_text()
    assert "Commands" in report
    assert "Commands" not in against.read_text()
    for picture in ("table-2.png", "table-2-epochs-3-amp.png"):
        assert f"]({picture})" in report
        with Image.open(tmp_path / picture) as drawn:
            assert drawn.size[0] > 500


@pytest.mark.parametrize(("top1", "shown"), [(80.0, True), (40.0, False)])
def test_pictures_show_the_papers_numbers_where_they_are_near(
    top1: float, shown: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    records = [_record("cifar10-resnet20s", 0, top1, setting="--epochs 3")]
    write_report({"table 2": SHEETS["table 2"]}, records, tmp_path)
    (figure,) = figures
    assert figure.get_suptitle() == "Table 2: CIFAR-10"
    assert figure.legends[0].get_title().get_text() == "--epochs 3"
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert labels == ["each seed", "our mean", "paper"][: 3 if shown else 2]


def test_a_row_without_results_or_paper_is_left_out(tmp_path: Path):
    base = "cifar10-resnet20s"
    records = [_record(name, seed, top1 + seed) for name, top1 in ((base, 80.0), (f"{base}-wd2", 90.0))
               for seed in range(2)]  # fmt: skip
    report = write_report({"controls": SHEETS["controls"]}, records, tmp_path).read_text()
    rows = [line for line in report.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0] for row in rows] == ["| plain", "| plain, twice the decay"]
    assert "| +10.00 (+10.00 to +10.00) | <0.001 |" in rows[1]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from argparse import Namespace

    with torch.serialization.safe_globals([Namespace]):
        return torch.load(folder / "run" / "last.pth.tar", weights_only=True)["state_dict"]


def test_the_clean_loss_twice_is_twice_the_rate_and_half_the_decay(images: Path, tmp_path: Path):
    suffixes = ("alfa-delta0", "lr2-wd0.5", "lr2")
    for suffix in suffixes:
        chosen = RUNS[f"cifar10-resnet20s-{suffix}"]
        train(["--config", chosen.recipe, *chosen.flags, "--data-dir", str(images), "-b", "6", "--epochs", "2",
               "--workers", "0", "--output", str(tmp_path / suffix), "--experiment", "run"])  # fmt: skip
    twice, same, other = (_weights(tmp_path / suffix) for suffix in suffixes)
    for name, tensor in twice.items():
        torch.testing.assert_close(tensor, same[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(tensor, other[name], rtol=1e-5, atol=1e-6) for name, tensor in twice.items())


def test_a_reader_may_leave_before_the_list_ends():
    command = [sys.executable, "-m", "timm_alfa.bench", "paper", "--list"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"# Table 1: step sizes at the last block, PGD-5\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(os.name != "posix", reason="kills a group of processes")
def test_killed_at_any_moment_it_goes_on(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import fcntl  # not on Windows

    flags = ["--table", "2", "--only", "cifar10-resnet20s", "--seeds", "0", "--epochs", "4", "--data-dir", str(images),
             "--output", str(tmp_path), "--", "-b", "6", "--workers", "0"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen([sys.executable, "-m", "timm_alfa.bench", "paper", *flags], env=environment,
                               start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    while not list(tmp_path.glob("*/last.pth.tar")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with open(next((tmp_path / "logs").iterdir()), "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # the run that it had started is gone, too
    (folder,) = tmp_path.glob("cifar10-*")
    before = len((folder / "summary.csv").read_text().splitlines())
    assert 2 <= before < 5
    assert read_results(tmp_path) == []

    for _ in range(2):  # the second time there is nothing to do
        with pytest.raises(SystemExit) as caught:
            paper.main(flags)
        assert caught.value.code == 0
    assert "1 of 1 runs have results" in capsys.readouterr().out
    epochs = [line.partition(",")[0] for line in (folder / "summary.csv").read_text().splitlines()]
    assert epochs == ["epoch", *map(str, range(4))]
    (record,) = read_results(tmp_path)
    assert record["top1"] == json.loads((folder / "test.json").read_text())["top1"]
    assert record["setting"] == "--epochs 4 -b 6 --workers 0"
    assert Run(record["run"], "").name == "cifar10-resnet20s"
    with pytest.raises(SystemExit) as caught:
        paper.main(["--table", "2", "--report", "--output", str(tmp_path)])
    assert caught.value.code == 0
    assert "| cifar10-resnet20s, plain | 91.25 | " in (tmp_path / "report.md").read_text()
