"""What a perturbation does, in words, and the advice that follows."""

from __future__ import annotations

import logging
import math

import pytest
import torch.nn.functional as F
from toys import Small, batch

from timm_alfa import AlfaTask
from timm_alfa.tasks.noise import NoiseTask
from timm_alfa.tasks.visibility import advise, describe_effects, percent


def metrics(**blocks: tuple[float, float]) -> dict[str, float]:
    found = {}
    for block, (ratio, rise) in blocks.items():
        found |= {f"delta_ratio_{block}": ratio, f"loss_rise_{block}": rise}
    return found


def test_a_line_of_effects() -> None:
    found = metrics(stem=(0.02, 0.314), block=(math.nan, math.nan), head=(0.00079, -0.001))
    assert describe_effects(found, ["stem", "block", "head"]) == (
        "stem: delta 2% of the feature, loss +31%; head: delta 0.079% of the feature, loss -0.1%"
    )
    assert describe_effects(found, ["block"]) == ""


@pytest.mark.parametrize(
    ("ratio", "rise", "advice"),
    [
        (0.0008, 0.001, "stem: delta is 0.08% of the feature and changes the loss by +0.1%, which is next to nothing; "
                        "try --alfa-alpha 2%"),
        (0.4, 20.0, "stem: delta is 40% of the feature and changes the loss by +2000%, more than tenfold; "
                    "try --alfa-alpha 1.5%"),
        (0.02, 1.5, None), (math.nan, math.nan, None),
    ],
)  # fmt: skip
def test_advice(ratio: float, rise: float, advice: str | None) -> None:
    assert advise(metrics(stem=(ratio, rise)), ["stem"], "--alfa-alpha", steps=2).get("stem") == advice


def test_a_loss_near_zero_may_rise_far_later_on() -> None:
    assert advise(metrics(stem=(0.02, 20.0)), ["stem"], "--alfa-alpha", first=False) == {}


def test_percent() -> None:
    assert [percent(share) for share in (0.000791, 0.02, 0.314, 1.5, 0.0)] == ["0.079%", "2%", "31%", "150%", "0%"]


@pytest.mark.parametrize("kind", ["alfa", "noise"])
def test_a_run_says_it_once_and_describes_every_epoch(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Small(drop=0.0).train()
    task = (
        AlfaTask(model, F.cross_entropy, ["block"], alpha=1e-5)
        if kind == "alfa"
        else NoiseTask(model, F.cross_entropy, ["block"], sigma=1e-5)
    )
    images, target = batch(8)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            task(images.float(), target)
            task.epoch_metrics()
    lines = [record.message for record in caplog.records]
    assert sum("next to nothing" in line for line in lines) == 1
    assert (
        sum(line.startswith("ALFA: block: delta" if kind == "alfa" else "Noise: block: delta") for line in lines) == 2
    )
    flag = "--alfa-alpha 2%" if kind == "alfa" else "--noise-sigma 2%"
    assert any(line.endswith(f"try {flag}") for line in lines)
