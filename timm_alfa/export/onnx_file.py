"""A model as ONNX, by torch's own exporter."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.torch_version import TorchVersion

from ..utils.files import replace_file

__all__ = ["ONNX_DATA_FILE", "ONNX_FILE", "export_onnx", "largest_difference", "missing_packages"]

ONNX_FILE = "model.onnx"
ONNX_DATA_FILE = "model.onnx.data"  # the name that torch gives it
SINGLE_FILE_LIMIT = 2**31 - 2**24  # bytes of weights; a protocol buffer holds less than 2 GiB, and the graph needs some


def missing_packages() -> list[str]:
    """What ``export_onnx`` needs and does not find: names of packages, or a newer torch."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if TorchVersion(torch.__version__) < "2.7":
        missing.append("torch>=2.7")  # exporters before it fail at batch norm
    return missing


def export_onnx(model: nn.Module, input_size: Sequence[int], folder: Path) -> Path:
    """Write ``folder/model.onnx``, with input ``image`` [B, C, H, W] for any B and output ``logits`` [B, classes].

    Weights of 2 GiB and more lie beside it in ``model.onnx.data``. Files replace older ones whole.

    Args:
        model: On the CPU, in float32; exported as it is in evaluation mode.
        input_size: [C, H, W] of the images, normalised as the model expects them.
        folder: Where to write; created if need be.

    Returns:
        Path of ``model.onnx``.

    Raises:
        RuntimeError: torch cannot export this model.
        OSError: A file cannot be written; an older one of that name is intact.
    """
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    model.eval()
    images = torch.zeros(2, *input_size)  # of 1 image, the exporter would make a constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch, about itself
        try:
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except Exception as error:  # the exporter traces the model's own code, which may raise anything
            raise RuntimeError(f"{ONNX_FILE}: torch cannot export this model: {error}") from error
    assert program is not None  # as of dynamo=True
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        program.save(str(Path(scratch, ONNX_FILE)), external_data=weights > SINGLE_FILE_LIMIT)
        for file in sorted(Path(scratch).iterdir(), reverse=True):  # weights before the graph that refers to them
            replace_file(file, folder / file.name)
    return folder / ONNX_FILE


def largest_difference(path: Path, model: nn.Module, input_size: Sequence[int], *, batch_size: int = 3) -> float | None:
    """How far the ONNX file is from the model on random images, relative to the largest output.

    Args:
        path: What ``export_onnx`` returned.
        model: The model it was made of, on the CPU.
        input_size: [C, H, W].
        batch_size: Number of images.

    Returns:
        max |onnx - torch| / max |torch|; None where onnxruntime is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    images = torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    with torch.no_grad():
        expected = model.eval()(images)
    return float((found - expected).abs().max() / expected.abs().max())
