"""Compiled equals eager: the parts between the blocks are compiled, what orchestrates them is not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch.compiler.config
from timm.layers import ConvNormAct
from timm.models import create_model
from torch import Tensor, nn

from timm_alfa import AlfaTask
from timm_alfa.tasks.advprop import AdvPropTask
from timm_alfa.tasks.pixels import PixelAttack

Task = AlfaTask | AdvPropTask
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # the compiler's own
]


@pytest.fixture(autouse=True)
def _compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._functorch.config.patch(donated_buffer=True), torch.compiler.config.patch(cache_key_tag=""):
        yield
    torch._dynamo.reset()


def _alfa(model: nn.Module, blocks: list[str]) -> AlfaTask:
    return AlfaTask(model, nn.CrossEntropyLoss(), blocks, steps=2, verbose=False)


def _advprop(model: nn.Module) -> AdvPropTask:
    attack = PixelAttack(mean=(0.5,) * 3, std=(0.25,) * 3, eps=2, alpha=1, steps=2, init="uniform")
    return AdvPropTask(model, nn.CrossEntropyLoss(), attack, verbose=False)


def test_inductor_gives_the_eager_gradients(device: torch.device) -> None:
    layers = [ConvNormAct(3, 4, 3), ConvNormAct(4, 4, 3), ConvNormAct(4, 8, 3), nn.Flatten(), nn.Linear(128, 5)]
    model = nn.Sequential(*layers).double().to(device).train()
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(device)
    target = torch.tensor([1, 4], device=device)
    _leave_code_in_the_cache_that_reuses_its_buffers(copy.deepcopy(model), images)
    torch._dynamo.reset()
    _assert_compiled_equals_eager(partial(_alfa, blocks=["0", "1"]), model, images, target)


@pytest.mark.parametrize("build", [partial(_alfa, blocks=["layer2.0", "layer3.0.bn2"]), _advprop])
def test_a_residual_network_gives_the_eager_gradients(build: Callable[[nn.Module], Task], device: torch.device) -> None:
    model = create_model("test_resnet", num_classes=5).double().to(device).train()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64).to(device)
    target = torch.arange(4, device=device)
    _assert_compiled_equals_eager(build, model, images, target)


def _assert_compiled_equals_eager(
    build: Callable[[nn.Module], Task], model: nn.Module, images: Tensor, target: Tensor
) -> None:
    expected, _ = _train(build, copy.deepcopy(model), images, target, compiled=False)
    found, graphs = _train(build, copy.deepcopy(model), images, target, compiled=True)
    assert graphs[-1] > 0
    for (name, wanted), parameter in zip(expected.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, wanted), buffer in zip(expected.named_buffers(), found.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted, rtol=1e-9, atol=0, msg=name)
    assert graphs[-1] == graphs[-2], "steps after the first few compile nothing more"
    assert not torch._dynamo.utils.counters["graph_break"]


def _train(
    build: Callable[[nn.Module], Task], model: nn.Module, images: Tensor, target: Tensor, *, compiled: bool
) -> tuple[nn.Module, list[int]]:
    torch.manual_seed(0)
    task = build(model)
    if compiled:
        task.compile()
    graphs = []
    for step in range(5):
        torch.manual_seed(step)
        model.zero_grad()
        task(images, target)["loss"].backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return model, graphs


def _leave_code_in_the_cache_that_reuses_its_buffers(model: nn.Module, images: Tensor) -> None:
    """As plain training with the same parts compiled does."""
    for child in model.children():
        child.compile()
    model(images).sum().backward()
