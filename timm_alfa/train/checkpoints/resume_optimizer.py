"""An optimizer that goes on from a checkpoint, with the learning rate, decay and moments that the flags now ask for."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..log import is_first_process

_logger = logging.getLogger(__name__)

# What flags say of a group of parameters; the rest of a group is the optimizer's own, step counts for instance.
_OF_FLAGS = ("lr", "lr_scale", "weight_decay", "momentum", "betas", "eps")
# How an optimizer computes, which changes no state.
_IMPLEMENTATION = {"foreach", "fused", "capturable", "differentiable"}
# What has the shape of its parameter, or is one number, in every optimizer that keeps it.
_FULL_SIZE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None) -> None:
    """Load the state and leave to every group the values that it was created with.

    torch's ``load_state_dict`` brings the old learning rate, decay and betas along, and takes the state of another
    optimizer without a complaint if only the numbers of parameters agree.

    Args:
        optimizer: Just created from flags, nothing else done to it.
        state: Of the checkpoint; the form is that of ``state_dict()``.

    Raises:
        ValueError, RuntimeError, TypeError: There is no state, or it is of another optimizer or of other parameters.
    """
    if state is None:
        raise ValueError("there is none")
    fresh = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        _check_group(group, new)
    _check_state(optimizer)
    changes = dict.fromkeys(
        change for group, new in zip(optimizer.param_groups, fresh, strict=True) for change in _follow(group, new)
    )
    if changes and is_first_process():
        _logger.info(f"The optimizer's state goes on with changed values: {', '.join(changes)}.")


def _check_group(group: dict[str, Any], new: dict[str, Any]) -> None:
    # counts come while it steps, and switches with the versions of torch
    strange = {name for name in group.keys() - new.keys() if isinstance(group[name], (float, tuple))}
    differing = sorted((new.keys() - group.keys()) | (strange - {"initial_lr"}))
    if differing:
        raise ValueError(f"its groups of parameters differ in {', '.join(differing)}")
    for name, value in new.items():
        if isinstance(value, bool) and name not in _IMPLEMENTATION and group[name] != value:
            raise ValueError(f"it has {name} {group[name]}, expected {value}")


def _check_state(optimizer: torch.optim.Optimizer) -> None:
    states = getattr(optimizer, "_base_optimizer", optimizer).state  # inside timm's Lookahead
    with_history = any("betas" in group or group.get("momentum") for group in optimizer.param_groups)
    if with_history and not states:
        raise ValueError("it is empty")
    for parameter, state in states.items():
        if not isinstance(parameter, torch.Tensor):
            continue
        if not isinstance(state, dict):
            raise TypeError(f"it has {type(state).__name__} for a parameter")
        for name in _FULL_SIZE:
            value = state.get(name)
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} is {list(value.shape)} for a parameter of {list(parameter.shape)}")


def _follow(group: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Give a group the values of its flags; what that changes, in words."""
    changes = []
    for name in _OF_FLAGS:
        if name not in new:
            continue
        old = group.get("initial_lr", group["lr"]) if name == "lr" else group[name]
        if old != new[name]:
            changes.append(f"{name} {new[name]} (it was {old})")
        group[name] = new[name]
    if "initial_lr" in group:
        group["initial_lr"] = new["lr"]
    return changes
