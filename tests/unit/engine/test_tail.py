"""What replays learn about a model, and what they do when it starts to behave in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_alfa import AlfaWrapper
from timm_alfa.engine.randomness import RandomState

NOTHING = 1e-30  # f + delta is f: an adversarial output equals the clean one if, and only if, its draws are repeated


class Drawing(nn.Module):
    """Draws in a submodule, and between its submodules where it is told to."""

    def __init__(self, *, before: float = 0.0, around: float = 0.0, inside: float = 0.3):
        super().__init__()
        self.before, self.around = before, around
        self.first = nn.Sequential(nn.Linear(6, 8), nn.Dropout(inside))
        self.second = nn.Linear(8, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(inside))
        self.head = nn.Sequential(nn.Dropout(inside), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = F.dropout(x, self.before)
        x = self.first(x)
        skip = F.dropout(x, self.around) if self.around else x
        skip = self.second(skip)
        if self.around:
            skip = F.dropout(skip, self.around)
        return self.head(self.block(x) + skip)


def repeats(alfa: AlfaWrapper) -> bool:
    """Whether a step's adversarial pass draws what its clean pass drew."""
    found = alfa(torch.randn(4, 6), torch.arange(4))
    return torch.equal(found.output, found.adv_outputs["block"])


@pytest.mark.parametrize("before", [0.0, 0.4])
@pytest.mark.parametrize("around", [0.0, 0.4])
@pytest.mark.parametrize("inside", [0.0, 0.3])
def test_every_draw_is_repeated(before: float, around: float, inside: float, caplog: pytest.LogCaptureFixture) -> None:
    alfa = AlfaWrapper(Drawing(before=before, around=around, inside=inside), F.cross_entropy, "block", alpha=NOTHING)
    for _ in range(4):
        assert repeats(alfa)
    assert not caplog.records


def test_states_are_kept_only_where_something_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[RandomState] = []
    capture = RandomState.__init__

    def counted(self: RandomState, devices: Any = (), sources: Any = ()) -> None:
        captured.append(self)
        capture(self, devices, sources)

    monkeypatch.setattr(RandomState, "__init__", counted)
    counts = {}
    for name, model in {"no": Drawing(inside=0), "inside": Drawing(), "between": Drawing(around=0.4)}.items():
        alfa = AlfaWrapper(model, F.cross_entropy, "block", alpha=NOTHING)
        for _ in range(3):
            captured.clear()
            alfa(torch.randn(4, 6), torch.arange(4))
        counts[name] = len(captured)
    assert counts["no"] == 3  # before and after the clean pass, and when the block had finished
    assert counts["inside"] == 4  # once more: nothing was drawn on the way to the block
    assert counts["between"] > counts["inside"]


@pytest.mark.parametrize("what", ["around", "before"])
def test_draws_between_submodules_that_start_later(what: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Drawing()
    alfa = AlfaWrapper(model, F.cross_entropy, "block", alpha=NOTHING)
    for _ in range(3):
        assert repeats(alfa)
    setattr(model, what, 0.4)
    repeats(alfa)
    if what == "around":
        assert "draws random numbers between its submodules" in caplog.text
    for _ in range(3):
        assert repeats(alfa)


class Varying(nn.Module):
    """Runs a layer as often as it is told to, and writes into what the last run returned, which also leads around."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 1
        self.layer, self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        around = x
        feature = self.block(x * 1.0)
        around += 1  # in place
        return self.head(feature + around)


def test_a_submodule_that_runs_more_or_less_often(caplog: pytest.LogCaptureFixture) -> None:
    model = Varying()
    alfa = AlfaWrapper(model, F.cross_entropy, "block", alpha=NOTHING)
    for times in (1, 1, 1, 3, 3, 2, 1, 4):
        model.times = times
        assert repeats(alfa)
    assert not caplog.records


def test_an_output_that_was_never_written_into_before(caplog: pytest.LogCaptureFixture) -> None:
    model = Varying()
    model.times = 3
    alfa = AlfaWrapper(model, F.cross_entropy, "block", alpha=NOTHING)
    for _ in range(3):
        assert repeats(alfa)
    model.times = 2  # what it returned the second time was neither read around the block nor written into so far
    assert not repeats(alfa)
    assert "'layer' was written into, which it was not in earlier steps" in caplog.text
    for times in (2, 3, 1, 2):
        model.times = times
        assert repeats(alfa)
