"""Random numbers that torch's seed does not govern: adversarial passes draw what the clean pass drew."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.plain_alfa import plain_alfa
from torch import nn
from toys import Drawing, Small, batch

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.engine.random_sources import Source, moved, random_sources
from timm_alfa.engine.randomness import RandomState
from timm_alfa.peers import AdvPropTask, PgdTask, PixelAttack

ALPHA = 0.05
CPU = torch.device("cpu")


def _torch(device: torch.device = CPU) -> Drawing:
    generator = torch.Generator(device).manual_seed(5)
    return Drawing(lambda: float(torch.rand((), generator=generator, device=device)), generator)


def _own_random(_: torch.device) -> Drawing:
    own = random.Random(5)
    return Drawing(own.random, own)


def _own_numpy(_: torch.device = CPU) -> Drawing:
    own = np.random.default_rng(5)
    return Drawing(own.random, own)


def _own_legacy(_: torch.device) -> Drawing:
    own = np.random.RandomState(5)
    return Drawing(own.random_sample, own)


IN_THIS_FILE = np.random.default_rng(5)


def _global(_: torch.device) -> Drawing:
    def draw() -> float:
        return (lambda: IN_THIS_FILE.random())()

    return Drawing(draw)


def _in_a_closure(device: torch.device) -> Drawing:
    held = {"generator": torch.Generator(device).manual_seed(5)}

    def number() -> float:
        return float(torch.rand((), generator=held["generator"], device=device))

    return Drawing(functools.partial(lambda draw: draw(), number))


class _Method(Drawing):
    own = random.Random(5)

    def __init__(self, _: torch.device) -> None:
        super().__init__(self.number)

    def number(self) -> float:
        return _Method.own.random()


SOURCES: dict[str, Callable[[torch.device], Drawing]] = {
    "torch": lambda device: Drawing(lambda: float(torch.rand((), device=device))),
    "random": lambda _: Drawing(random.random),
    "numpy": lambda _: Drawing(np.random.rand),
    "torch.Generator": _torch,
    "random.Random": _own_random,
    "numpy Generator": _own_numpy,
    "numpy RandomState": _own_legacy,
    "a global": _global,
    "a closure": _in_a_closure,
    "of a class": _Method,
}


def _model(name: str, device: torch.device) -> Drawing:
    torch.manual_seed(3)
    return SOURCES[name](device).double().to(device).train()


def _seed() -> None:
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    IN_THIS_FILE.bit_generator.state = np.random.default_rng(5).bit_generator.state
    _Method.own.seed(5)


class Replayed(nn.Module):
    """For a reference that runs the whole model again: every pass draws what the first one drew."""

    def __init__(self, model: Drawing) -> None:
        super().__init__()
        self.inner = model
        self.numbers: list[float] = []
        draw = model.draw

        def again() -> float:
            self.position += 1
            if self.position > len(self.numbers):
                self.numbers.append(draw())
            return self.numbers[self.position - 1]

        model.draw = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.position = 0
        return self.inner(x)


@pytest.mark.parametrize("front", ["wrapper", "task"])
@pytest.mark.parametrize("name", SOURCES)
def test_the_adversarial_pass_draws_what_the_clean_pass_drew(name: str, front: str, device: torch.device) -> None:
    images, target = batch(8, device=device)
    model, reference = _model(name, device), Replayed(_model(name, device))
    options: dict[str, Any] = {"alpha": ALPHA, "steps": 3, "norm": "l2"}
    if front == "wrapper":
        alfa = AlfaWrapper(model, F.cross_entropy, ["block", "layers.1"], **options)
        loss_of = lambda: AlfaLoss(F.cross_entropy)(alfa(images, target), target).loss  # noqa: E731
    else:
        task = AlfaTask(model, F.cross_entropy, ["block", "layers.1"], verbose=False, **options)
        loss_of = lambda: task(images, target)["loss"]  # noqa: E731
    _seed()
    found = []
    for _ in range(3):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    after = (torch.rand((), device=device), random.random(), np.random.rand(), model.draw())
    _seed()
    for loss, gradients in found:
        reference.numbers.clear()
        blocks = ["inner.block", "inner.layers.1"]
        expected = plain_alfa(reference, F.cross_entropy, images, target, blocks, **options)
        torch.testing.assert_close(loss, expected.loss.detach(), rtol=1e-12, atol=0)
        for gradient, wanted in zip(gradients, expected.gradients.values(), strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-14)
    twin = _model(name, device)
    _seed()
    for _ in range(3):
        twin(images)
    assert after == (torch.rand((), device=device), random.random(), np.random.rand(), twin.draw())


@pytest.mark.parametrize("name", SOURCES)
def test_lambda_zero_is_plain_training_whatever_is_drawn_from(name: str, device: torch.device) -> None:
    images, target = batch(8, device=device)
    weights = []
    for with_alfa in (False, True):
        model = _model(name, device)
        task = AlfaTask(model, F.cross_entropy, "block", steps=2, lam=0.0, verbose=False) if with_alfa else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _seed()
        for _ in range(3):
            optimizer.zero_grad()
            (task(images, target)["loss"] if task else F.cross_entropy(model(images), target)).backward()
            optimizer.step()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("kind", [AdvPropTask, PgdTask])
@pytest.mark.parametrize("name", SOURCES)
def test_attacks_on_pixels_see_the_same_draws(name: str, kind: Any, device: torch.device) -> None:
    """Without a perturbation both passes are one, whatever is drawn."""
    images, target = batch(8, device=device)
    model = _model(name, device)
    task = kind(model, F.cross_entropy, PixelAttack(0.0, 1.0, 2, (0.5,), (0.25,)), verbose=False)
    _seed()
    for _ in range(2):
        result = task(images, target)
        assert torch.equal(result["loss_adv"], result.get("loss_clean", result["loss"].detach()))
    found = model.draw()
    twin = _model(name, device)
    _seed()
    for _ in range(2):
        twin(images)
    assert found == twin.draw()


def test_a_source_that_is_drawn_from_later_is_told_and_then_replayed(
    caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    images, target = batch(8, device=device)
    late = [False]
    model = Drawing(lambda: random.random() if late[0] else 0.5).double().to(device).train()
    alfa = AlfaWrapper(model, F.cross_entropy, "block", alpha=1e-12)
    with caplog.at_level(logging.WARNING):
        alfa(images, target)
        late[0] = True
        assert not caplog.messages
        alfa(images, target)
        assert [message[:42] for message in caplog.messages] == ["the model draws from Python's random, whic"]
        output = alfa(images, target)
    assert len(caplog.messages) == 1
    torch.testing.assert_close(output.adv_outputs["block"], output.output, rtol=1e-9, atol=0)


def test_autocast_that_the_model_opens(device: torch.device) -> None:
    class Inside(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return super().forward(x).float()

    images, target = batch(8, dtype=torch.float32, device=device)
    found = []
    for kind, outer in ((Inside, False), (Small, True), (Inside, True)):
        torch.manual_seed(3)
        model = kind(drop=0.0).to(device).train()
        alfa = AlfaWrapper(model, lambda output, target: F.cross_entropy(output.float(), target), "block", alpha=0.01)
        for _ in range(2):
            with torch.autocast(device.type, torch.bfloat16, enabled=outer):
                output = alfa(images, target)
        found.append((output.output.float(), output.adv_outputs["block"].float(), output.deltas["block"]))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)
    assert not torch.equal(found[0][0], found[0][1])


def test_only_what_is_drawn_from_is_captured(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    captured: list[int] = []
    capture = RandomState.__init__

    def counted(self: RandomState, devices: Any = (), sources: Any = ()) -> None:
        captured.append(len(sources))
        capture(self, devices, sources)

    monkeypatch.setattr(RandomState, "__init__", counted)
    alfa = AlfaWrapper(_model("random.Random", device), F.cross_entropy, "block")
    alfa(*batch(8, device=device))
    assert set(captured) == {3}  # Python, numpy, and the model's own
    captured.clear()
    alfa(*batch(8, device=device))
    assert set(captured) == {1}


def test_sources_are_found_once_each_and_by_name() -> None:
    model = nn.Sequential(_torch(), _own_numpy())
    model[1].layers[1].again = model[0].layers[1].held
    names = [source.name for source in random_sources(model)]
    assert names == ["Python's random", "numpy.random", "0.layers.1.held", "1.layers.1.held"]


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_moved(draw: Callable[[], float]) -> None:
    sources: tuple[Source, ...] = random_sources(nn.Identity())
    before = [source.get() for source in sources]
    assert not any(moved(state, source.get()) for state, source in zip(before, sources, strict=True))
    draw()
    assert sum(moved(state, source.get()) for state, source in zip(before, sources, strict=True)) == 1


class _Owner(Small):
    """Draws from a generator of its own, which is copied with it, and from Python's."""

    def __init__(self) -> None:
        super().__init__(drop=0.0)
        self.own = random.Random(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x * (0.5 + self.own.random()) * (0.5 + random.random()))
        return x * (0.5 + self.own.random()) * (0.5 + random.random())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda alfa: pickle.loads(pickle.dumps(alfa))])
