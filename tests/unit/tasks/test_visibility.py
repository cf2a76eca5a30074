"""What a perturbation does, in words, and the advice that follows."""

from __future__ import annotations

import logging
import math
import re

import pytest
import timm
import torch
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


def in_half(ratio: float, rise: float, survives: float) -> dict[str, float]:
    return {**metrics(stem=(ratio, rise)), "delta_survives_stem": survives}


def test_effects_in_half_precision() -> None:
    found = {**in_half(0.001, 0.03, 0.432), **metrics(block=(0.02, 0.1)), "delta_survives_block": math.nan}
    assert describe_effects(found, ["stem", "block"], torch.bfloat16) == (
        "stem: delta 0.1% of the feature, 43% of it survives bfloat16, loss +3%; "
        "block: delta 2% of the feature, loss +10%"
    )
    assert "100% of it survives float16" in describe_effects(in_half(0.001, 0.03, 1.0), ["stem"], torch.float16)


@pytest.mark.parametrize(
    ("ratio", "rise", "survives", "advice"),
    [
        (0.002, 0.03, 0.432, "stem: delta is 0.2% of the feature, of which 43% survives bfloat16, and changes the loss "
                             "by +3%; try --alfa-alpha 2%, or float32 (without --amp and --model-dtype)"),
        (0.03, 0.03, 0.49, "stem: delta is 3% of the feature, of which 49% survives bfloat16, and changes the loss "
                           "by +3%; try --alfa-alpha 3%, or float32 (without --amp and --model-dtype)"),
        (0.0008, 0.001, 0.2, "stem: delta is 0.08% of the feature, of which 20% survives bfloat16, and changes the "
                             "loss by +0.1%, which is next to nothing; try --alfa-alpha 2%"),
        (0.4, 20.0, 0.4, "stem: delta is 40% of the feature, of which 40% survives bfloat16, and changes the loss by "
                         "+2000%, more than tenfold; try --alfa-alpha 1.5%"),
        (0.0008, 0.001, 0.9, "stem: delta is 0.08% of the feature and changes the loss by +0.1%, which is next to "
                             "nothing; try --alfa-alpha 2%"),
        (0.02, 0.03, 0.5, None), (0.02, 0.03, math.nan, None),
    ],
)  # fmt: skip
def test_advice_in_half_precision(ratio: float, rise: float, survives: float, advice: str | None) -> None:
    found = in_half(ratio, rise, survives)
    assert advise(found, ["stem"], "--alfa-alpha", steps=2, half=torch.bfloat16).get("stem") == advice


def test_a_run_in_half_precision_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10).train()
    task = AlfaTask(model, F.cross_entropy, ["blocks.2"], alpha="0.12%")
    images, target = batch(32)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                task(images.float(), target)
            task.epoch_metrics()
    lines = [(record.levelname, record.message) for record in caplog.records]
    described = r"ALFA: blocks.2: delta 0.12% of the feature, \d+% of it survives bfloat16, loss [+-][\d.]+%"
    assert sum(re.fullmatch(described, line) is not None for _, line in lines) == 2
    warned = r"blocks.2: delta is 0.12% .* of which \d+% survives bfloat16, and .*; try --alfa-alpha 2%, or float32 .*"
    assert sum(level == "WARNING" and re.fullmatch(warned, line) is not None for level, line in lines) == 1


def test_a_loss_near_zero_may_rise_far_later_on() -> None:
    assert advise(metrics(stem=(0.02, 20.0)), ["stem"], "--alfa-alpha", first=False) == {}


def test_percent() -> None:
    assert [percent(share) for share in (0.000791, 0.02, 0.314, 1.5, 0.0)] == ["0.079%", "2%", "31%", "150%", "0%"]
    assert [percent(share) for share in (0.994, 0.996, 1.0)] == ["99%", "100%", "100%"]


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
