"""All of timm's model families: blocks resolve without help, replays are exact, gradients are those of plain hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import HEADER, Family, check, load

TABLE = Path(__file__).parents[2] / "results" / "families.md"
FAMILIES = load()


def rows() -> dict[str, str]:
    """The committed table's lines by family."""
    return {line.split(" | ")[0][2:]: line for line in TABLE.read_text().splitlines() if line.startswith("| ")}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_family(family: Family, device: torch.device) -> None:
    torch.use_deterministic_algorithms(False)  # some families need kernels that have no such form on a GPU
    outcome = check(family, device)
    assert outcome.exact
    assert max(outcome.errors) < family.tolerance
    assert outcome.moved > 10 * family.tolerance, "the perturbations changed nothing that could have been compared"
    # Up to the errors, which differ from machine to machine, the committed table says the same.
    assert rows()[family.name].split(" | ")[:-2] == outcome.row().split(" | ")[:-2]


def test_the_table_is_of_all_families() -> None:
    assert len(FAMILIES) == 98
    assert list(rows())[2:] == list(FAMILIES)
    assert TABLE.read_text().startswith(HEADER)
    assert "DIFFERS" not in TABLE.read_text()
