"""What a user sees of a run: averages of what was measured, NaN where nothing was, and eta."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Nested, Small, batch

from timm_alfa import AlfaTask, AlfaWrapper
from timm_alfa.tasks.monitor import FeatureMonitor


def monitor(*blocks: str, **options: Any) -> FeatureMonitor:
    engine = AlfaWrapper(Small(), F.cross_entropy, list(blocks) or ["stem", "block"], **options).engine
    return FeatureMonitor(("loss_clean", "loss_adv"), torch.device("cpu"), engine)


def result(
    clean: float,
    adversarial: float,
    observed: dict[str, Tensor] | None = None,
    survives: dict[str, Tensor] | None = None,
    **by_block: float,
) -> dict[str, Any]:
    return {
        "loss_clean": torch.tensor(clean),
        "loss_adv": torch.tensor(adversarial),
        "loss_adv_by_block": {name: torch.tensor(value) for name, value in by_block.items()},
        "observed": observed or {},
        "survives": survives or {},
    }


def test_means_over_what_was_measured() -> None:
    seen = monitor()
    seen.add(result(1.0, 2.0, {"stem": torch.tensor([1.0, 2.0, 3.0])}, stem=1.5, block=2.5))
    seen.add(result(2.0, 5.0, {"stem": torch.tensor([3.0, 3.0, 3.0])}, block=4.5))
    metrics = seen.take()
    assert {name: value for name, value in metrics.items() if not math.isnan(value)} == {
        "loss_clean": 1.5,
        "loss_adv": 3.5,
        "loss_adv_stem": 1.5,
        "loss_rise_stem": 0.0,
        "loss_adv_block": 3.5,
        "loss_rise_block": pytest.approx(3.5 / 1.5 - 1),
        "delta_l2_stem": 2.0,
        "delta_linf_stem": 2.5,
        "delta_ratio_stem": 3.0,
    }
    assert [name for name, value in metrics.items() if math.isnan(value)] == [
        "delta_l2_block",
        "delta_linf_block",
        "delta_ratio_block",
    ]


def test_the_keys_are_always_the_same_and_averages_start_anew() -> None:
    seen = monitor(learnable=True)
    empty = seen.take()
    assert all(math.isnan(value) for name, value in empty.items() if not name.startswith("eta_"))
    assert [empty["eta_stem"], empty["eta_block"]] == [0.5, 0.5]
    seen.add(result(1.0, 2.0, stem=1.5, block=2.5))
    assert list(seen.take()) == list(empty)
    assert math.isnan(seen.take()["loss_clean"])


def test_half_precision_adds_its_share_once_it_was_met() -> None:
    seen = monitor()
    seen.add(result(1.0, 2.0, stem=1.5, block=2.5))
    plain = list(seen.take())
    assert not any("survives" in name for name in plain)
    seen.add(result(1.0, 2.0, survives={"stem": torch.tensor(0.25)}, stem=1.5, block=2.5))
    seen.add(result(1.0, 2.0, survives={"stem": torch.tensor(0.75)}, stem=1.5, block=2.5))
    metrics = seen.take()
    assert metrics["delta_survives_stem"] == 0.5
    assert math.isnan(metrics["delta_survives_block"])
    expected = list(plain)
    for block in ("stem", "block"):
        expected.insert(expected.index(f"delta_ratio_{block}") + 1, f"delta_survives_{block}")
    assert list(metrics) == expected
    seen.add(result(1.0, 2.0, stem=1.5, block=2.5))  # nothing was measured: the columns stay
    assert list(seen.take()) == expected


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_the_share_that_survives_is_that_of_the_observed_steps(precision: str) -> None:
    torch.manual_seed(0)
    model = Small(drop=0.0).train().to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    task = AlfaTask(model, F.cross_entropy, ["stem", "block"], alpha="0.2%", sample_blocks=1, verbose=False)
    images, target = batch(8, dtype=next(model.parameters()).dtype)
    shares: dict[str, list[float]] = {"stem": [], "block": []}
    step = task.step

    def noted(*args: Any) -> Any:
        found = step(*args)
        for block, share in found.survives.items():
            shares[block].append(float(share))
        return found

    task.step = noted  # type: ignore[assignment]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        for _ in range(41):
            result = task(images, target)
    assert not {"survives", "observed"} & result.keys()
    metrics = task.monitor.take()
    if precision == "float32":
        assert shares == {"stem": [], "block": []}
        assert not any("survives" in name for name in metrics)
        return
    assert sum(map(len, shares.values())) == 5
    assert all(0 < share < 1 for share in shares["stem"])
    for block, found in shares.items():
        assert metrics[f"delta_survives_{block}"] == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_one_block_needs_no_loss_of_its_own() -> None:
    seen = monitor("block")
    assert list(seen.take()) == [
        "loss_clean",
        "loss_adv",
        "loss_rise_block",
        "delta_l2_block",
        "delta_linf_block",
        "delta_ratio_block",
    ]


def test_text() -> None:
    seen = monitor()
    assert seen.text() == ""
    seen.add(result(1.0, 2.0))
    seen.add(result(2.0, 4.0))
    assert seen.text() == "Clean: 2.00 (1.50)  Adv: 4.00 (3.00)"
    learned = monitor(learnable=True)
    learned.add(result(1.0, 2.0))
    assert learned.text() == "Clean: 1.00 (1.00)  Adv: 2.00 (2.00)  Eta: 0.5000 0.5000"


def test_norms_of_perturbations(device: torch.device) -> None:
    """With signs, every entry of delta is alpha unless its gradient is zero: l_inf is alpha, l2 alpha * sqrt(n)."""

    class Smooth(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).mean(dim=(2, 3)))

    model = Smooth(nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 10)).to(device)
    task = AlfaTask(model, F.cross_entropy, ["0"], alpha=0.25, verbose=False)
    images, target = batch(8, 5, dtype=torch.float32, device=device)
    features = model[0](images)
    task(images, target)
    metrics = task.epoch_metrics()
    count = features[0].numel()
    assert metrics["delta_linf_0"] == pytest.approx(0.25)
    assert metrics["delta_l2_0"] == pytest.approx(0.25 * count**0.5)
    assert metrics["delta_ratio_0"] == pytest.approx(0.25 / features.square().mean().sqrt().item())


def test_norms_of_several_tensors_count_together(device: torch.device) -> None:
    task = AlfaTask(Nested().to(device), Nested.criterion, ["branches"], alpha=0.25, norm="l2", verbose=False)
    task(*batch(8, 5, dtype=torch.float32, device=device))
    assert task.epoch_metrics()["delta_l2_branches"] == pytest.approx(0.25)


def test_norms_are_taken_in_every_tenth_step_of_an_epoch(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    task = AlfaTask(Small(drop=0.0).to(device).train(), F.cross_entropy, ["block"], alpha=0.25, verbose=False)
    images, target = batch(8, dtype=torch.float32, device=device)
    measured: list[bool] = []
    add = task.monitor.add
    monkeypatch.setattr(
        task.monitor, "add", lambda result: (measured.append("block" in result["observed"]), add(result))
    )
    every_tenth = [True] + [False] * (FeatureMonitor.NORM_INTERVAL - 1)
    for steps in (13, 8, 1):  # however short an epoch is
        measured.clear()
        for _ in range(steps):
            task(images, target)
        assert measured == (2 * every_tenth)[:steps]
        assert not math.isnan(task.epoch_metrics()["delta_l2_block"])


def test_averages_are_those_of_the_steps(device: torch.device) -> None:
    model = Small(drop=0.0).to(device).train()
    task = AlfaTask(model, F.cross_entropy, ["stem", "block"], alpha=0.05, learnable=True, verbose=False)
    images, target = batch(8, dtype=torch.float32, device=device)
    results = [task(images + index, target) for index in range(3)]
    metrics = task.epoch_metrics()
    for name in ("loss_clean", "loss_adv"):
        assert metrics[name] == pytest.approx(sum(float(step[name]) for step in results) / 3, rel=1e-5)
    for block in ("stem", "block"):
        mean = sum(float(step["loss_adv_by_block"][block]) for step in results) / 3
        assert metrics[f"loss_adv_{block}"] == pytest.approx(mean, rel=1e-5)
    assert results[0]["eta"].tolist() == [0.5, 0.5]


def test_evaluation_leaves_no_trace(device: torch.device) -> None:
    task = AlfaTask(Small().to(device).eval(), F.cross_entropy, ["block"], verbose=False)
    with torch.no_grad():
        task(*batch(8, dtype=torch.float32, device=device))
    assert task.interval_text() == ""
    assert math.isnan(task.epoch_metrics()["loss_clean"])


@pytest.mark.parametrize("divergence", [False, True])
def test_a_loss_of_zero_has_no_rise(divergence: bool) -> None:
    engine = AlfaWrapper(Small(), F.cross_entropy, ["block"]).engine
    seen = FeatureMonitor(("loss_clean", "loss_adv"), torch.device("cpu"), engine, divergence=divergence)
    seen.add(result(0.0, 2.0, block=2.0))
    assert math.isnan(seen.take()["loss_rise_block"])
    seen.add(result(-2.0, -1.0, block=-1.0))  # a criterion may be negative
    assert seen.take()["loss_rise_block"] == (-0.5 if divergence else 0.5)
