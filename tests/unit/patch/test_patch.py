"""ALFA's lines in timm's training script: where they go, what the tool refuses, and what the patched script trains."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from summaries import read_summary, reproducible_summary
from test_train_oracle import CASES, COMMON, _weights
from timm.task import ClassificationTask, LogitDistillationTask, MultiLabelClassificationTask
from training_images import make_image_folder

from timm_alfa import AlfaDistillationTask, AlfaTask, UsageError, train
from timm_alfa import script as script_lines
from timm_alfa.export import export_model
from timm_alfa.patch.command import main, patch, show_diff, unpatch

ROOT = Path(__file__).parents[3]
STAND_IN = Path(__file__).parents[3] / "tests" / "helpers" / "stand_in_train.py"
SOURCE = STAND_IN.read_bytes()
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
ALFA = "--alfa-blocks @stages --alfa-steps 2 --alfa-learnable --alfa-gamma 0.5 --alfa-alpha 1/255"
RUN = (
    "--model test_resnet --img-size 32 --num-classes 3 --batch-size 8 --epochs 2 --workers 0 --no-aug --sched none "
    "--opt adamw --lr 1e-3 --drop-path 0.1 --model-ema --model-ema-decay 0.9 --seed 3 --device cpu --val-split="
)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_bytes(SOURCE)
    path.chmod(0o755)
    return path


def _tool(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return captured.out, captured.err


def _insertions(diff: str) -> dict[int, str]:
    """Read a diff of one-line insertions: what is inserted after which line."""
    header, *hunks = re.split(r"^(?=@@ )", diff, flags=re.MULTILINE)
    assert re.fullmatch(r"For the file with sha256 [0-9a-f]{64}\n--- (\S+)\n\+\+\+ \1\n", header)
    insertions = {}
    for earlier, hunk in enumerate(hunks):
        match = re.fullmatch(r"@@ -(\d+),0 \+(\d+) @@\n\+(.*\n)", hunk)
        assert match, hunk
        assert int(match[2]) == int(match[1]) + earlier + 1
        insertions[int(match[1])] = match[3]
    return insertions


def test_the_lines_and_their_places():
    inserted = _insertions(show_diff(SOURCE, patch(SOURCE), "train.py"))
    lines = SOURCE.decode().splitlines()
    assert [(lines[number - 1].strip(), line.strip()) for number, line in inserted.items()] == [
        (")", "import timm_alfa.script"),
        ('parser.add_argument("--kd-model-name", default=None)', "timm_alfa.script.add_arguments(parser)"),
        ("args = parser.parse_args(remaining)  # the rest", "timm_alfa.script.check_arguments(args)"),
        (")", "task = timm_alfa.script.wrap_task(args, task, data_config)"),
        (
            "train_metrics = train_one_epoch(epoch, loader_train, optimizer, task)",
            "train_metrics.update(timm_alfa.script.epoch_metrics(args, task, output_dir))",
        ),
    ]


def test_the_diff_makes_the_patched_script():
    lines = SOURCE.decode().splitlines(keepends=True)
    for number, line in sorted(_insertions(show_diff(SOURCE, patch(SOURCE), "train.py")).items(), reverse=True):
        lines.insert(number, line)
    assert "".join(lines).encode() == patch(SOURCE)


def test_other_names_and_no_data_config():
    source = SOURCE.replace(b"data_config", b"data").replace(b"data = resolve_data_config(", b"data = my_config(")
    source = re.sub(rb"\btask\b(?=[ .,)])(?! import)", b"job", source.replace(b"timm.task", b"TASKS"))
    source = re.sub(rb"\bparser\b", b"flags", source.replace(b"TASKS", b"timm.task"))
    source = source.replace(b"args", b"opts").replace(b"parse_opts(", b"parse_args(")
    added = [line.strip() for line in _insertions(show_diff(source, patch(source), "x")).values()]
    assert added[1:4] == [
        "timm_alfa.script.add_arguments(flags)",
        "timm_alfa.script.check_arguments(opts)",
        "job = timm_alfa.script.wrap_task(opts, job)",
    ]


@pytest.mark.parametrize(
    "source",
    [
        SOURCE.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + SOURCE,
        b"# -*- coding: latin-1 -*-\n# caf\xe9\n" + SOURCE.replace(b"train_metrics", b"m\xe9triques"),
        SOURCE.replace(b"    ", b"\t"),
        SOURCE.rstrip(b"\n"),
    ],
    ids=["crlf", "bom", "latin-1", "tabs", "no-newline-at-end"],
)
def test_any_encoding_and_layout_goes_there_and_back(source: bytes):
    patched = patch(source)
    compile(patched, "train.py", "exec")
    assert unpatch(patched) == source
    assert patch(patched) == patched
    assert patched.count(b"\r\n") in (0, patched.count(b"\n"))
    assert b"\xef\xbb\xbf" not in patched[3:]


def test_nothing_is_written_without_being_asked(script: Path, capsys: pytest.CaptureFixture[str]):
    out, err = _tool(script, capsys=capsys)
    assert out == show_diff(SOURCE, patch(SOURCE), "train.py")
    assert "--write" in err
    assert script.read_bytes() == SOURCE
    assert list(script.parent.iterdir()) == [script]


def test_write_and_revert(script: Path, capsys: pytest.CaptureFixture[str]):
    backup = script.with_name("train.py.orig")
    _tool(script, "--write", capsys=capsys)
    assert (script.read_bytes(), backup.read_bytes()) == (patch(SOURCE), SOURCE)
    assert script.stat().st_mode & 0o777 == backup.stat().st_mode & 0o777 == 0o755

    out, err = _tool(script, "--write", capsys=capsys)
    assert out == ""
    assert "already" in err
    assert (script.read_bytes(), backup.read_bytes()) == (patch(SOURCE), SOURCE)

    out, err = _tool(script, "--revert", capsys=capsys)
    assert [line for line in out.splitlines()[3:] if line[0] == "+"] == []
    assert script.read_bytes() == SOURCE
    assert list(script.parent.iterdir()) == [script]
    assert "nothing to do" in _tool(script, "--revert", capsys=capsys)[1]


def test_what_was_changed_since_survives_a_revert(script: Path, capsys: pytest.CaptureFixture[str]):
    _tool(script, "--write", capsys=capsys)
    script.write_bytes(script.read_bytes().replace(b"# the ordinary task\n", b"# mine\n"))
    assert "already" in _tool(script, capsys=capsys)[1]
    _tool(script, "--revert", capsys=capsys)
    assert script.read_bytes() == SOURCE.replace(b"# the ordinary task\n", b"# mine\n")
    assert script.with_name("train.py.orig").read_bytes() == SOURCE


def test_the_file_behind_a_link_is_written(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    link = tmp_path / "link.py"
    link.symlink_to(script)
    _tool(link, "--write", capsys=capsys)
    assert link.is_symlink()
    assert script.read_bytes() == patch(SOURCE)


PATCHED = patch(SOURCE)
REFUSED = {
    "not python": (b"# readme\nthis is a text\n", "not a Python file"),
    "empty": (b"", "timm.task"),
    "no tasks": (SOURCE.replace(b"from timm.task", b"from tasks"), "timm.task"),
    "no parser": (SOURCE.replace(b"parse_args(remaining)", b"parse(remaining)"), "parser.parse_args"),
    "another parser": (SOURCE.replace(b"args = parser.parse_args", b"args = flags.parse_args"), "flags = argparse"),
    "nameless parser": (SOURCE.replace(b"args = parser.parse_args", b"args = get().parse_args"), "plain name"),
    "no task": (SOURCE.replace(b"task = ClassificationTask", b"task = create_task"), "found 0 times"),
    "two tasks": (SOURCE.replace(b"task = LogitDistillationTask(", b"task = ClassificationTask("), "found 2 times"),
    "arguments elsewhere": (
        SOURCE.replace(b"args, args_text = _parse_args()", b"opts, args_text = _parse_args()"), "arguments as args"),
    "optimizer first": (SOURCE.replace(b"model = task.get_trainable_module()", b"pass"), "taken from the task"),
    "no training": (SOURCE.replace(b"= train_one_epoch(", b"= train("), "train_one_epoch"),
    "no folder": (SOURCE.replace(b"output_dir = utils.get_outdir", b"output_dir = os.path.join"), "get_outdir"),
    "shared line": (SOURCE.replace(b"  # the rest", b"; ready = True"), "shares its line"),
    "some lines": (PATCHED.replace(b"    timm_alfa.script.check_arguments(args)\n", b""), "--revert"),
    "lines elsewhere": (b"import timm_alfa.script\n" + PATCHED.replace(b")\nimport timm_alfa.script\n", b")\n"),
                        "--revert"),
    "lines of another hand": (PATCHED.replace(b"(parser)", b"(group)  # here"), "by hand"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_understood_is_left_alone(case: str, script: Path, capsys: pytest.CaptureFixture[str]):
    content, reason = REFUSED[case]
    assert content not in (SOURCE, PATCHED)
    script.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        main([str(script), "--write"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert str(script) in captured.err
    assert reason in captured.err
    assert script.read_bytes() == content
    assert list(script.parent.iterdir()) == [script]


def test_lines_in_disorder_can_be_reverted(script: Path, capsys: pytest.CaptureFixture[str]):
    for case in ("some lines", "lines elsewhere"):
        script.write_bytes(REFUSED[case][0])
        _tool(script, "--revert", capsys=capsys)
        assert script.read_bytes() == SOURCE
    with pytest.raises(UsageError, match="by hand"):
        unpatch(REFUSED["lines of another hand"][0])


@pytest.mark.parametrize("missing", [True, False])
def test_files_that_cannot_be_had(missing: bool, script: Path, capsys: pytest.CaptureFixture[str]):
    script.with_name("train.py.orig").write_bytes(b"precious")
    with pytest.raises(SystemExit) as caught:
        main([str(script.with_name("none.py") if missing else script), "--write"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("No such file" if missing else "train.py.orig is there already") in line
    assert script.read_bytes() == SOURCE
    assert script.with_name("train.py.orig").read_bytes() == b"precious"


# The patched stand-in, run in this process.

# timm leaves its image files to the garbage collector
needs_image_files = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def patched(script: Path) -> Path:
    script.write_bytes(PATCHED)
    return script


def _run(script: Path, output: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--output", str(output), "--experiment", "run"])
    runpy.run_path(str(script), run_name="__main__")
    return _checkpoint(output / "run")


def _checkpoint(folder: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        checkpoint: dict[str, Any] = torch.load(folder / "last.pth.tar", weights_only=True)
    return checkpoint


def _assert_same_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("state_dict", "state_dict_ema"):
        assert one[key].keys() == other[key].keys()
        for name, tensor in one[key].items():
            assert torch.equal(other[key][name], tensor), (key, name)


@needs_image_files
def test_without_its_flags_the_script_does_what_it_did(
    patched: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--data-dir", str(images), *RUN.split()]
    before = _run(STAND_IN, tmp_path / "before", arguments, monkeypatch)
    after = _run(patched, tmp_path / "after", arguments, monkeypatch)
    _assert_same_weights(before, after)
    assert before.keys() == after.keys()
    assert read_summary(tmp_path / "before" / "run") == read_summary(tmp_path / "after" / "run")
    assert not (tmp_path / "after" / "run" / "eta.csv").exists()


@needs_image_files
def test_with_them_it_trains_as_our_command_does(
    patched: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--data-dir", str(images), *RUN.split(), *ALFA.split()]
    theirs = _run(patched, tmp_path / "script", arguments, monkeypatch)
    train.main([*arguments, "--output", str(tmp_path / "ours"), "--experiment", "run"])
    ours = _checkpoint(tmp_path / "ours" / "run")
    _assert_same_weights(theirs, ours)
    assert torch.equal(theirs["task_state"]["eta"]["eta"], ours["task_state"]["eta"]["eta"])

    folders = tmp_path / "script" / "run", tmp_path / "ours" / "run"
    for row, expected in zip(*map(reproducible_summary, folders), strict=True):
        shown = {name: value for name, value in row.items() if name.startswith("train_")}
        assert {"train_loss_adv", "train_eta_layer4", "train_delta_l2_layer4"} < shown.keys()
        assert shown == {name: value for name, value in expected.items() if name.startswith("train_")}
    assert (folders[0] / "eta.csv").read_text() == (folders[1] / "eta.csv").read_text()

    plain = _run(patched, tmp_path / "plain", ["--data-dir", str(images), *RUN.split()], monkeypatch)
    assert any(not torch.equal(plain["state_dict"][name], tensor) for name, tensor in theirs["state_dict"].items())


@needs_image_files
def test_with_a_teacher_it_trains_as_our_command_does(
    patched: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(5)
    export_model(timm.create_model("test_resnet", num_classes=3), tmp_path / "teacher")
    arguments = ["--data-dir", str(images), *RUN.split(), "--kd-model-name", f"local-dir:{tmp_path / 'teacher'}"]
    off = _run(patched, tmp_path / "off", arguments, monkeypatch)
    _assert_same_weights(_run(STAND_IN, tmp_path / "before", arguments, monkeypatch), off)
    arguments += ALFA.split()
    theirs = _run(patched, tmp_path / "script", arguments, monkeypatch)
    train.main([*arguments, "--kd-temperature", "1", "--output", str(tmp_path / "ours"), "--experiment", "run"])
    _assert_same_weights(theirs, _checkpoint(tmp_path / "ours" / "run"))
    assert any(not torch.equal(off["state_dict"][name], tensor) for name, tensor in theirs["state_dict"].items())


def test_other_tasks_of_timms_are_wrapped_by_their_kind(capsys: pytest.CaptureFixture[str]):
    parser = ArgumentParser()
    script_lines.add_arguments(parser)
    args = parser.parse_args(["--alfa-blocks", "layer4", "--alfa-objective", "kl"])
    script_lines.check_arguments(args)
    model = timm.create_model("test_resnet", num_classes=3)
    labels = script_lines.wrap_task(args, MultiLabelClassificationTask(model, threshold=0.3, verbose=False))
    assert isinstance(labels, AlfaTask)
    assert (labels.multi_label, labels.threshold, labels.objective.multi_label) == (True, 0.3, True)
    teacher = timm.create_model("test_resnet", num_classes=3)
    taught = script_lines.wrap_task(args, LogitDistillationTask(model, teacher, verbose=False))
    assert isinstance(taught, AlfaDistillationTask)

    class Own(ClassificationTask):
        """Of somebody else."""

    with pytest.raises(SystemExit):
        script_lines.wrap_task(args, Own(model, verbose=False))
    assert "needs one of timm's tasks for classification, independent labels or distillation, not Own" in (
        capsys.readouterr().err
    )


@needs_image_files
@pytest.mark.parametrize("flags", ["", "--alfa-blocks layer4 --alfa-eps 0.01 --alfa-init uniform"])
def test_the_saved_arguments_are_a_configuration(
    flags: str, patched: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["--data-dir", str(images), *RUN.split(), "--epochs", "1", *flags.split()]
    first = _run(patched, tmp_path / "first", arguments, monkeypatch)
    saved = tmp_path / "first" / "run" / "args.yaml"
    assert yaml.safe_load(saved.read_text())["method"] == ("alfa" if flags else "standard")
    second = _run(patched, tmp_path / "second", ["--config", str(saved)], monkeypatch)
    _assert_same_weights(first, second)
    assert vars(first["args"]) | {"output": ""} == vars(second["args"]) | {"output": ""}


@needs_image_files
def test_a_configuration_is_read_as_the_command_line_is(
    patched: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tmp_path / "config.yaml"
    config.write_text("alfa_blocks: layer4\nalfa_alpha: 1/255\nalfa_steps: 2\nepochs: 1\n")
    checkpoint = _run(patched, tmp_path, ["--config", str(config), "--data-dir", str(images)], monkeypatch)
    args = checkpoint["args"]
    assert (args.alfa_blocks, args.alfa_alpha, args.alfa_steps) == (["layer4"], 1 / 255, 2)


MISTAKES = {
    "--alfa-blocks layer9": "--alfa-blocks layer9",
    "--alfa-blocks layer4 --alfa-steps 0": "--alfa-steps 0",
    "--alfa-steps 2": "without --alfa-blocks",
    "--method pgd-at --kd-model-name resnet18": "--kd-model-name resnet18: does not go with --method pgd-at",
    "--alfa-blocks layer4 --torchscript": "--torchscript: does not go with",
    "--alfa-list-blocks": "unrecognized arguments",
    "alfa_blocks: [layer4]\nalfa_steps: 2.5": "--alfa-steps: invalid int value: '2.5'",
    "alfa_blocks: [layer4]\nalfa_norm: l3": "--alfa-norm: invalid choice: 'l3'",
    "alfa_blocks: []": "--alfa-blocks: expected at least one argument",
    "alfa_blocks: [layer4]\nalfa_learnable: 'yes'": "--alfa-learnable: ignored explicit argument 'yes'",
    "alfa_blocks: [layer4, --epochs]": "unrecognized arguments: --epochs",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_script_with_one_line(
    mistake: str,
    patched: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    arguments = mistake.split()
    if ":" in mistake:
        (tmp_path / "config.yaml").write_text(mistake)
        arguments = ["--config", str(tmp_path / "config.yaml")]
    with pytest.raises(SystemExit) as caught:
        _run(patched, tmp_path / "output", ["--data-dir", str(images), *arguments], monkeypatch)
    assert caught.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train.py: error: ")
    assert MISTAKES[mistake] in line
    assert not (tmp_path / "output").exists()


# The patches in the repository, and timm's own script.


def test_patches_insert_lines_and_nothing_else():
    assert len(PATCHES) == 2
    for path in PATCHES:
        inserted = _insertions(path.read_text())
        assert len(inserted) == 5
        assert all("timm_alfa.script" in line for line in inserted.values())
        assert "--- train.py\n" in path.read_text()


def test_the_table_has_every_patch_with_the_sha256_of_its_script():
    table = (ROOT / "patches" / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[`(.*?)`\]\(\1\) .*\| `([0-9a-f]{64})` \|", table, flags=re.MULTILINE))
    expected = {path.name: re.findall(r"sha256 ([0-9a-f]{64})", path.read_text())[0] for path in PATCHES}
    assert rows == expected


needs_timm_script = pytest.mark.skipif(
    "TIMM_TRAIN_PY" not in os.environ, reason="TIMM_TRAIN_PY names no copy of timm's train.py"
)


@needs_timm_script
def test_the_patch_of_timms_script_is_what_the_tool_makes():
    source = Path(os.environ["TIMM_TRAIN_PY"]).read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    (committed,) = [text for text in (path.read_text() for path in PATCHES) if digest in text]
    assert show_diff(source, patch(source), "train.py") == committed
    assert unpatch(patch(source)) == source


@needs_timm_script
@pytest.mark.parametrize("case", CASES)
def test_timms_script_patched(case: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    original, patched = Path(os.environ["TIMM_TRAIN_PY"]), tmp_path / "train.py"
    patched.write_bytes(patch(original.read_bytes()))
    flags, alfa = COMMON + CASES[case] + " --epochs 2", f" {ALFA} --alfa-bn clean"
    off = _weights(patched, flags, images, tmp_path / "off")
    _assert_same_weights(_weights(original, flags, images, tmp_path / "timm"), off)
    on = _weights(patched, flags + alfa, images, tmp_path / "on")
    _assert_same_weights(_weights(ROOT / "train_alfa.py", flags + alfa, images, tmp_path / "ours"), on)
    assert any(not torch.equal(off["state_dict"][name], tensor) for name, tensor in on["state_dict"].items())
    assert read_summary(tmp_path / "on/run") == reproducible_summary(tmp_path / "ours/run")  # timm records no cost
