"""The README's commands parse, its code runs, its flags exist and its links lead somewhere."""

from __future__ import annotations

import csv
import importlib
import inspect
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from training_images import make_image_folder

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.bench import loop, step
from timm_alfa.bench.paper import command as paper
from timm_alfa.export import export_model
from timm_alfa.tasks import alfa, registry
from timm_alfa.tasks.flags import flag_name, number
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import build_parser, parse_args

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHER_PROGRAMS = {
    "--nproc_per_node",
    "--write",
    "--revert",
    "--license",
    "--checkpoint",
    "--ema",
    "--docformat",
    "--output-directory",
}  # torchrun's, pdoc's, and those of the tools for patches and export
START = re.compile(r"(?:train_alfa\.py|-m timm_alfa\.train|timm-alfa-train) ")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def _training_commands() -> list[list[str]]:
    """Arguments of every training command, without what starts the program."""
    lines = "".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(START.split(line, maxsplit=1)[1], comments=True) for line in lines if START.search(line)]


def _digits_command() -> list[str]:
    (command,) = [command for command in _training_commands() if "digits" in command]
    return command


def _line(code: str) -> str:
    return f"line {README[: README.index(code)].count(chr(10))}"


@pytest.fixture
def names() -> dict[str, Any]:
    """What a code block may take for granted."""
    model = timm.create_model("resnet18", channels=(4, 8, 8, 8), num_classes=10, zero_init_last=False)
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    return {
        "model": model,
        "criterion": nn.CrossEntropyLoss(),
        "images": images,
        "target": target,
        "loader": DataLoader([(images, target), (images.flip(0), target.flip(0))], batch_size=None),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "device": torch.device("cpu"),
    }


def test_the_code_blocks_are_found():
    assert len(_blocks("python")) == README.count("```python") >= 4
    assert len(_training_commands()) == 9


