"""Weights that a run starts from, and what to do about those that do not fit the model."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from timm.models import load_checkpoint, load_state_dict
from torch import nn

from ...errors import UsageError
from ...utils.text import one_line

_logger = logging.getLogger(__name__)

_AT_THEIR_SIZE = "--model-kwargs img_size=N builds the model for the weights' image size"


def load_initial_checkpoint(args: argparse.Namespace, model: nn.Module) -> None:
    """Load ``--initial-checkpoint`` as timm does, every weight into its place and nothing adapted.

    Raises:
        UsageError: The file cannot be read, or its weights do not fit ``model``.
    """
    path = args.initial_checkpoint
    try:
        load_checkpoint(model, path)
    except Exception as error:  # a damaged file can make the readers raise nearly anything
        raise UsageError(f"--initial-checkpoint {path}: {_explain(args, model, error)}") from error


@contextmanager
def pretrained_path_checked(args: argparse.Namespace) -> Iterator[None]:
    """While ``create_model`` runs: see to it that the weights of ``--pretrained-path`` arrive in the model.

    timm adapts them and then loads what fits by name, without a complaint if that is nothing.

    Raises:
        UsageError: The weights do not fit, or are those of another model.
    """
    load = nn.Module.load_state_dict

    def load_and_look(module: nn.Module, weights: Any, *arguments: Any, **options: Any) -> Any:
        try:
            result = load(module, weights, *arguments, **options)
        except RuntimeError as error:
            raise UsageError(
                f"--pretrained-path {args.pretrained_path}: does not fit --model {args.model}, to which "
                f"timm adapts some of the weights but not these: {one_line(error)}; {_AT_THEIR_SIZE}"
            ) from error
        _check_arrived(args, module, result.missing_keys)
        return result

    if args.pretrained_path:
        nn.Module.load_state_dict = load_and_look  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _check_arrived(args: argparse.Namespace, model: nn.Module, missing: Iterable[str]) -> None:
    body = _without_classifier(model, model.state_dict())
    absent = _without_classifier(model, missing)
    if 2 * len(absent) > len(body):
        raise UsageError(
            f"--pretrained-path {args.pretrained_path}: of another model than --model {args.model}: "
            f"{len(absent)} of {len(body)} weights are not in it ({_few(absent)})"
        )
    if absent:
        _logger.warning(
            f"--pretrained-path {args.pretrained_path}: {len(absent)} weights of --model {args.model} are "
            f"not in it and start at random ({_few(absent)})."
        )


def _explain(args: argparse.Namespace, model: Any, error: Exception) -> str:
    """What is wrong with weights that were not loaded, and what would help."""
    path = args.initial_checkpoint
    try:
        shapes = {name: list(weight.shape) for name, weight in load_state_dict(path).items()}
    except Exception:
        return f"cannot be read as weights: {one_line(error)}"
    own = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    strange = _without_classifier(model, own.keys() ^ shapes.keys())
    unfit = _without_classifier(model, [name for name in own.keys() & shapes.keys() if own[name] != shapes[name]])
    if strange:
        what = f"of another model than --model {args.model}: {len(strange)} weights are in one only ({_few(strange)})"
    elif unfit:
        what = f"of another size than --model {args.model}: " + _few(
            [f"{name} is {shapes[name]}, expected {own[name]}" for name in unfit]
        )
    else:
        classes = getattr(model, "num_classes", args.num_classes)
        what = f"has another classifier than --model {args.model} with --num-classes {classes}"
    return (
        f"{what}; for weights of the same model, --pretrained --pretrained-path {path} adapts classifier, input "
        f"channels and, mostly, image size, and {_AT_THEIR_SIZE}"
    )


def _without_classifier(model: Any, names: Iterable[str]) -> list[str]:
    """Names of weights that are not the classifier's, in order."""
    classifiers = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    return sorted(name for name in names if not name.startswith(tuple(f"{part}." for part in classifiers)))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
