"""What the README and the pages of ``docs`` show works: code, commands, flags, links, equations, pictures, the site."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from pages import (
    DOCS,
    PAGES,
    README,
    ROOT,
    anchors,
    blocks,
    command_lines,
    equations,
    links,
    names_in_scope,
    tables,
    text_of,
    training_commands,
)
from torch import nn
from training_images import make_image_folder

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.bench import loop, rounding, step
from timm_alfa.bench.paper import command as paper
from timm_alfa.export import command as export
from timm_alfa.export import export_model
from timm_alfa.patch import main as patch
from timm_alfa.peers import AdvPropTask, FastAdvPropTask, Moex, NoiseTask, PgdTask, PixelAttack
from timm_alfa.robust import command as robust
from timm_alfa.tasks import alfa, registry
from timm_alfa.tasks.flags import Flag, flag_name
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import build_parser, parse_args

ALL = [README, *PAGES]
READ_IN_ORDER = {"algorithm.md"}  # pages whose code blocks go on from one another
OTHER_PROGRAMS = {"--nproc_per_node", "--write", "--revert", "--license", "--checkpoint", "--ema", "--strict"}
STAND_IN = ROOT / "tests" / "helpers" / "stand_in_train.py"
INSTALLS = re.compile(r"pip install (?:-e )?'?\.(?:\[(?P<extras>[\w,]+)\])?'?$")


def _page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _code_blocks() -> list[Any]:
    found = []
    for page in ALL:
        codes = blocks(page, "python")
        if page.name in READ_IN_ORDER:
            codes = ["\n".join(codes)]
        for code in codes:
            line = text_of(page)[: text_of(page).index(code[:60])].count("\n")
            found.append(pytest.param(code, id=f"{_page_id(page)} line {line}"))
    return found


def _hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_code_blocks_are_found():
    for page in ALL:
        assert len(blocks(page, "python")) == text_of(page).count("```python"), page
        assert len(blocks(page, "bash")) == text_of(page).count("```bash"), page
    assert len(_code_blocks()) >= 10
    assert len(training_commands(*ALL)) >= 9


# Lightning's own: a renamed function of torch, and advice that does not fit two batches in memory.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.parametrize("code", _code_blocks())
def test_code_block_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = names_in_scope()
    for package in ("lightning", "accelerate"):
        if f"import {package}" in code or f"from {package}" in code:
            pytest.importorskip(package, reason="an optional extra, part of the test extra")
    if "output/train/digits" in code:
        export_model(timm.create_model("resnet20s", num_classes=10), "output/train/digits")
    if "train.py" in code:
        shutil.copyfile(STAND_IN, "train.py")
    code = _with_local_weights(code)
    fixture_model = names["model"]
    before = [parameter.detach().clone() for parameter in fixture_model.parameters()]
    exec(compile(code, "page", "exec"), names)
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


@pytest.mark.parametrize("command", training_commands(*ALL), ids=" ".join)
def test_training_command_parses(command: list[str]):
    args = parse_args(command)
    assert args.method != "standard" or args.alfa_list_blocks


def test_paper_commands_parse():
    lines = [line for page in ALL for line in command_lines(page) if " timm_alfa.bench paper " in line]
    assert len(lines) == 3
    for line in lines:
        assert paper.select(paper.build_parser().parse_args(shlex.split(line)[4:]))


@pytest.mark.parametrize("page", ALL, ids=_page_id)
def test_every_command_is_one_that_is_tried(page: Path):
    """Training commands and those of the bench are parsed by other tests; the rest is tried below."""
    for line in command_lines(page):
        if training_commands(page) and re.search(r"train_alfa\.py|timm_alfa\.train |timm-alfa-train", line):
            continue
        installs = INSTALLS.fullmatch(line)
        if installs:
            _assert_extras_exist(installs["extras"])
            continue
        known = ("python -m timm_alfa.bench ", "python -m timm_alfa.patch ", "python -m timm_alfa.robust ")
        assert line.startswith((*known, "timm-alfa-plot ", "timm-alfa-report ", "timm-alfa-export ", "python3 -m venv"))


def _assert_extras_exist(extras: str | None) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in (extras or "").split(",") if extras else []:
        assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra


def test_the_extras_that_are_named_are_those_of_the_project():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[project.scripts]")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, flags=re.MULTILINE))
    for page in (README, DOCS / "index.md"):
        (line,) = [line for line in text_of(page).splitlines() if re.match(r"(?:Further e|E)xtras: `", line)]
        assert set(re.findall(r"`(\w+)`", line)) | {"digits"} == extras


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_image_folder(tmp_path_factory.mktemp("images"), size=(32, 32))
    shutil.copytree(root / "validation", root / "test")  # which the recipes name
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [command for command in training_commands(*ALL) if "--epochs 8" not in " ".join(command)], ids=" ".join
)
def test_training_command_runs(command: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its first steps, on a small folder in place of its data and without a download."""
    command = [word for word in command if word not in ("--pretrained", "--dataset-download")]
    size = "224" if any(word.startswith("vit") for word in command) else "32"  # the only size that it takes
    small = ["--dataset", "", "--data-dir", str(images), "--train-split", "train", "--val-split", "validation"]
    small += ["--num-classes", "3", "--img-size", size, "--batch-size", "2", "--workers", "0"]
    only_listed = "--alfa-list-blocks" in command
    main([*command, *small, "--output", str(tmp_path), *([] if only_listed else ["--alfa-dry-run"])])
    assert ("layer4" if only_listed else "times that") in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def _commands_of(program: str) -> list[list[str]]:
    lines = [line for page in ALL for line in command_lines(page) if line.startswith(f"{program} ")]
    return [shlex.split(line[len(program) :]) for line in lines]


