"""The model that flags describe, checked and put in its place."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import convert_sync_batchnorm
from timm.models import create_model, is_model, list_models, safe_model_name
from torch import nn

from .. import models as _registered  # noqa: F401  (importing it gives timm the CIFAR ResNets)
from ..errors import UsageError
from ..utils.text import mistakes_in_one_line, one_line
from .checkpoints.initial_weights import load_initial_checkpoint, pretrained_path_checked
from .device import Precision

_logger = logging.getLogger(__name__)


def build_model(args: argparse.Namespace, *, resumed: bool = False) -> nn.Module:
    """Create ``--model`` on the CPU and set ``args.num_classes`` to its number of classes.

    Args:
        args: Flags.
        resumed: Whether a checkpoint brings all weights, so that none are looked for elsewhere.

    Raises:
        UsageError: There is no such model, or it cannot be built with these flags or from these weights.
    """
    check_model_name("--model", args.model)
    for flag, path in (("--initial-checkpoint", args.initial_checkpoint), ("--pretrained-path", args.pretrained_path)):
        if path and not resumed and not os.path.isfile(path):
            raise UsageError(f"{flag} {path}: no such file; expected weights, such as model.safetensors")
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else 3)
    overlay: dict[str, Any] = {}
    if args.pretrained_path:  # a file goes before the published weights, and num_classes -1 makes timm adapt the head
        overlay["pretrained_cfg_overlay"] = {"file": args.pretrained_path, "num_classes": -1}
    try:
        with pretrained_path_checked(args):
            model: Any = create_model(
                args.model,
                pretrained=args.pretrained and not resumed,
                in_chans=in_chans,
                num_classes=args.num_classes,
                drop_rate=args.drop,
                drop_path_rate=args.drop_path,
                drop_block_rate=args.drop_block,
                global_pool=args.gp,
                bn_momentum=args.bn_momentum,
                bn_eps=args.bn_eps,
                scriptable=False,
                **overlay,
                **args.model_kwargs,
            )
    except UsageError:
        raise
    except Exception as error:  # a model's constructor may raise anything about the values it was given
        weights = f" and from --pretrained-path {args.pretrained_path}" if args.pretrained_path and not resumed else ""
        raise UsageError(
            f"--model {args.model}: cannot be created with these flags{weights}: {one_line(error)}"
        ) from error
    if not resumed:
        if args.initial_checkpoint:
            load_initial_checkpoint(args, model)
        _initialize_head(args, model)
    if args.num_classes is None:
        if not hasattr(model, "num_classes"):
            raise UsageError(f"--model {args.model}: does not say its number of classes; add --num-classes")
        args.num_classes = model.num_classes
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except (AssertionError, AttributeError) as error:
            raise UsageError(f"--grad-checkpointing: --model {args.model} does not support it") from error
    count = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(f"Model {safe_model_name(args.model)} created, {count:,} parameters, {args.num_classes} classes.")
    built: nn.Module = model
    return built


def check_model_name(flag: str, name: str) -> None:
    """Check that timm knows a model.

    Args:
        flag: Which names it.
        name: As for ``timm.create_model``; names with a source, such as ``local-dir:FOLDER``, are not looked up.

    Raises:
        UsageError: There is no such model; it tells the nearest.
    """
    if ":" in name or is_model(name):
        return
    near = difflib.get_close_matches(name.partition(".")[0], list_models(), n=3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise UsageError(f"{flag} {name}: timm has no such model{hint}")


def resolve_preprocessing(args: argparse.Namespace, model: nn.Module, verbose: bool = False) -> dict[str, Any]:
    """timm's data configuration of a model and flags, with as many means and deviations as the images have channels.

    Raises:
        UsageError: ``--input-size``, ``--mean`` or ``--std`` do not fit the channels.
    """
    with mistakes_in_one_line("--input-size, --mean, --std: expected one value per channel, or one for all"):
        config: dict[str, Any] = resolve_data_config(vars(args), model=model, verbose=verbose)
    for name in ("mean", "std"):  # as the loader does it, so that exports record what was trained with
        config[name] = tuple(float(value) for value in adapt_to_chs(config[name], config["input_size"][0]))
    return config


def _initialize_head(args: argparse.Namespace, model: Any) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    head = model.get_classifier()
    if not isinstance(getattr(head, "weight", None), torch.Tensor) or head.bias is None:
        raise UsageError(f"--head-init-scale, --head-init-bias: {args.model} has no classifier with weight and bias")
    with torch.no_grad():
        if args.head_init_scale is not None:
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            head.bias.fill_(args.head_init_bias)


def check_forward(args: argparse.Namespace, model: nn.Module, input_size: Sequence[int], precision: Precision) -> None:
    """Raise ``UsageError`` if ``model`` cannot take a ``[C, H, W]`` image of ``input_size``; nothing random is drawn.

    Many models are built for one size, and would otherwise fail only when training has begun.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), precision.autocast():
            model(image)
    except Exception as error:  # models check their input in every way there is
        raise UsageError(
            f"--input-size, --img-size {list(input_size)}: --model {args.model} cannot take it: {one_line(error)} "
            f"(a model that is built for one size takes another with --model-kwargs img_size={input_size[-1]})"
        ) from error
    finally:
        model.train(was_training)


def place_model(
    args: argparse.Namespace, model: nn.Module, device: torch.device, dtype: torch.dtype | None
) -> nn.Module:
    """Moves the model to its device, type and memory layout, with synchronized batch norm if asked for."""
    model.to(device=device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        if device.type == "cpu":
            raise UsageError("--sync-bn: synchronized batch norm needs accelerators; on the CPU use --dist-bn reduce")
        args.dist_bn = ""  # synchronized statistics are the same everywhere
        model = convert_sync_batchnorm(model)
        _logger.info("Batch norms are synchronized over all processes.")
    return model
