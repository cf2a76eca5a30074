"""eta.csv: every step once, whole rows only, and a resumed run's rows in place of those that it makes again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from timm_alfa.run_folder.eta_history import FILE_NAME, EtaHistory, read_history


def history(*steps: int, offset: float = 0.0) -> EtaHistory:
    collected = EtaHistory(["layer3", "layer4"])
    for step in steps:
        add(collected, step, offset)
    return collected


def add(collected: EtaHistory, step: int, offset: float = 0.0) -> None:
    collected.add(step, torch.tensor([0.5 + offset, 0.5 - offset - step / 1000], dtype=torch.float64))


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    collected = history(1, 2)
    collected.write(tmp_path)
    collected.write(tmp_path)  # nothing new
    add(collected, 3)
    collected.write(tmp_path)
    assert (tmp_path / FILE_NAME).read_text() == "step,layer3,layer4\n1,0.5,0.499\n2,0.5,0.498\n3,0.5,0.497\n"
    assert read_history(tmp_path) == (["layer3", "layer4"], [[1, 0.5, 0.499], [2, 0.5, 0.498], [3, 0.5, 0.497]])


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = torch.rand(2, dtype=torch.float64) / 3
    collected = EtaHistory(["a", "b"])
    collected.add(1, values)
    collected.write(tmp_path)
    assert read_history(tmp_path)[1] == [[1, *values.tolist()]]


def test_a_resume_replaces_the_rows_from_its_step_on(tmp_path: Path) -> None:
    history(1, 2, 3, 4).write(tmp_path)
    resumed = history(3, offset=0.25)
    resumed.write(tmp_path)
    add(resumed, 4, 0.25)
    resumed.write(tmp_path)
    assert [row[:2] for row in read_history(tmp_path)[1]] == [[1, 0.5], [2, 0.5], [3, 0.75], [4, 0.75]]


def test_a_rank_without_a_folder_drops_its_rows(tmp_path: Path) -> None:
    collected = history(1, 2)
    collected.write(None)
    collected.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_to_read(tmp_path: Path) -> None:
    assert read_history(tmp_path) == ([], [])


@pytest.mark.parametrize("rest", ["3", "3,", "3,0.5", "3,0.5,", "3,0.5,-", "3,0.5,0.4", "3,0.5,4e-"])
def test_a_row_that_a_crash_cut_short_is_dropped(tmp_path: Path, rest: str) -> None:
    history(1, 2).write(tmp_path)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write(rest)
    assert [row[0] for row in read_history(tmp_path)[1]] == [1, 2]
    history(4).write(tmp_path)  # and the next run's rows begin on a line of their own
    assert [row[0] for row in read_history(tmp_path)[1]] == [1, 2, 4]


def test_names_with_commas_and_quotes(tmp_path: Path) -> None:
    collected = EtaHistory(['odd,"name"', "b"])
    collected.add(1, torch.tensor([0.5, 0.5]))
    collected.write(tmp_path)
    assert read_history(tmp_path)[0] == ['odd,"name"', "b"]