@pytest.mark.parametrize("program", ["timm-alfa-plot", "timm-alfa-report"])
def test_program_for_a_run_works(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (command,) = _commands_of(program)
    folder = tmp_path / command[0]
    folder.mkdir(parents=True)
    (folder / "summary.csv").write_text("epoch,train_loss,eval_top1\n0,2.0,40.0\n1,1.0,50.0\n")
    before = set(folder.iterdir())
    monkeypatch.chdir(tmp_path)
    target = re.search(rf'^{program} = "([\w.]+):main"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert target is not None
    importlib.import_module(target[1]).main(command)
    assert set(folder.iterdir()) > before


def test_the_export_command_parses(monkeypatch: pytest.MonkeyPatch):
    asked = {}
    monkeypatch.setattr(export, "export_run", lambda run, output, **options: asked.update(run=run, **options) or [])
    (command,) = _commands_of("timm-alfa-export")
    export.main(command)
    assert (asked["run"], asked["license"]) == (command[0], "apache-2.0")


def test_the_robust_command_parses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(robust, "run", vars)
    (command,) = _commands_of("python -m timm_alfa.robust")
    assert robust.main(command)["model"] == "resnet20s"


def test_the_patch_commands_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "path" / "to" / "train.py"
    script.parent.mkdir(parents=True)
    shutil.copyfile(STAND_IN, script)
    for command in _commands_of("python -m timm_alfa.patch"):
        patch(command)
        assert (script.read_bytes() == STAND_IN.read_bytes()) == ("--write" not in command)


def test_every_flag_exists():
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", "".join(map(text_of, ALL))))
    benches = (step, loop, rounding, paper)
    parsers = (build_parser(), *(bench.build_parser() for bench in benches))
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    assert len(mentioned) > 30
    assert mentioned - known - OTHER_PROGRAMS == {"--alfa"}  # as in "`--alfa-*` flags"


def test_every_table_of_flags_is_of_a_method_that_exists():
    macro = _hook("flag_tables").MACRO
    names = [name for page in PAGES for name in macro.findall(text_of(page))]
    assert sorted(names) == sorted([*registry.METHODS, "robust", "command"])


@pytest.mark.parametrize("method", registry.METHODS)
def test_table_of_flags_agrees_with_the_parser(method: str):
    (table,) = tables(_hook("flag_tables").table_for(method))
    rows = [dict(zip(table[0], row, strict=True)) for row in table[1:]]
    actions = {action.option_strings[-1]: action for action in build_parser()._actions if action.option_strings}
    prefix = f"--{method}-"
    assert {row["flag"].strip("`") for row in rows} == {
        name for name in actions if name.startswith(prefix) and name not in ("--alfa-list-blocks", "--alfa-dry-run")
    }
    for flag, row in zip(registry.METHODS[method].flags, rows, strict=True):
        action = actions[flag_name(flag.name)]
        _assert_default_is_shown(flag, row["default"], action.help or "")
        for choice in action.choices or ():
            assert f"`{choice}`" in row["meaning"]
        assert row.get("argument", "").strip("`") == flag.argument
        assert flag.source in row["meaning"]


def _assert_default_is_shown(flag: Flag, shown: str, help_text: str) -> None:
    text = shown.strip("`")
    if flag.type is bool:
        assert text == "off"
    elif flag.default is None:
        assert text == "none"
    else:
        assert f"(default: {text})" in help_text
        value = text.split() if isinstance(flag.default, list) else flag.type(text)
        assert value == flag.default


def test_every_flag_of_alfa_is_an_argument_with_the_same_default():
    signatures = [inspect.signature(item).parameters for item in (AlfaTask, AlfaWrapper, AlfaLoss)]
    for flag in alfa.FLAGS:
        assert flag.argument in signatures[0]
        if flag.name == "alfa_blocks":
            continue  # required by the wrapper
        defaults = [parameters[flag.argument].default for parameters in signatures if flag.argument in parameters]
        assert defaults == [flag.default] * len(defaults)


def test_the_tables_of_the_command_have_every_other_flag():
    shown = {
        name
        for table in tables(_hook("flag_tables").table_for("command"))
        for row in table[1:]
        for name in re.findall(r"`(--?[\w-]+)`", row[0])
    }
    of_methods = {flag_name(flag.name) for method in registry.METHODS.values() for flag in method.flags}
    assert shown == {name for action in build_parser()._actions for name in action.option_strings} - of_methods


@pytest.mark.parametrize("page", ALL, ids=_page_id)
def test_relative_links_and_pictures_resolve(page: Path):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=_page_id)
def test_files_and_names_of_the_code_exist(page: Path):
    """Such as `pgd_step` in `timm_alfa/pgd.py`."""
    text = text_of(page)
    for path in re.findall(r"`((?:timm_alfa|tests|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for name, path in re.findall(r"`([\w.]+)` in `([\w./]+\.py)`", text):
        defined = rf"^\s*(?:def|class) {name.rpartition('.')[2]}\b|^{name}\b"
        assert re.search(defined, (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE), f"{name} in {path}"


@pytest.mark.parametrize("page", [page for page in ALL if equations(page)], ids=_page_id)
def test_equations_convert(page: Path):
    pytest.importorskip("latex2mathml")  # of the docs extra
    to_mathml = _hook("mathml").to_mathml
    for source, display in equations(page):
        assert to_mathml(source, display).startswith("<math")


def test_an_equation_that_cannot_be_converted_stops_the_build():
    pytest.importorskip("latex2mathml")
    with pytest.raises(ValueError, match="unknown command"):
        _hook("mathml").on_page_content(r'<span class="arithmatex">\(\nosuchthing x\)</span>')


@pytest.mark.parametrize("script", sorted((DOCS / "figures").glob("*.py")), ids=lambda path: path.name)
def test_figure_is_what_its_script_draws(script: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.draw(tmp_path / module.PICTURE.name)
    drawn, committed = (
        re.search(r'<svg [^>]*?(height="[^"]+").*?(viewBox="[^"]+").*?(width="[^"]+")', path.read_text(), re.DOTALL)
        for path in (tmp_path / module.PICTURE.name, module.PICTURE)
    )
    assert drawn is not None
    assert committed is not None
    assert drawn.groups() == committed.groups()


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path):
    pytest.importorskip("mkdocs")  # of the docs extra
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for file in tmp_path.rglob("*.html"):
        html = file.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)\b[^>]*?\bsrc="([^"]*)"', html)
        loaded += re.findall(r'<link\b[^>]*?rel="stylesheet"[^>]*?href="([^"]*)"', html)
        loaded += re.findall(r'<link\b[^>]*?href="([^"]*)"[^>]*?rel="stylesheet"', html)
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], file
        assert 'class="arithmatex"' not in html, file
        assert "<!-- flags:" not in html, file
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert ":class:" not in api
    for page in re.findall(r"^::: ([\w.]+)$", text_of(DOCS / "api.md"), flags=re.MULTILINE):
        module = importlib.import_module(page)
        for name in module.__all__:
            shown = f'id="{page}.{name}"' in api
            assert shown or inspect.ismodule(getattr(module, name)) or name.isupper(), f"{page}.{name}"
    assert 'id="timm_alfa.AlfaWrapper.remove"' in api


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
            if name != "alfa" and flag.argument == "init":  # an attack starts at the image, the papers' methods do not
                assert taker.default == "zero"
                continue
            default = [taker.default] if flag.nargs == "+" else taker.default
            assert taker.default is inspect.Parameter.empty or default == flag.default or flag.name == "alfa_blocks"


def test_every_test_and_file_that_contributors_are_sent_to_exists():
    text = text_of(ROOT / "CONTRIBUTING.md")
    paths = re.findall(r"(?:timm_alfa|tests|docs)/[\w/.]+", text)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path
