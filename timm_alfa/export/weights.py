"""Weights for others: a plain timm model as ``model.safetensors`` and ``config.json``, which timm reads by itself."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import clean_state_dict
from timm.models._hub import save_config_for_hf  # the one writer of timm's config.json; its public callers also upload
from timm.utils import unwrap_model
from torch import nn

from ..run_folder.checkpoint import read_checkpoint, recorded_label_names
from ..utils.files import write_file

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "export_checkpoint", "export_model", "plain_weights"]

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def export_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    state_dict: dict[str, torch.Tensor] | None = None,
    data_config: dict[str, Any] | None = None,
    label_names: list[str] | dict[int, str] | None = None,
) -> Path:
    """Write a timm model as ``folder/model.safetensors`` and ``folder/config.json``, timm's layout of a model folder.

    ``timm.create_model(architecture, checkpoint_path=...)``, ``timm.models.load_checkpoint`` and
    ``timm.create_model("local-dir:" + folder, pretrained=True)`` read it. Each file replaces an older one in one step.

    Args:
        model: A model built by ``timm.create_model``, bare or inside DDP, torch.compile or timm's EMA.
        folder: Where to write; created if need be.
        state_dict: Weights to write in place of the model's own; names and shapes must be the model's.
        data_config: Preprocessing to record (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``), the
            model's own if None.
        label_names: What the outputs mean, in order or by index; None leaves what the model's configuration says of it,
            an empty list removes that.

    Returns:
        Path of ``model.safetensors``.

    Raises:
        ValueError: The model was not built by timm, or ``state_dict`` does not fit it.
        OSError: A file cannot be written; an older one of that name is intact.
    """
    model = unwrap_model(model)
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        raise ValueError(f"model: expected one built by timm.create_model, found {type(model).__name__}")
    weights = model.state_dict() if state_dict is None else plain_weights(state_dict, model)
    # own memory for each: safetensors takes neither shared nor channels-last tensors
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_file(folder / WEIGHTS_FILE, lambda file: file.write(data))
    write_file(folder / CONFIG_FILE, lambda file: file.write(_config(model, data_config, label_names)))
    return folder / WEIGHTS_FILE


def export_checkpoint(
    checkpoint_path: str | os.PathLike[str],
    model: nn.Module,
    folder: str | os.PathLike[str],
    use_ema: bool,
    *,
    data_config: dict[str, Any] | None = None,
) -> Path:
    """Write the weights of a training checkpoint as ``export_model`` does; ``model`` gives the architecture, unchanged.

    The names of the classes are the checkpoint's, where it holds them.

    Args:
        checkpoint_path: File written by the training script or by timm's.
        model: The model that was trained; its present weights play no part.
        folder: Where to write.
        use_ema: Take the averaged weights (``state_dict_ema``).
        data_config: As for ``export_model``.

    Raises:
        UsageError: The file is damaged or no checkpoint.
        ValueError: It has no averaged weights though ``use_ema``, or its weights are not those of ``model``.
        OSError: As for ``export_model``.
    """
    checkpoint = read_checkpoint(checkpoint_path, flag="checkpoint")
    key = "state_dict_ema" if use_ema else "state_dict"
    if checkpoint.get(key) is None:
        raise ValueError(f"use_ema: {checkpoint_path} has no averaged weights ('{key}')")
    names = recorded_label_names(checkpoint)
    return export_model(model, folder, state_dict=checkpoint[key], data_config=data_config, label_names=names)


def plain_weights(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint by the names of a bare model, in its order.

    Args:
        state_dict: May be that of a model inside DDP or torch.compile.
        model: The bare model.

    Raises:
        ValueError: Names or shapes differ from the model's.
    """
    own, weights = model.state_dict(), clean_state_dict(state_dict)
    wrong = sorted(weights.keys() ^ own.keys()) or [name for name in own if weights[name].shape != own[name].shape]
    if wrong:
        raise ValueError(f"state_dict: {len(wrong)} names or shapes differ from the model's, the first is '{wrong[0]}'")
    return {name: weights[name] for name in own}


def _config(
    model: nn.Module, data_config: dict[str, Any] | None, label_names: list[str] | dict[int, str] | None
) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG_FILE
        names = {"label_names": label_names} if label_names else {}
        save_config_for_hf(model, str(path), model_config=names, data_config=data_config)
        written = path.read_bytes()
    if label_names is None:
        return written
    config = json.loads(written)
    for key in ("label_names", "label_descriptions"):  # of the weights that training may have begun with
        config["pretrained_cfg"].pop(key, None)
    return json.dumps(config, indent=2).encode()