# Lightning's own: a renamed function of torch, and advice that does not fit two batches in memory.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.parametrize("code", _blocks("python"), ids=_line)
def test_code_block_runs(code: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for package in ("lightning", "accelerate"):
        if f"import {package}" in code or f"from {package}" in code:
            pytest.importorskip(package, reason="an optional extra, part of the test extra")
    export_model(timm.create_model("resnet20s", num_classes=10), "output/train/digits")
    code = _with_local_weights(code)
    fixture_model = names["model"]
    before = [parameter.detach().clone() for parameter in names["model"].parameters()]
    exec(compile(code, "README.md", "exec"), names)
    if "pretrained=True" in code:
        _assert_fine_tuned(names["model"])
    elif "optimizer.step()" in code or ".fit(" in code:
        assert all(not torch.equal(old, new) for old, new in zip(before, fixture_model.parameters(), strict=True))


def _with_local_weights(code: str) -> str:
    """Code whose published weights are a file of this folder instead of a download."""
    if "pretrained=True" in code:
        torch.manual_seed(0)
        torch.save(timm.create_model("resnet18").state_dict(), "published.pth")
    return code.replace("pretrained=True", 'pretrained=True, pretrained_cfg_overlay={"file": "published.pth"}')


def _assert_fine_tuned(model: nn.Module) -> None:
    """The beginning is as it was published, the rest has been trained from there."""
    published = torch.load("published.pth", weights_only=True)
    for name, value in model.state_dict().items():
        if name.startswith(("conv1", "bn1", "layer1")):
            assert torch.equal(value, published[name]), name
        elif not name.startswith("fc"):
            assert not torch.equal(value, published[name]), name
    assert torch.allclose(model.layer4[1].conv2.weight, published["layer4.1.conv2.weight"], atol=0.02)


def test_the_diff_is_about_the_same_names_as_the_code():
    (diff,) = _blocks("diff")
    added = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    assert 'alfa = AlfaWrapper(model, criterion, blocks=["layer4"])' in added
    assert "loss = loss_fn(alfa(images, target), target).loss" in added


def test_the_diff_applied_runs(names: dict[str, Any]):
    (diff,) = _blocks("diff")
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    exec(compile(code, "README.md", "exec"), names)
    assert torch.isfinite(names["loss"])


@pytest.mark.parametrize("command", _training_commands(), ids=" ".join)
def test_training_command_parses(command: list[str]):
    args = parse_args(command)
    assert registry.is_enabled(args) or args.alfa_list_blocks


def test_paper_commands_parse():
    lines = re.findall(r"^python -m timm_alfa\.bench paper (.*)$", README, flags=re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        assert paper.select(paper.build_parser().parse_args(shlex.split(line)))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_image_folder(tmp_path_factory.mktemp("images"), size=(32, 32))
    shutil.copytree(root / "validation", root / "test")  # which the recipes name
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [command for command in _training_commands() if command != _digits_command()], ids=" ".join
)
def test_training_command_runs(command: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its first steps, on a small folder in place of its data and without a download."""
    command = [word for word in command if word not in ("--pretrained", "--dataset-download")]
    small = [
        "--dataset",
        "",
        "--data-dir",
        str(images),
        "--train-split",
        "train",
        "--val-split",
        "validation",
        "--num-classes",
        "3",
        "--img-size",
        "32",
        "--batch-size",
        "2",
        "--workers",
        "0",
    ]
    if any(word.startswith("vit") for word in command):
        small[small.index("32")] = "224"  # the only size that it takes
    only_listed = "--alfa-list-blocks" in command
    main([*command, *small, "--output", str(tmp_path), *([] if only_listed else ["--alfa-dry-run"])])
    assert ("layer4" if only_listed else "times that") in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["timm-alfa-plot", "timm-alfa-report"])
def test_program_for_a_run_works(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (command,) = re.findall(rf"^{program} (.*)$", "".join(_blocks("bash")), flags=re.MULTILINE)
    folder = tmp_path / command
    folder.mkdir(parents=True)
    (folder / "summary.csv").write_text("epoch,train_loss,eval_top1\n0,2.0,40.0\n1,1.0,50.0\n")
    before = set(folder.iterdir())
    monkeypatch.chdir(tmp_path)
    target = re.search(rf'^{program} = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert target is not None
    importlib.import_module(target[1]).main(shlex.split(command))
    assert set(folder.iterdir()) > before


def test_every_flag_exists():
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", README))
    parsers = (build_parser(), step.build_parser(), loop.build_parser(), paper.build_parser())
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    assert len(mentioned) > 30
    assert mentioned - known - OTHER_PROGRAMS == {"--alfa"}  # as in "`--alfa-*` flags"


def test_every_flag_of_alfa_is_in_the_table_with_its_default_and_argument():
    rows = re.findall(r"^\| `(--alfa-[\w-]+)` \| `(\w+)` \| (.*?) \|", README, flags=re.MULTILINE)
    table = {flag: (argument, default.strip("`")) for flag, argument, default in rows}
    switches = {"--alfa-blocks", "--alfa-learnable"}
    assert (
        table.keys()
        == {flag_name(flag.name) for flag in alfa.FLAGS if flag.name not in ("alfa_blocks", "alfa_learnable")}
        | switches
    )
    signatures = [inspect.signature(item).parameters for item in (AlfaTask, AlfaWrapper, AlfaLoss)]
    for flag, (argument, shown) in table.items():
        assert argument in signatures[0]
        if flag in switches:
            assert shown == "off"
            continue
        default = registry.defaults()[flag[2:].replace("-", "_")]
        assert all(parameters[argument].default == default for parameters in signatures if argument in parameters)
        if isinstance(default, float):
            assert number(shown) == default
        else:
            assert shown == str(default) or (default is None and shown in ("none", "all"))


def test_relative_links_resolve():
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not link.startswith(("http:", "https:", "#"))]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_test_command_is_what_ci_runs():
    (command,) = [block.strip() for block in _blocks("bash") if "pytest" in block]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert command.replace("python3 -m venv", '"${PYTHON:-python3}" -m venv') in script


def test_the_first_command_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main([*_digits_command(), "--epochs", "1", "--img-size", "8", "--output", str(tmp_path)])
    assert (tmp_path / "digits" / "model.safetensors").exists()
    assert capsys.readouterr().out.startswith("--result")


@pytest.mark.slow
def test_the_first_command_reaches_what_the_readme_says(tmp_path: Path):
    main([*_digits_command(), "--output", str(tmp_path)])
    with open(tmp_path / "digits" / "summary.csv", newline="") as file:
        accuracies = [float(row["eval_top1"]) for row in csv.DictReader(file)]
    assert len(accuracies) == 8
    assert max(accuracies) >= 98  # "about 99 %", and room for another machine's rounding
