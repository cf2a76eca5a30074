"""The documentation's table of what is checked says what the tests try: the figures come from their own lists."""

from __future__ import annotations

from pathlib import Path

import test_distributed
import test_finite
import test_fuzz
import test_hostile
import test_kill
import test_modes
import test_resume
from families import load

PAGE = Path(__file__).parents[2] / "docs" / "verification.md"
BEGIN = "<!-- checked: begin (tests/docs/test_checked.py holds this table to what the tests try) -->\n"
END = "<!-- checked: end"


def table() -> str:
    """The table, in Markdown."""
    positions = test_hostile.POSITIONS
    wrong = sum(len(values) for values in test_hostile.WRONG.values())
    ranks = " and ".join(map(str, test_distributed.WORLD_SIZES))
    rows = [
        (
            "timm's model families: blocks resolve without help, replays are exact, gradients are those of plain hooks",
            f"{len(load())} families ([table](../results/families.md))",
        ),
        (
            "Every way of training ends with the weights, and their average, of an eager float32 loop with plain "
            "hooks: clipping, accumulation, mixed and soft labels, dropout, checkpointing, memory formats, half "
            "precision",
            f"{len(test_modes.MODES)} modes",
        ),
        (
            "Several processes give the averaged gradients of a reference that runs full forwards, with and without "
            "batch norm and accumulation, for L-ALFA and sampled blocks",
            f"{len(test_distributed.CASES)} combinations on {ranks} ranks",
        ),
        (
            "2 + 2 epochs equal 4, bit for bit: weights, average, optimizer, eta, random states",
            f"{len(test_resume.KINDS)} kinds of run: 0 and 2 data workers, 1 and 2 ranks",
        ),
        (
            "SIGKILL, at random and while a checkpoint is written: the run resumes and ends with the same weights",
            f"{test_kill.KILLS} kills",
        ),
        ("Pickles that would run code are refused", f"{len(test_hostile.WRITERS) * len(test_hostile.READERS)} files"),
        (
            "Checkpoints cut off, with a flipped bit, or with wrong contents are refused or read right",
            f"{positions} + {positions} + {wrong} files",
        ),
        (
            "Configurations that would run code, break the parser or fill memory are refused",
            f"{len(test_hostile.YAML_TEXTS)} files",
        ),
        (
            "Values of another type in a configuration are refused or mean what the flag means",
            f"{len(test_hostile.YAML_VALUES)} values of every flag",
        ),
        (
            "A loss, feature or perturbation that is not finite stops the run before the weights change",
            f"{len(test_finite.FAULTS) * len(test_finite.BAD)} faults",
        ),
        (
            "Any combination of flags and configuration trains or ends in one line",
            f"{test_fuzz.FEW + test_fuzz.MANY:,} drawn command lines",
        ),
    ]
    lines = ["| what holds | tried on |", "| --- | --- |", *(f"| {what} | {on} |" for what, on in rows)]
    return "\n".join(lines) + "\n"


def test_the_page_has_this_table() -> None:
    found = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert found == table()
