"""Counted calls and operations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from timm_alfa.bench import host
from timm_alfa.errors import UsageError


def test_operations_by_hand() -> None:
    layer, images = nn.Linear(3, 2), torch.randn(4, 3)

    def step() -> None:
        layer(images.reshape(2, 2, 3).reshape(4, 3)).sum().backward()  # addmm, sum; ones, mm and sum of the gradients

    assert host.operations(step) == 5


def test_calls_by_hand() -> None:
    def inner() -> None:
        max(1, 2)

    def step() -> None:
        for _ in range(5):
            inner()

    assert host.python_calls(step) == 6


def test_the_table(tmp_path: Path, capsys: Any) -> None:
    host.main(["--models", "resnet20s", "--output", str(tmp_path / "host")])
    (row,) = json.loads((tmp_path / "host.json").read_text())["rows"]
    table = (tmp_path / "host.md").read_text()
    assert table == capsys.readouterr().out
    calls, plain = row["PGD-1"], row["plain"]
    assert f"{calls[0]} ({calls[0] / plain[0]:.2f}); {calls[1]} (+{calls[1] - plain[1]})" in table
    assert row["the same, joint"][1] < row["L-ALFA at the stages"][1]


def test_another_model() -> None:
    with pytest.raises(UsageError, match="--models resnet18: expected some of resnet20s"):
        host.main(["--models", "resnet18"])
