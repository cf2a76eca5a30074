"""The README is short, its first commands do what it says, its diff runs and its flags are right."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import README, ROOT, blocks, names_in_scope, tables, text_of, training_commands

from timm_alfa.tasks import alfa
from timm_alfa.tasks.flags import flag_name, number
from timm_alfa.train import main


def _digits_command() -> list[str]:
    (command,) = [command for command in training_commands(README) if "digits" in command]
    return command


def test_it_is_short():
    assert len(text_of(README).splitlines()) <= 200


def test_the_diff_is_about_the_same_names_as_the_code():
    (diff,) = blocks(README, "diff")
    added = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    assert 'alfa = AlfaWrapper(model, criterion, blocks=["layer4"])' in added
    assert "loss = loss_fn(alfa(images, target), target).loss" in added


def test_the_diff_applied_runs():
    (diff,) = blocks(README, "diff")
    code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    names: dict[str, Any] = names_in_scope()
    exec(compile(code, "README.md", "exec"), names)
    assert torch.isfinite(names["loss"])


def test_the_table_of_main_flags_has_their_defaults():
    (table,) = [table for table in tables(text_of(README)) if table[0][:2] == ["flag", "default"]]
    assert len(table) == 1 + 6
    flags = {flag_name(flag.name): flag for flag in alfa.FLAGS}
    for name, default, _ in table[1:]:
        flag, shown = flags[name.strip("`")], default.strip("`")
        if shown == "off":
            assert flag.name in ("alfa_blocks", "alfa_learnable")
        elif isinstance(flag.default, float):
            assert number(shown) == flag.default
        else:
            assert shown == str(flag.default)


def test_the_test_command_is_what_ci_runs():
    (command,) = [block.strip() for block in blocks(README, "bash") if "pytest" in block]
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
