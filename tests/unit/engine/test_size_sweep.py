"""Steps of every size: what they do to the loss and to predictions, with nothing moved."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from rng import rng_state
from toys import Small, batch

from timm_alfa.engine.core import Engine
from timm_alfa.engine.size_sweep import Effect, propose, sweep_sizes
from timm_alfa.perturbation import Pgd
from timm_alfa.sizes import rms


@pytest.mark.parametrize("steps", [1, 3])
def test_effects_are_those_of_a_plain_step(steps: int, device: torch.device) -> None:
    model = Small(drop=0.0).double().to(device).train()
    images, target = batch(8, batch_size=16, device=device)
    before = copy.deepcopy(model.state_dict())
    engine = Engine(model, F.cross_entropy, {"stem": model.stem, "block": model.block}, Pgd())
    state = rng_state(device)
    found = sweep_sizes(engine, [(images, target)], shares=(0.01, 0.2), pgd=Pgd(steps=steps), autocast=nullcontext)
    assert torch.equal(rng_state(device), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (engine.perturbation, engine.passes) == (Pgd(), 0)
    with torch.no_grad():
        feature = model.block(model.stem(images))
        clean = F.cross_entropy(model(images), target)
    for effect in found["block"]:
        size = effect.share * rms([feature])[0]
        delta = torch.zeros_like(feature)
        for _ in range(steps):
            leaf = delta.requires_grad_()
            loss = F.cross_entropy(tail(model, feature + leaf), target)
            delta = (leaf + size * torch.autograd.grad(loss, leaf)[0].sign()).detach()
        loss = F.cross_entropy(tail(model, feature + delta), target)
        assert effect.rise == pytest.approx(float((loss.detach() - clean) / clean), rel=1e-6)
        turned = tail(model, feature + delta).argmax(1) != tail(model, feature).argmax(1)
        assert effect.flips == pytest.approx(float(turned.double().mean()))
    assert [effect.share for effect in found["stem"]] == [0.01, 0.2]


def tail(model: Small, feature: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = model.head(model.neck(feature.mean(dim=(2, 3))))
    return output


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_what_survives_half_precision(precision: str) -> None:
    torch.manual_seed(0)
    model = Small(drop=0.0).train().to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    images, target = batch(8, batch_size=16, dtype=next(model.parameters()).dtype)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    engine = Engine(model, F.cross_entropy, {"stem": model.stem, "block": model.block}, Pgd())
    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if precision == "autocast" else nullcontext
    found = sweep_sizes(engine, [(images, target)] * 2, shares=(0.002, 0.2), pgd=Pgd(), autocast=autocast)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    survives = {block: [effect.survives for effect in effects] for block, effects in found.items()}
    if precision == "float32":
        assert all(math.isnan(share) for shares in survives.values() for share in shares)
        return
    small, large = survives["stem"]
    assert 0 < small < 0.99 < large <= 1
    with torch.no_grad(), autocast():
        feature = model.stem(images)
    size = (0.002 * rms([feature])[0]).expand(feature.shape)
    moved = [((feature + way * size).to(torch.bfloat16) != feature) for way in (1, -1)]
    weights = size.square() / size.square().sum()
    bounds = [float((weights * both).sum()) for both in (moved[0] & moved[1], moved[0] | moved[1])]
    assert bounds[0] * 0.9 < small < bounds[1] + 1e-4  # whatever the signs; some entries have no gradient
    if precision == "autocast":
        assert survives["block"] == [1, 1]  # a mean, in float32


def test_proposals() -> None:
    effects = [Effect(0.01, 0.2, 0.0), Effect(0.02, 1.0, 0.1), Effect(0.05, 4.0, 0.2)]
    assert propose(effects) == effects[1]
    assert propose([Effect(0.01, -0.1, 0.0)]) is None
