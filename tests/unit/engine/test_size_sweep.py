"""Steps of every size: what they do to the loss and to predictions, with nothing moved."""

from __future__ import annotations

import copy
from contextlib import nullcontext

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


def test_proposals() -> None:
    effects = [Effect(0.01, 0.2, 0.0), Effect(0.02, 1.0, 0.1), Effect(0.05, 4.0, 0.2)]
    assert propose(effects) == effects[1]
    assert propose([Effect(0.01, -0.1, 0.0)]) is None
