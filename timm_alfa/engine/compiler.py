"""Settings of ``torch.compile`` that several walks through one graph need, and those that do not go with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch._functorch.config
import torch._inductor
import torch._inductor.config
import torch.compiler.config
from torch import nn
from torch._dynamo import OptimizedModule

_CACHE_TAG = "+buffers-kept"


Function = TypeVar("Function", bound=Callable[..., Any])


def stays_eager(function: Function) -> Function:
    """Decorate what ``torch.compile`` must not look into: compiled code around it calls it as it is.

    With ``fullgraph=True`` such a call is an error, which then says what to do instead.
    """
    options: dict[str, Any] = {}
    if "reason" in inspect.signature(torch.compiler.disable).parameters:  # torch 2.7 and newer
        options["reason"] = "a step of timm_alfa replays parts of the model; compile these with alfa.compile()"
    disabled: Function = torch.compiler.disable(function, **options)
    return disabled


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of this module runs compiled code, made by ``torch.compile(module)`` or ``module.compile()``."""
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def allow_second_walks() -> None:
    """Compiled code must not give its buffers away in its first backward: the clean graph may be walked twice.

    Read when a backward is compiled, which is later and elsewhere; so it is set for good. The compiler's cache on disk
    does not tell such code from code that does give its buffers away, and would return gradients computed from
    overwritten ones: hence a tag of our own in its keys.
    """
    torch._functorch.config.donated_buffer = False
    tag = getattr(torch.compiler.config, "cache_key_tag", None)
    if tag is None:  # torch before 2.7
        torch._inductor.config.force_disable_caches = True
    elif _CACHE_TAG not in tag:
        torch.compiler.config.cache_key_tag = tag + _CACHE_TAG


def refuse_cuda_graphs(model: nn.Module, options: Mapping[str, Any]) -> None:
    """A CUDA graph overwrites what the one before it returned, and parts compiled one by one hold on to that.

    Args:
        model: Whose parts are to be compiled; on other devices there are no such graphs.
        options: Of ``torch.compile``.

    Raises:
        ValueError: The parts would run as CUDA graphs.
    """
    if not any(parameter.is_cuda for parameter in model.parameters()):
        return
    backend, mode = options.get("backend", "inductor"), options.get("mode")
    settings = {**torch._inductor.list_mode_options().get(mode or "default", {}), **(options.get("options") or {})}
    graphs = settings.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)
    if backend == "cudagraphs" or (backend == "inductor" and graphs):
        asked = f"mode {mode!r}" if mode else f"backend {backend!r} with these options"
        raise ValueError(
            f"{asked} makes CUDA graphs, which overwrite features that later passes need; "
            "expected the default mode or 'max-autotune-no-cudagraphs'"
        )
