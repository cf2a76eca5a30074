"""CUDA graphs are refused where they would be made, before anything is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_alfa import AlfaTask, AlfaWrapper
from timm_alfa.engine.compiler import refuse_cuda_graphs

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

GRAPHS = [
    {"mode": "reduce-overhead"},
    {"mode": "max-autotune"},
    {"backend": "inductor", "mode": "max-autotune"},
    {"backend": "cudagraphs"},
    {"options": {"triton.cudagraphs": True}},
]
NO_GRAPHS = [
    {},
    {"backend": "inductor", "mode": None},
    {"mode": "default"},
    {"mode": "max-autotune-no-cudagraphs"},
    {"options": {"max_autotune": True}},
    {"backend": "aot_eager"},
]


class _Blank(nn.Linear):
    def reset_parameters(self) -> None:
        """Leave the parameters as they are: older torch would ask the device for random numbers."""


def _layers(device: str) -> nn.Module:
    with FakeTensorMode():  # parameters of a device that need not be there
        return nn.Sequential(_Blank(2, 3, device=device), nn.ReLU(), _Blank(3, 2, device=device))


@pytest.mark.parametrize("options", GRAPHS)
def test_wrapper_refuses_cuda_graphs(options: dict[str, Any]) -> None:
    model = _layers("cuda")
    alfa = AlfaWrapper(model, nn.CrossEntropyLoss(), ["0"])
    with pytest.raises(ValueError, match=r"makes CUDA graphs, .* expected the default mode"):
        alfa.compile(**options)
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize("options", NO_GRAPHS)
def test_other_modes_compile(options: dict[str, Any]) -> None:
    model = _layers("cuda")
    AlfaWrapper(model, nn.CrossEntropyLoss(), ["0"]).compile(**options)
    assert model[2]._compiled_call_impl is not None  # type: ignore[index]


@pytest.mark.parametrize("options", GRAPHS)
def test_other_devices_have_no_cuda_graphs(options: dict[str, Any]) -> None:
    refuse_cuda_graphs(_layers("cpu"), options)


def test_graphs_that_the_environment_asks_for_are_refused() -> None:
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        with pytest.raises(ValueError, match="backend 'inductor' with these options makes CUDA graphs"):
            refuse_cuda_graphs(_layers("cuda"), {})
        refuse_cuda_graphs(_layers("cuda"), {"options": {"triton.cudagraphs": False}})


def test_task_names_the_mode() -> None:
    task = AlfaTask(_layers("cuda"), nn.CrossEntropyLoss(), ["0"], verbose=False)
    with pytest.raises(ValueError, match="mode 'reduce-overhead'"):
        task.compile(mode="reduce-overhead")
