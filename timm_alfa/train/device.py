"""The device, the processes and the precision of a run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm import utils
from timm.layers import set_fast_norm
from timm.utils.distributed import is_distributed_env, world_info_from_env

from ..errors import UsageError
from ..utils.distributed import in_group
from ..utils.text import one_line

_logger = logging.getLogger(__name__)


def check_device(device: str, *, given: bool, modules: Sequence[str] = ()) -> None:
    """Raise ``UsageError`` for a device that does not exist here.

    Args:
        device: Value of ``--device``.
        given: Whether the user wrote it. The default, ``cuda``, gives way to the CPU where there is no CUDA device.
        modules: Value of ``--device-modules``, imported first: a back end's module makes its devices known.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # importing runs what the module holds
            raise UsageError(f"--device-modules {module}: cannot be imported ({one_line(error)})") from error
    with warnings.catch_warnings():  # old names of devices are deprecated, and the error says enough
        warnings.simplefilter("ignore")
        try:
            found = torch.device(device)
        except RuntimeError as error:
            raise UsageError(f"--device {device}: not a device; expected cpu, cuda, cuda:1, mps, ...") from error
        if device == "cuda" and not given and not torch.cuda.is_available():
            return
        _check_exists(device, found)


def _check_exists(device: str, found: torch.device) -> None:
    remedy = f"leave the flag out to train on {'CUDA' if torch.cuda.is_available() else 'the CPU'}"
    back_end: Any = getattr(torch, found.type, None)
    if not hasattr(back_end, "device_count") or not hasattr(back_end, "is_available"):
        try:
            torch.zeros(1, device=found).item()  # "meta" has no numbers
        except Exception as error:  # a device without a back end fails in a way of its own
            raise UsageError(f"--device {device}: cannot be trained on here; {remedy}") from error
        return
    count = back_end.device_count() if back_end.is_available() else 0
    if count == 0:
        raise UsageError(f"--device {device}: no {found.type.upper()} device here; {remedy}")
    known = f"{found.type}:0" + (f" to {found.type}:{count - 1}" if count > 1 else "")
    if is_distributed_env() and found.type != "cpu":  # a process takes the device of its number
        processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), world_info_from_env()[0] + 1)
        if processes > count:
            raise UsageError(
                f"--device {device}: {processes} processes on this machine need a device each, "
                f"there is only {known}; start {count}"
            )
    elif found.index is not None and found.index >= count:
        raise UsageError(f"--device {device}: no such device here, there is {known}")


def prepare_device(args: argparse.Namespace) -> torch.device:
    """Joins the process group where a launcher started several processes, and returns this process's device.

    Sets ``args.device``, ``distributed``, ``world_size``, ``rank`` and ``local_rank``.

    Raises:
        UsageError: The device is there but cannot be used.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif args.device == "cuda":
        args.device = "cpu"
        _logger.info("No CUDA device here: training on the CPU (--device chooses another accelerator).")
    device = utils.init_distributed_device(args)
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # busy, full, of a driver too old, ...
        raise UsageError(f"--device {device}: cannot be used: {one_line(error)}") from error
    if args.distributed:
        _logger.info(f"Training in {args.world_size} processes, one device each; this is {args.rank} on {device}.")
    else:
        _logger.info(f"Training in a single process on {device}.")
    if args.fast_norm:
        set_fast_norm()
    return device


def lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process ended; gloo raises nothing more particular."""
    if not in_group():
        return False
    words = r"closed by peer|reset by peer|broken pipe|timed out|remote process"
    return isinstance(error, dist.DistError) or re.search(words, str(error), re.IGNORECASE) is not None


@dataclass(frozen=True)
class Precision:
    """How numbers are kept.

    Attributes:
        model_dtype: Type of weights and input without AMP; None leaves the model's own.
        autocast: Makes the context that forward passes run in.
        scaler: Loss scaler; only float16 AMP on CUDA needs one.
    """

    model_dtype: torch.dtype | None
    autocast: Callable[[], AbstractContextManager[object]]
    scaler: utils.NativeScaler | None


def create_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    """Resolve ``--amp``, ``--amp-dtype`` and ``--model-dtype``."""
    model_dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    if model_dtype == torch.float16:
        _logger.warning("--model-dtype float16: training in pure float16 rarely converges; bfloat16 or --amp does.")
    if not args.amp:
        _logger.info(f"No mixed precision: training in {model_dtype or torch.float32}.")
        return Precision(model_dtype, contextlib.nullcontext, None)
    amp_dtype = getattr(torch, args.amp_dtype)
    scaled = device.type == "cuda" and amp_dtype == torch.float16
    _logger.info(f"Mixed precision with {amp_dtype}.")
    return Precision(
        model_dtype=model_dtype,
        autocast=partial(torch.autocast, device_type=device.type, dtype=amp_dtype),
        scaler=utils.NativeScaler(device=device.type) if scaled else None,
    )
