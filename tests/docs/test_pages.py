"""README and documentation: commands parse, code runs, flags exist, links lead somewhere, the site builds."""

from __future__ import annotations

import csv
import importlib
import inspect
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
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
from timm_alfa.peers import AdvPropTask, FastAdvPropTask, Moex, NoiseTask, PgdTask, PixelAttack
from timm_alfa.tasks import alfa, registry
from timm_alfa.tasks.flags import flag_name
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import build_parser, parse_args

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md")
}
TEXT = "\n".join(PAGES.values())
OTHER_PROGRAMS = {
    "--nproc_per_node",
    "--write",
    "--revert",
    "--license",
    "--checkpoint",
    "--ema",
    "--strict",
}  # torchrun's, mkdocs's, and those of the tools for patches and export
START = re.compile(r"(?:train_alfa\.py|-m timm_alfa\.train|timm-alfa-train) ")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def _training_commands() -> list[list[str]]:
    """Arguments of every training command, without what starts the program."""
    lines = "".join(_blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(START.split(line, maxsplit=1)[1], comments=True) for line in lines if START.search(line)]


def _digits_command() -> list[str]:
    (command,) = [command for command in _training_commands() if "digits" in command]
    return command


def _line(code: str) -> str:
    page = next(name for name, text in PAGES.items() if code in text)
    return f"{page}, line {PAGES[page][: PAGES[page].index(code)].count(chr(10))}"


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
    assert len(_blocks("python")) == TEXT.count("```python") >= 10
    assert len(_training_commands()) >= 14


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
    exec(compile(code, _line(code) if code in TEXT else "page", "exec"), names)
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
    (diff,) = set(_blocks("diff"))
    added = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    assert 'alfa = AlfaWrapper(model, criterion, blocks=["layer4"])' in added
    assert "loss = loss_fn(alfa(images, target), target).loss" in added


def test_the_diff_applied_runs(names: dict[str, Any]):
    (diff,) = set(_blocks("diff"))
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    exec(compile(code, "README.md", "exec"), names)
    assert torch.isfinite(names["loss"])


@pytest.mark.parametrize("command", _training_commands(), ids=" ".join)
def test_training_command_parses(command: list[str]):
    args = parse_args(command)
    assert args.method != "standard" or args.alfa_list_blocks


def test_paper_commands_parse():
    lines = re.findall(r"^python -m timm_alfa\.bench paper (.*)$", TEXT, flags=re.MULTILINE)
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
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", TEXT))
    parsers = (build_parser(), step.build_parser(), loop.build_parser(), paper.build_parser())
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    assert len(mentioned) > 30
    assert mentioned - known - OTHER_PROGRAMS == {"--alfa"}  # as in "`--alfa-*` flags"


def test_the_readmes_table_of_flags_says_what_the_code_says():
    rows = re.findall(r"^\| `(--alfa-[\w-]+)` \| `(\w+)` \| (.*?) \|", README, flags=re.MULTILINE)
    flags = {flag_name(flag.name): flag for flag in alfa.FLAGS}
    assert len(rows) == 5
    for name, argument, default in rows:
        flag = flags[name]
        assert argument == flag.argument
        off = name == "--alfa-blocks" or flag.type is bool
        assert default.strip("`") == ("off" if off else flag.text(flag.default))


@pytest.mark.parametrize("name", registry.METHODS)
def test_a_flags_default_is_that_of_its_argument(name: str):
    """Parser, Python and documentation say the same."""
    method = registry.METHODS[name]
    tasks = {"alfa": (AlfaTask, AlfaWrapper, AlfaLoss), "advprop": (AdvPropTask, PixelAttack),
             "fast-advprop": (FastAdvPropTask, PixelAttack), "noise": (NoiseTask,), "moex": (Moex,),
             "pgd-at": (PgdTask, PixelAttack)}[name]  # fmt: skip
    signatures = [inspect.signature(task).parameters for task in tasks]
    for flag in method.flags:
        if not flag.argument:
            continue
        takers = [parameters[flag.argument] for parameters in signatures if flag.argument in parameters]
        assert takers, flag.name
        for taker in takers:
            default = [taker.default] if flag.nargs == "+" else taker.default
            assert taker.default is inspect.Parameter.empty or default == flag.default or flag.name == "alfa_blocks"


