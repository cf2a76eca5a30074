from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from timm_alfa.utils.timm_version import OLDEST_TIMM, require_timm

ROOT = Path(__file__).parents[3]
SENTENCE = f"timm-alfa needs timm {OLDEST_TIMM} or newer, found 1.0.27: pip install --upgrade timm"


@pytest.mark.parametrize("version", [OLDEST_TIMM, "1.0.31.dev0", "1.0.32", "1.1.0rc1", "2.0"])
def test_newer_versions_are_accepted(version):
    require_timm(version)


@pytest.mark.parametrize("version", ["0.9.16", "1.0.9", "1.0.30", "1.0.29.dev0", "1.0"])
def test_older_versions_are_named(version):
    with pytest.raises(ImportError, match=rf"needs timm {re.escape(OLDEST_TIMM)} or newer, found {version}: pip"):
        require_timm(version)


def test_the_bound_is_the_declared_one():
    assert f'"timm>={OLDEST_TIMM}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def run(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with a timm that is older, and has none of the modules that a newer one has."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text('__version__ = "1.0.27"\n')
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("code", ["import timm_alfa", "from timm_alfa.train import main"])
def test_an_import_raises_the_sentence(tmp_path, code):
    done = run(tmp_path, "-c", code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {SENTENCE}"


def test_a_module_of_someone_else_gets_the_error(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text(
        "try:\n    import timm_alfa\nexcept ImportError as error:\n    print(error)\n"
    )
    (tmp_path / "other" / "__main__.py").write_text("")
    done = run(tmp_path, "-m", "other")
    assert (done.returncode, done.stdout) == (0, SENTENCE + "\n")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["-m", "timm_alfa.train", "--help"], "timm_alfa.train"),
        (["-umtimm_alfa.robust"], "timm_alfa.robust"),
        ([str(ROOT / "train_alfa.py"), "--help"], "train_alfa"),
    ],
)
def test_a_command_ends_with_the_sentence_and_2(tmp_path, command, name):
    done = run(tmp_path, *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: error: {SENTENCE}\n"


def test_a_console_script_ends_with_the_sentence_and_2(tmp_path):
    script = tmp_path / "timm-alfa-train"
    script.write_text("from timm_alfa.train import main\nmain()\n")  # as pip writes them
    done = run(tmp_path, str(script), "--help")
    assert (done.returncode, done.stderr) == (2, f"timm-alfa-train: error: {SENTENCE}\n")
