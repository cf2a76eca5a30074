"""From names to modules: what ``blocks=`` accepts, and a list of what can be named.

``resolve_blocks`` needs only the model; ``list_blocks`` runs it once to learn order, shapes and costs.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..engine.interception import has_forward
from ..engine.trace import blank_batch, trace
from ..errors import BlockError
from .backbone import all_stages, backbone_or_itself, stages_of, the_backbone
from .paper_sets import PAPER_SETS, paper_set

KEYWORDS = ("@last", "@stages", *PAPER_SETS)


@dataclass(frozen=True)
class BlockInfo:
    """One module that ``blocks=`` can name.

    Args:
        name: Its name in the model.
        type: Its class.
        shape: Shape of its output for one image, without the batch dimension; one per tensor if it returns several.
        tail_share: Share of the forward's FLOPs that run after it, in [0, 1]: what one more tail pass costs.
        is_stage: Whether it is a stage of the model's backbone, one of those that ``@stages`` means.
    """

    name: str
    type: str
    shape: tuple[int, ...] | tuple[tuple[int, ...], ...]
    tail_share: float
    is_stage: bool


def resolve_blocks(model: nn.Module, blocks: str | Sequence[str]) -> dict[str, nn.Module]:
    """Modules for exact names, globs and keywords, in the order asked for, each once.

    Args:
        model: Any module.
        blocks: Names as in ``model.named_modules()``; globs, in which ``*`` does not cross a dot (``blocks.*``);
            ``@last`` (the last stage of ``feature_info``), ``@stages`` (all of them), and the paper's own sets,
            see :mod:`timm_alfa.blocks.paper_sets`. Keywords mean the timm or torchvision backbone inside the model,
            where it is not one itself, see :mod:`timm_alfa.blocks.backbone`.

    Raises:
        BlockError: A name that does not exist (with the nearest ones), a glob that matches nothing, a container that
            has no forward, the model itself, an empty list, or a keyword that could mean several things, or nothing.
    """
    patterns = [blocks] if isinstance(blocks, str) else list(blocks)
    if not patterns:
        raise BlockError("no block was named; name one such as '@last'")
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        for name in _match(model, modules, pattern):
            found.setdefault(name, modules[name])
    distinct: dict[int, str] = {}
    for name, module in found.items():
        if distinct.setdefault(id(module), name) != name:
            raise BlockError(f"blocks {distinct[id(module)]!r} and {name!r} are the same module; name it once")
    return found


def list_blocks(
    model: nn.Module, input_size: tuple[int, ...] | None = None, *, depth: int | None = 2
) -> list[BlockInfo]:
    """What can be named as a block, in order of execution.

    Runs the model once in evaluation mode on one blank image; its mode, buffers and random state stay as they are.

    Args:
        model: A timm model, or any module if ``input_size`` is given.
        input_size: Shape of one input, [C, H, W]; by default that of the model's ``pretrained_cfg``.
        depth: How many components a name may have (``layer4`` has one, ``layer4.0`` two); ``None`` lists all.

    Returns:
        One entry per module that runs exactly once and returns floating-point tensors.
    """
    stages = set(all_stages(model))
    infos = []
    for visit in trace(model, blank_input(model, input_size)):
        listed = depth is None or visit.name.count(".") < depth or visit.name in stages
        if listed and visit.calls == 1 and visit.shapes:
            shape = visit.shapes[0] if len(visit.shapes) == 1 else visit.shapes
            infos.append(BlockInfo(visit.name, visit.type, shape, visit.tail_share, visit.name in stages))
    return infos


def format_blocks(infos: Sequence[BlockInfo], marked: Sequence[str] = ()) -> str:
    """A table of blocks for people; ``marked`` names get an arrow."""
    rows = [("block", "type", "output", "tail FLOPs")]
    rows += [
        (
            ("> " if info.name in marked else "") + info.name + (" *" if info.is_stage else ""),
            info.type,
            "x".join(map(str, info.shape)) if info.shape and isinstance(info.shape[0], int) else str(info.shape),
            _percent(info.tail_share),
        )
        for info in infos
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3].rjust(10)])
        for row in rows
    )


def _percent(share: float) -> str:
    return "<0.01%" if 0 < share < 1e-4 else f"{100 * share:.2f}%"


def _match(model: nn.Module, modules: dict[str, nn.Module], pattern: str) -> list[str]:
    if pattern.startswith("@"):
        return _keyword(model, pattern)
    if any(character in pattern for character in "*?["):
        matches = [name for name in modules if name and _matches(name, pattern) and has_forward(modules[name])]
        if not matches:
            raise BlockError(f"{pattern!r} matches no block; {_suggest(modules, pattern)}")
        return matches
    if not pattern or pattern not in modules:
        raise BlockError(f"no block is called {pattern!r}; {_suggest(modules, pattern)}")
    if not has_forward(modules[pattern]):
        raise BlockError(
            f"{pattern!r} is a {type(modules[pattern]).__name__}, which has no forward of its own; "
            f"name what it holds, such as {f'{pattern}.*'!r}"
        )
    return [pattern]


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _suggest(modules: dict[str, nn.Module], pattern: str) -> str:
    names = [name for name in modules if name and has_forward(modules[name])]
    nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[-3:]
    return "did you mean " + ", ".join(map(repr, nearest)) + f", or one of {', '.join(KEYWORDS[:2])}?"


def _keyword(model: nn.Module, keyword: str) -> list[str]:
    if keyword not in KEYWORDS:
        raise BlockError(f"{keyword!r} is no keyword; the keywords are {', '.join(KEYWORDS)}")
    if keyword in PAPER_SETS:
        prefix, backbone = the_backbone(model, keyword)
        return [prefix + name for name in paper_set(backbone, keyword)]
    stages = stages_of(model, keyword)
    return stages[-1:] if keyword == "@last" else stages


def blank_input(model: nn.Module, input_size: tuple[int, ...] | None = None, batch_size: int = 1) -> torch.Tensor:
    """Zeros of the model's input size, [batch_size, C, H, W], on its device and in its dtype."""
    if input_size is None:
        owner = model if getattr(model, "pretrained_cfg", None) else backbone_or_itself(model)
        config = getattr(owner, "pretrained_cfg", None) or {}
        input_size = config.get("input_size")
        if input_size is None:
            raise ValueError("input_size: needed for a model without a pretrained_cfg, such as (3, 224, 224)")
        input_size = (getattr(owner, "in_chans", None) or input_size[0], *input_size[1:])
    return blank_batch(model, input_size, batch_size)
