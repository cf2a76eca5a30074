"""``torch.compile`` around wrapper, step or task, and of parts: what eager gives, or the way out by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._functorch.config
import torch.compiler.config
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Small, batch

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper, BlockError
from timm_alfa.peers import NoiseTask

BACKEND = "aot_eager"
LOSS = AlfaLoss(F.cross_entropy)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own


@pytest.fixture(autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=True):
        yield
    torch._dynamo.reset()


def _model(device: torch.device) -> Small:
    torch.manual_seed(3)
    return Small().double().to(device).train()


def _wrap(model: nn.Module) -> AlfaWrapper:
    return AlfaWrapper(model, F.cross_entropy, "block", norm="l2", steps=2)


def _gradients(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor | None]:
    images, target = batch(8, device=next(model.parameters()).device)
    for step in range(3):
        torch.manual_seed(step)
        model.zero_grad()
        loss_of(images, target).backward()
    return [parameter.grad for parameter in model.parameters()]


def _assert_eager(found: list[Tensor | None], device: torch.device) -> None:
    model = _model(device)
    alfa = _wrap(model)
    expected = _gradients(model, lambda images, target: LOSS(alfa(images, target), target).loss)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def test_around_the_wrapper(device: torch.device) -> None:
    model = _model(device)
    compiled = torch.compile(_wrap(model), backend=BACKEND)
    _assert_eager(_gradients(model, lambda images, target: LOSS(compiled(images, target), target).loss), device)
    model.eval()
    images, _ = batch(8, device=device)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-12, atol=0)


def test_around_a_step(device: torch.device) -> None:
    model = _model(device)
    alfa = _wrap(model)

    @torch.compile(backend=BACKEND)
    def step(images: Tensor, target: Tensor) -> Tensor:
        return LOSS(alfa(images, target), target).loss

    _assert_eager(_gradients(model, step), device)


def test_around_a_task(device: torch.device) -> None:
    model = _model(device)
    task = torch.compile(AlfaTask(model, F.cross_entropy, "block", norm="l2", steps=2, verbose=False), backend=BACKEND)
    _assert_eager(_gradients(model, lambda images, target: task(images, target)["loss"]), device)


def test_around_a_task_with_noise(device: torch.device) -> None:
    found = []
    for around in (lambda task: task, lambda task: torch.compile(task, backend=BACKEND)):
        model = _model(device)
        task = around(NoiseTask(model, F.cross_entropy, "block", sigma=0.1, verbose=False))
        found.append(_gradients(model, lambda images, target, task=task: task(images, target)["loss"]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("after", [False, True], ids=["before the wrapper", "after it"])
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "module.compile"])
@pytest.mark.parametrize("part", ["stem", "stem.0", "block", "block.0", "neck"])
def test_a_part_of_the_model(part: str, in_place: bool, after: bool, device: torch.device) -> None:
    model = _model(device)
    alfa = _wrap(model) if after else None
    if alfa is not None:
        _gradients(model, lambda images, target: LOSS(alfa(images, target), target).loss)
        model.load_state_dict(_model(device).state_dict())
    parent, _, name = part.rpartition(".")
    if in_place:
        model.get_submodule(part).compile(backend=BACKEND)
    else:
        setattr(model.get_submodule(parent), name, torch.compile(model.get_submodule(part), backend=BACKEND))
    alfa = _wrap(model) if alfa is None else alfa
    if part == "block" and after and not in_place:
        with pytest.raises(BlockError, match=r"'block' was replaced after AlfaWrapper was built.*call its compile\(\)"):
            alfa(*batch(8, device=device))
        return
    _assert_eager(_gradients(model, lambda images, target: LOSS(alfa(images, target), target).loss), device)
    assert not torch._functorch.config.donated_buffer, "the clean graph is walked twice"


def test_the_whole_model_afterwards(device: torch.device) -> None:
    model = _model(device)
    alfa = _wrap(model)
    model.compile(backend=BACKEND)
    with pytest.raises(BlockError, match=r"compiled as a whole after.*call AlfaWrapper\.compile\(\)"):
        alfa(*batch(8, device=device))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_block_inside_what_is_compiled(in_place: bool, device: torch.device) -> None:
    model = _model(device)
    if in_place:
        model.block.compile(backend=BACKEND)
    else:
        model.block = torch.compile(model.block, backend=BACKEND)
    name = "block.0" if in_place else "block._orig_mod.0"
    with pytest.raises(BlockError, match=rf"'{name}' is inside 'block'.*then call AlfaWrapper\.compile\(\)"):
        AlfaWrapper(model, F.cross_entropy, name)


@pytest.mark.skipif(not hasattr(torch._dynamo, "error_on_graph_break"), reason="older torch does not pass reasons on")
def test_a_full_graph_says_what_to_do(device: torch.device) -> None:
    alfa = torch.compile(_wrap(_model(device)), backend=BACKEND, fullgraph=True)
    with pytest.raises(Exception, match=r"compile these with alfa\.compile\(\)"):
        alfa(*batch(8, device=device))