def test_a_copy_draws_from_its_own_generators(again: Callable[[Any], Any], device: torch.device) -> None:
    images, target = batch(8, device=device)
    alfa = AlfaWrapper(_Owner().double().to(device).train(), F.cross_entropy, "block", alpha=1e-12)
    alfa(images, target)
    other = again(alfa)
    before = alfa.module.own.getstate()
    output = other(images, target)
    torch.testing.assert_close(output.adv_outputs["block"], output.output, rtol=1e-9, atol=0)
    assert alfa.module.own.getstate() == before


def test_dropout_that_is_switched_on_later_is_replayed_from_its_first_step(
    caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    model = Small(drop=0.0).to(device).train()
    task = AlfaTask(model, F.cross_entropy, ["stem", "block"], alpha=1e-30, verbose=False)
    images, target = batch(8, dtype=torch.float32, device=device)
    for rate in (0.0, 0.0, 0.0, 0.5, 0.5):
        model.drop.p = rate
        result = task(images, target)
        for loss in result["loss_adv_by_block"].values():
            assert torch.equal(loss, result["loss_clean"])
    assert sum("draws random numbers, which it did not" in message for message in caplog.messages) <= 1


def test_a_model_that_draws_now_and_then_is_replayed_once_it_has_drawn(
    caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    class Sometimes(Small):
        """Draws in its own forward, before and behind the block, in every third step."""

        due = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            draws = self.due
            feature = self.stem(x * (1 + torch.rand(()) if draws else 1))
            feature = self.block(feature) + (torch.rand(()) if draws else 0) * feature.mean()
            return self.head(self.neck(feature.mean(dim=(2, 3)) * (1 + torch.rand(()) if draws else 1)))

    model = Sometimes(drop=0.0).to(device).train()
    task = AlfaTask(model, F.cross_entropy, "block", alpha=1e-30, verbose=False)
    images, target = batch(8, dtype=torch.float32, device=device)
    for step in range(9):
        model.due = step % 3 == 2
        result = task(images, target)
        if step > 2:
            assert torch.equal(result["loss_adv_by_block"]["block"], result["loss_clean"])
    assert sum("draws random numbers, which it did not" in message for message in caplog.messages) == 1
