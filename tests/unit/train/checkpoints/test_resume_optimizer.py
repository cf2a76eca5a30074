"""The state of every one of timm's optimizers goes on exactly, and with what the flags say; another's is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from timm_alfa.train.checkpoints.resume_optimizer import restore_optimizer

# they need another library, an accelerator, or a closure
LEFT_OUT = ("fused", "bnb", "adahessian", "lbfgs")
NAMES = [
    name
    for name in [*list_optimizers(), "lookahead_adamw", "lookahead_sgd"]
    if not any(part in name for part in LEFT_OUT)
]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(5, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)  # kron draws
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


def _create(model: nn.Module, name: str, **flags: Any) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, opt=name, **{"lr": 1e-3, "weight_decay": 0.05, "momentum": 0.9} | flags)


def _state(name: str, **flags: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = _model()
    optimizer = _create(model, name, **flags)
    for seed in range(3):
        _step(model, optimizer, seed)
    return model, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_unchanged_flags_go_on_bit_for_bit(name: str) -> None:
    model, state = _state(name)
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    plain = _create(whole, name)
    plain.load_state_dict(copy.deepcopy(state))
    restored = _create(parts, name)
    restore_optimizer(restored, copy.deepcopy(state))
    for seed in range(3, 6):
        _step(whole, plain, seed)
        _step(parts, restored, seed)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "flag", "value", "key"),
    [
        ("adamw", "lr", 0.5, "lr"),
        ("adamw", "weight_decay", 0.3, "weight_decay"),
        ("adamw", "betas", (0.7, 0.8), "betas"),
        ("adamw", "eps", 1e-3, "eps"),
        ("sgd", "momentum", 0.5, "momentum"),
        ("lookahead_adamw", "weight_decay", 0.3, "weight_decay"),
    ],
)
def test_changed_flags_hold_and_the_moments_go_on(name: str, flag: str, value: Any, key: str) -> None:
    model, state = _state(name)
    for group in state["param_groups"]:
        group["initial_lr"] = group["lr"]  # as timm's schedules leave it
        group["lr"] *= 0.1
    optimizer = _create(model, name, **{flag: value})
    expected = [group[key] for group in _create(model, name, **{flag: value}).param_groups]
    restore_optimizer(optimizer, state)
    assert [group[key] for group in optimizer.param_groups] == expected
    assert value in expected
    assert all(group["initial_lr"] == group["lr"] for group in optimizer.param_groups)
    moments = optimizer.state_dict()["state"]
    for index, kept in state["state"].items():
        for part, moment in kept.items():
            assert torch.equal(torch.as_tensor(moments[index][part]), torch.as_tensor(moment)), part


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("sgd", "adamw", "'step'"),
        ("adamw", "sgd", "momentum"),
        ("sgd", "momentum", "nesterov"),
        ("adamw", "lion", "eps"),
        ("adamw", "lamb", "max_grad_norm"),
        ("lookahead_adamw", "adamw", "lookahead"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(old: str, new: str, said: str) -> None:
    model, state = _state(old)
    with pytest.raises(ValueError, match=said):
        restore_optimizer(_create(model, new), state)


@pytest.mark.parametrize("flags", [{"weight_decay": 0.0}, {"layer_decay": 0.5}])
def test_the_state_of_other_groups_of_parameters_is_refused(flags: dict[str, Any]) -> None:
    model = timm.create_model("test_resnet")
    optimizer = _create(model, "adamw")
    with pytest.raises(ValueError, match="different number of parameter groups"):
        restore_optimizer(_create(model, "adamw", **flags), optimizer.state_dict())


def _without(state: dict[str, Any]) -> None:
    state["state"].clear()


def _misshapen(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = torch.zeros(2)


def _no_dict(state: dict[str, Any]) -> None:
    state["state"][0] = 3


def _another_layout(state: dict[str, Any]) -> None:
    for group in state["param_groups"]:
        group["lr_scale"] = 0.5


@pytest.mark.parametrize("damage", [_without, _misshapen, _no_dict, _another_layout])
def test_a_damaged_state_is_refused(damage: Any) -> None:
    model, state = _state("adamw")
    damage(state)
    with pytest.raises((ValueError, TypeError, AttributeError)):
        restore_optimizer(_create(model, "adamw"), state)


def test_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match="none"):
        restore_optimizer(_create(_model(), "adamw"), None)
