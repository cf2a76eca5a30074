"""The wheel and the sdist: what is in them, what they ask for, and that they work far from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIME = {"torch", "torchvision", "timm", "pyyaml", "safetensors", "tqdm"}

pytestmark = pytest.mark.slow


def run(folder: Path, *command: str | Path) -> str:
    """Run a command in a folder of its own, without what this process has on its path; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(ROOT, sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)  # the wheel is built from the sdist
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with the wheel and the packages of this one, but not this one's timm-alfa."""
    environment = tmp_path_factory.mktemp("environment")
    run(environment, sys.executable, "-m", "venv", environment)
    programs = environment / ("Scripts" if os.name == "nt" else "bin")
    site = run(environment, programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # paths in .pth files are added as they are: the files of an editable installation that lie there are not read
    shared |= {path for path in sys.path if Path(path).name == "site-packages"}
    Path(site, "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    run(environment, programs / "python", "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    return programs


def source_files() -> set[str]:
    """Every file of the package in the repository, as it is to be in the wheel."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "timm_alfa").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        information = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    assert names == source_files()
    assert "timm_alfa/py.typed" in names
    assert {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"} == information


def test_the_sdist_holds_what_tests_and_a_build_need(dist: Path):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("*.py")}
    assert source_files() | tests <= names
    others = names - source_files() - tests
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "train_alfa.py", ".ci/run"} <= others
    assert {name.split("/")[0] for name in others} <= {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "train_alfa.py",
        ".ci",
        ".gitignore",
        "PKG-INFO",
        "tests",
        "patches",
        "results",
        "docs",
        "mkdocs.yml",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "SECURITY.md",
    }


def test_only_runtime_dependencies_are_asked_for(metadata: Message):
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split(">=")[0] for line in required} == RUNTIME
    assert all(">=" in line for line in required)
    assert {"digits", "plot", "tensorboard", "wandb", "export"} <= set(metadata.get_all("Provides-Extra", []))


def test_it_imports_from_where_it_was_installed(bin_folder: Path, metadata: Message, tmp_path: Path):
    code = "import importlib.metadata as m, timm_alfa as t; print(t.__file__, t.__version__, m.version('timm-alfa'))"
    file, version, declared = run(tmp_path, bin_folder / "python", "-c", code).split()
    assert Path(file).is_relative_to(bin_folder.parent)
    assert version == declared == metadata["Version"]


def test_every_program_and_module_shows_its_help(bin_folder: Path, wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        lines = archive.read(name).decode().splitlines()
    programs = [EntryPoint(*map(str.strip, line.split("=")), group="") for line in lines if "=" in line]
    assert {"timm-alfa-train", "timm-alfa-plot", "timm-alfa-export"} <= {program.name for program in programs}
    for program in programs:
        assert "usage:" in run(tmp_path, bin_folder / program.name, "--help")
    for words in ("train", "bench step", "patch", "robust", "export"):
        module, *command = words.split()
        assert "usage:" in run(tmp_path, bin_folder / "python", "-m", f"timm_alfa.{module}", *command, "--help")
    assert not list(tmp_path.iterdir())


def test_the_digits_job_and_its_export_run_in_an_empty_folder(bin_folder: Path, tmp_path: Path):
    run(
        tmp_path,
        bin_folder / "timm-alfa-train",
        "--dataset",
        "digits",
        "--img-size",
        "16",
        "--model",
        "resnet20s",
        "--alfa-blocks",
        "layer3",
        "--experiment",
        "digits",
        "--epochs",
        "2",
        "--batch-size",
        "64",
        "--opt",
        "adamw",
        "--lr",
        "4e-3",
        "--warmup-epochs",
        "0",
        "--scale",
        "0.7",
        "1",
        "--hflip",
        "0",
        "--workers",
        "0",
    )
    folder = tmp_path / "output" / "train" / "digits"
    assert {"args.yaml", "summary.csv", "last.pth.tar", "model.safetensors", "config.json"} <= set(os.listdir(folder))
    run(tmp_path, bin_folder / "timm-alfa-export", folder, "--no-onnx")
    assert set(os.listdir(folder / "export")) == {"model.safetensors", "config.json", "README.md"}
    code = (
        "import timm, timm_alfa\n"
        f"print(timm.create_model({'local-dir:' + str(folder / 'export')!r}, pretrained=True).num_classes)"
    )
    assert run(tmp_path, bin_folder / "python", "-c", code) == "10\n"
