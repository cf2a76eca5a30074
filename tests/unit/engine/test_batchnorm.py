"""Which buffers a pass moves."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import EvoNorm2dB0
from torch import Tensor, nn

from timm_alfa.engine.batchnorm import Statistics


class Norms(nn.Module):
    """A batch norm, an EvoNorm that keeps a running variance, and a buffer that nothing moves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.evo = EvoNorm2dB0(4)
        self.register_buffer("constant", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.evo(self.bn(self.conv(x))).mean(dim=(2, 3)) * self.constant


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}


MOVING = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "evo.running_var"}


@pytest.mark.parametrize("observed", [False, True])
def test_kept_passes_move_nothing_and_compute_the_same(observed: bool, device: torch.device) -> None:
    model, images = Norms().to(device).train(), torch.randn(4, 3, 6, 6, device=device)
    statistics = Statistics(model)
    before = _buffers(model)
    plain = copy.deepcopy(model)(images)
    if observed:
        with statistics.observed():
            model(images)
        assert _moved(before, model) == MOVING
        before = _buffers(model)
    identities = {name: id(buffer) for name, buffer in model.named_buffers()}
    attributes = [set(module.__dict__) for module in model.modules()]
    with statistics.kept():
        assert torch.equal(model(images), plain)
        model(images * 3 + 1)
    assert _moved(before, model) == set()
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == identities
    assert [set(module.__dict__) for module in model.modules()] == attributes
    model(images)
    assert _moved(before, model) == MOVING


def test_gradients_of_kept_passes_arrive_after_they_ended(device: torch.device) -> None:
    model, images = Norms().double().to(device).train(), torch.randn(4, 3, 6, 6, dtype=torch.float64, device=device)
    model(images).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    statistics = Statistics(model)
    with statistics.kept():
        loss = model(images).square().sum()
    model(images + 1)
    loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_restored_after_an_error(device: torch.device) -> None:
    model = Norms().to(device).train()
    statistics = Statistics(model)
    before = _buffers(model)

    def fail() -> None:
        with statistics.kept():
            model(torch.randn(4, 3, 6, 6, device=device))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _moved(before, model) == set()
    assert model.bn.track_running_stats


def test_an_error_in_the_observed_pass_leaves_it_to_the_next(device: torch.device) -> None:
    model, images = Norms().to(device).train(), torch.randn(4, 3, 6, 6, device=device)
    statistics = Statistics(model)
    with pytest.raises(KeyError), statistics.observed():
        raise KeyError
    with statistics.observed():
        model(images)
    before = _buffers(model)
    with statistics.kept():
        model(images)
    assert _moved(before, model) == set()


def test_norms_in_evaluation_mode_keep_using_their_statistics(device: torch.device) -> None:
    model, images = Norms().to(device).train(), torch.randn(4, 3, 6, 6, device=device)
    model.bn.eval()
    statistics = Statistics(model)
    before = _buffers(model)
    expected = copy.deepcopy(model)(images)
    with statistics.kept():
        assert torch.equal(model(images), expected)
    assert _moved(before, model) == set()


def test_a_norm_without_statistics_stays_without(device: torch.device) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)).to(device).train()
    with Statistics(model).kept():
        model(torch.randn(4, 3, 2, 2, device=device))
    assert not model[0].track_running_stats
    assert model[1].track_running_stats
