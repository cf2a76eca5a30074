"""Which stages ``@last`` and ``@stages`` mean: those of the timm or torchvision model, wherever in a module it is.

A backbone is a module with timm's ``feature_info``, one of timm's models without, or one of torchvision's models. What
a user put around it, a head or a normalisation, has no say. Only a module without any backbone inside is looked
through for a list of blocks, which has to be the only one and to hold most of the parameters: what could as well be a
head is not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..engine.interception import has_forward
from ..errors import BlockError

# where torchvision's models keep their stages, and what their classifier is called
_TORCHVISION_STAGES = ("encoder.layers", "trunk_output", "features", "blocks", "layers")
_TORCHVISION_HEADS = ("fc", "classifier", "head", "heads")
# what heads are made of, in any order
_OF_HEADS = (
    nn.Linear, nn.Identity, nn.Flatten, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softmax, nn.LayerNorm,
    nn.BatchNorm1d, nn.AdaptiveAvgPool2d,
)  # fmt: skip


def backbones(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost backbones, each once: prefix of the names in it (``""``, ``"encoder."``), and the module.

    Args:
        model: Any module; where it is a backbone itself, it is the only one.
    """
    if _is_backbone(model):
        return [("", model)]
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():  # a module under two names appears once
        if name and _is_backbone(module) and not any(name.startswith(prefix) for prefix, _ in found):
            found.append((f"{name}.", module))
    return found


def the_backbone(model: nn.Module, keyword: str) -> tuple[str, nn.Module]:
    """Prefix and module of the one backbone; the model itself where there is none.

    Raises:
        BlockError: There are several.
    """
    found = backbones(model)
    if len(found) > 1:
        last = [stages[-1] for stages in (_stages(prefix, module) for prefix, module in found) if stages]
        named = ", ".join(repr(name) for name in last) or ", ".join(repr(prefix[:-1]) for prefix, _ in found)
        raise BlockError(f"{keyword!r} could mean {named}: the model holds {len(found)} backbones; name the blocks")
    return found[0] if found else ("", model)


def backbone_or_itself(model: nn.Module) -> nn.Module:
    """The one backbone; where there is none, or are several, the model."""
    found = backbones(model)
    return found[0][1] if len(found) == 1 else model


def stages_of(model: nn.Module, keyword: str) -> list[str]:
    """Names of the stages of the one backbone, first to last.

    Args:
        model: Any module.
        keyword: ``@last`` or ``@stages``, for the message.

    Raises:
        BlockError: It is not clear which these are.
    """
    prefix, module = the_backbone(model, keyword)
    stages = _stages(prefix, module)
    if not stages:
        children = [name for name in (_callable_name(model, child) for child, _ in model.named_children()) if name]
        could = f", such as {', '.join(map(repr, children[-4:]))}" if children else ""
        raise BlockError(
            f"{keyword!r} needs a model with feature_info or one list of blocks; name its blocks instead{could}"
        )
    return stages


def all_stages(model: nn.Module) -> list[str]:
    """Names of the stages of all backbones; empty where it is not clear which these are."""
    return [name for prefix, module in backbones(model) or [("", model)] for name in _stages(prefix, module)]


def _is_backbone(module: nn.Module) -> bool:
    if getattr(module, "feature_info", None):
        return True
    package = type(module).__module__
    if package.startswith("timm.models."):
        return bool(getattr(module, "pretrained_cfg", None))
    return package.startswith("torchvision.models.") and any(hasattr(module, name) for name in _TORCHVISION_HEADS)


def _stages(prefix: str, module: nn.Module) -> list[str]:
    return [prefix + name for name in _stage_names(module)]


def _stage_names(model: nn.Module) -> list[str]:
    """The modules of ``feature_info``; where it has none, or none that exist, the blocks of the model's main list."""
    modules = list(_feature_modules(model))
    names = [name for name in (_callable_name(model, name) for name in modules) if name]
    if names:
        return list(dict.fromkeys(names))
    if type(model).__module__.startswith("torchvision.models."):
        return _torchvision_stages(model)
    return _blocks_of_main_list(model, guess=_is_backbone(model))


def _feature_modules(model: nn.Module) -> Iterator[str]:
    info: Any = getattr(model, "feature_info", None) or []
    for entry in getattr(info, "info", info):
        if isinstance(entry, dict) and entry.get("module"):
            yield entry["module"]


def _torchvision_stages(model: nn.Module) -> list[str]:
    """Numbered children (``layer1`` to ``layer4``), or what its list of stages holds, without stem and last layers."""
    numbered = [
        name
        for name, child in model.named_children()
        if name.rstrip("0123456789") in ("layer", "stage") and name[-1].isdigit() and has_forward(child)
    ]
    if numbered:
        return numbered
    modules = dict(model.named_modules())
    for path in _TORCHVISION_STAGES:
        if path in modules:
            children = list(modules[path].named_children())
            stages = [child for child in children if type(child[1]) is nn.Sequential] or children
            return [f"{path}.{name}" for name, child in stages if has_forward(child)]
    return []


def _callable_name(model: nn.Module, name: str) -> str | None:
    """The module called ``name``, or for a list without a forward, the last of what it holds."""
    module: Any = dict(model.named_modules()).get(name)
    while module is not None and not has_forward(module):
        children = list(module.named_children())
        if not children:
            return None
        name, module = f"{name}.{children[-1][0]}", children[-1][1]
    return name if module is not None else None


def _blocks_of_main_list(model: nn.Module, guess: bool) -> list[str]:
    """Names of the modules in the outermost list of modules.

    Args:
        model: Any module.
        guess: Of several such lists take the one with the most parameters; otherwise nobody knows which one is meant.
    """
    lists = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    ]
    outermost = [name for name in lists if name.count(".") == min(other.count(".") for other in lists)]
    if not outermost or (len(outermost) > 1 and not guess):
        return []
    main = max(outermost, key=lambda name: _size(model.get_submodule(name)))
    if not guess and _could_be_a_head(model, model.get_submodule(main)):
        return []
    names = [_callable_name(model, f"{main}.{child}") for child, _ in model.get_submodule(main).named_children()]
    return [child for child in names if child]


def _could_be_a_head(model: nn.Module, main: nn.Module) -> bool:
    """Whether a list of a user's own model is not what most of it consists of, or consists of a head's layers."""
    of_a_head = isinstance(main, nn.Sequential) and all(isinstance(child, _OF_HEADS) for child in main)
    return of_a_head or 2 * _size(main) < _size(model)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
