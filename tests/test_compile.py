"""ALFA compiled equals ALFA eager: the parts between the blocks are compiled, what orchestrates them is not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch.compiler.config
from timm.layers import ConvNormAct
from torch import Tensor, nn

from timm_alfa import AlfaTask

BLOCKS = ["0", "1"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),  # the compiler's own
]


@pytest.fixture(autouse=True)
def _compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def test_inductor_gives_the_eager_gradients() -> None:
    layers = [ConvNormAct(3, 4, 3), ConvNormAct(4, 4, 3), ConvNormAct(4, 8, 3), nn.Flatten(), nn.Linear(128, 5)]
    model = nn.Sequential(*layers).double().train()
    images, target = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([1, 4])
    _leave_code_in_the_cache_that_reuses_its_buffers(copy.deepcopy(model), images)
    torch._dynamo.reset()

    expected, _ = _train(copy.deepcopy(model), images, target, compiled=False)
    found, graphs = _train(copy.deepcopy(model), images, target, compiled=True)
    for (name, wanted), parameter in zip(expected.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-9, atol=1e-12, msg=name)
    for (name, wanted), buffer in zip(expected.named_buffers(), found.buffers(), strict=True):
        torch.testing.assert_close(buffer, wanted, rtol=1e-9, atol=0, msg=name)
    assert graphs[-1] == graphs[-2], "steps after the first few compile nothing more"
    assert not torch._dynamo.utils.counters["graph_break"]


def _train(model: nn.Module, images: Tensor, target: Tensor, *, compiled: bool) -> tuple[nn.Module, list[int]]:
    task = AlfaTask(model, nn.CrossEntropyLoss(), BLOCKS, steps=2, verbose=False)
    if compiled:
        task.compile()
    graphs = []
    for _ in range(5):
        model.zero_grad()
        task(images, target)["loss"].backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return model, graphs


def _leave_code_in_the_cache_that_reuses_its_buffers(model: nn.Module, images: Tensor) -> None:
    """As plain training with the same parts compiled does."""
    for child in model.children():
        child.compile()
    model(images).sum().backward()