def test_relative_links_resolve():
    for name, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not link.startswith(("http:", "https:", "#")):
                assert ((ROOT / name).parent / link.partition("#")[0]).exists(), f"{name}: {link}"


def test_the_readme_is_for_one_sitting():
    assert len(README.splitlines()) <= 200


def test_the_plain_code_of_the_algorithm_gives_the_packages_loss_and_gradients(names: dict[str, Any]):
    plain, package = (block for block in _blocks("python") if _line(block).startswith("docs/algorithm.md"))
    names["model"].double(), names["model"].train()
    names["images"] = names["images"].double()
    found = []
    for code in (plain, package):
        names["model"].zero_grad()
        exec(compile(code, "algorithm.md", "exec"), names)
        if code is plain:
            names["loss"].backward()
        found.append((names["loss"].detach(), [parameter.grad.clone() for parameter in names["model"].parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_every_test_and_file_that_contributors_are_sent_to_exists():
    text = PAGES["CONTRIBUTING.md"]
    paths = re.findall(r"(?:timm_alfa|tests|docs)/[\w/.]+", text)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path


def test_names_of_the_architecture_page_exist():
    page = PAGES["docs/architecture.md"]
    for path in re.findall(r"`((?:timm_alfa|tests)/[\w/]+\.py)`", page):
        assert (ROOT / path).exists(), path
    where = page.partition("## Where is")[2].partition("## Glossary")[0]
    for row in where.splitlines()[3:]:
        cells = row.split("|")
        paths = re.findall(r"`((?:timm_alfa|tests)/[\w/]+\.py)`", row)
        code = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
        for name in re.findall(r"`([\w.]+)`", cells[2] if len(cells) > 2 else ""):
            last = name.rpartition(".")[2]
            if paths and last not in ("py", "lam") and not name.endswith((".py", ".md")):
                assert re.search(rf"\b{last}\b", code), f"{name} is not in {paths}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="of the docs extra, part of the dev extra")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_equations_tables_of_flags_and_every_public_name(site: Path):
    algorithm = (site / "algorithm.html").read_text(encoding="utf-8")
    assert algorithm.count("<math") > 10
    assert "$$" not in algorithm
    for name, method in registry.METHODS.items():
        page = site / ("hyperparameters.html" if name == "alfa" else f"baselines/{name}.html")
        html = page.read_text(encoding="utf-8")
        assert all(f"<code>{flag_name(flag.name)}</code>" in html for flag in method.flags)
    api = (site / "api.html").read_text(encoding="utf-8")
    for module in ("timm_alfa", "timm_alfa.peers", "timm_alfa.export", "timm_alfa.patch"):
        for name in importlib.import_module(module).__all__:
            item = getattr(importlib.import_module(module), name)
            if callable(item) and name != "main":
                assert re.search(rf'id="[\w.]*\b{name}"', api), f"{module}.{name}"
    assert ":class:" not in api
    assert not re.search(r"<(?:script|link)[^>]+(?:src|href)=.https?:", algorithm)  # nothing is fetched from elsewhere


def test_the_pictures_are_what_their_script_draws(tmp_path: Path):
    pytest.importorskip("matplotlib")
    runpy.run_path(str(ROOT / "docs" / "figures" / "draw.py"))["main"](str(tmp_path))
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (ROOT / "docs" / "images").iterdir())
    for name in drawn:
        new, old = ((folder / name).read_text() for folder in (tmp_path, ROOT / "docs" / "images"))
        assert re.findall(r'viewBox="([^"]+)"', new)[0] == re.findall(r'viewBox="([^"]+)"', old)[0]


def test_the_test_command_is_what_ci_runs():
    command = next(block.strip() for block in _blocks("bash") if "pytest" in block)
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
