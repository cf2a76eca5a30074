"""A picture of everything on a model that an interception could leave behind."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def picture(model: nn.Module) -> dict[str, Any]:
    """Attributes, hooks, modes, buffers' identities and state names of every module."""
    seen: dict[str, Any] = {"state": list(model.state_dict())}
    for name, module in model.named_modules():
        seen[name] = (
            set(module.__dict__),
            [dict(module.__dict__[hooks]) for hooks in HOOKS],
            module.training,
            {key: id(buffer) for key, buffer in module._buffers.items()},
            getattr(module, "track_running_stats", None),
            getattr(module, "grad_checkpointing", None),
            module.__dict__.get("_compiled_call_impl"),
        )
    return seen
