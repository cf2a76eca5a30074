"""The step tail by tail against AlfaWrapper and AlfaLoss in one graph, in float64: loss, gradients, buffers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import lively, relative
from rng import rng_state, set_rng_state
from torch import Tensor, nn
from toys import FAMILIES, InPlace, Nested, Shared, Small, UNet, batch, family

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.engine.core import Engine
from timm_alfa.engine.tail_by_tail import StepResult, TailByTailStep
from timm_alfa.errors import BlockError

TOLERANCE = 1e-9
# family -> four blocks in the order of execution, some of them inside residual blocks or inside each other
FOUR = {
    "resnet": ["layer1", "layer2.0.bn2", "layer3", "layer4"],
    "efficientnet": ["blocks.0", "blocks.2", "blocks.3", "blocks.4"],
    "vit": ["blocks.0", "blocks.1.attn", "blocks.1", "blocks.2"],
    "convnext": ["stem", "stages.1", "stages.2", "stages.3"],
    "densenet": ["features.conv0", "features.denseblock2", "features.denseblock3", "features.denseblock4"],
}


def compare(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    blocks: list[str],
    *,
    criterion: Any = F.cross_entropy,
    lam: float = 0.7,
    gamma: float = 0.0,
    reduction: Any = "sum",
    values: list[float] | None = None,
    rounds: int = 3,
    **options: Any,
) -> None:
    """The first step looks for what bypasses the blocks, the others cut the graph there."""
    options = {"alpha": 1 / 255, "norm": "l2", "learnable": values is not None, **options}
    device = images.device
    twin = copy.deepcopy(model)
    alfa, plain = AlfaWrapper(model, criterion, blocks, **options), AlfaWrapper(twin, criterion, blocks, **options)
    if values is not None:
        with torch.no_grad():
            for wrapper in (alfa, plain):
                wrapper.eta.values.copy_(torch.tensor(values))
    loss_fn = AlfaLoss(criterion, lam, gamma, reduction)
    of_clean, of_adversarial = loss_fn.weights(len(blocks))
    step = TailByTailStep(alfa.engine, loss_fn)
    for _ in range(rounds):
        state = rng_state(device)
        twin.zero_grad()
        plain.eta.values.grad = None
        expected = loss_fn(plain(images, target), target)
        expected.loss.backward()
        end = rng_state(device)

        set_rng_state(state, device)
        model.zero_grad()
        found = step(images, target, of_clean, dict.fromkeys(alfa.blocks, of_adversarial))
        found.loss.backward()
        assert torch.equal(rng_state(device), end)
        torch.testing.assert_close(found.loss.detach(), expected.loss.detach(), rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(found.clean, expected.clean, rtol=TOLERANCE, atol=0)
        assert found.adversarial.keys() == expected.adversarial.keys()
        for name, loss in found.adversarial.items():
            torch.testing.assert_close(loss, expected.adversarial[name], rtol=TOLERANCE, atol=0)
        gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
        floor = 1e-6 * float(torch.stack([g.norm() for g in gradients.values() if g is not None]).norm())
        assert floor > 0
        for name, parameter in model.named_parameters():
            assert relative(parameter.grad, gradients[name], floor) < TOLERANCE, name
        for (name, buffer), other in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(buffer, other), name
        if values is not None:
            assert plain.eta.values.grad is not None
            torch.testing.assert_close(found.eta_gradient, plain.eta.values.grad, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(
    ("order", "options"),
    [
        ([3], {"steps": 3, "grad": "full"}),
        ([1, 0], {"steps": 1, "grad": "tail", "reduction": "mean"}),
        ([2, 0, 3, 1], {"steps": 1, "grad": "full", "values": [0.4, -0.2, 0.5, 0.3], "gamma": 0.5}),
        ([3, 1, 0, 2], {"steps": 3, "grad": "tail", "reduction": "mean", "values": [0.25, 0.1, 0.4, 0.25]}),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, order: list[int], options: dict[str, Any], device: torch.device) -> None:
    model, images, target = family(name, device=device)
    compare(lively(model), images, target, [FOUR[name][index] for index in order], rounds=2, **options)


@pytest.mark.parametrize("grad", ["full", "tail"])
@pytest.mark.parametrize(
    "blocks",
    [
        ["layer1.0.bn1"],
        ["layer3.0.downsample", "layer2.0.bn2"],
        ["layer3", "layer3.0", "layer3.0.conv1"],
        ["layer2.0.bn2", "layer2.0.downsample", "layer2.0"],
        ["maxpool", "fc", "bn1"],
    ],
)
def test_inside_residual_blocks(blocks: list[str], grad: str, device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    compare(lively(model), images, target, blocks, steps=2, grad=grad, values=[0.9, 0.7, 0.5][: len(blocks)])


@pytest.mark.parametrize("frozen", ["layer1", "layer3", "layer4"])
@pytest.mark.parametrize("grad", ["full", "tail"])
def test_frozen_prefix(grad: str, frozen: str, device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    for name, child in model.named_children():
        child.requires_grad_(False)
        if name == frozen:
            break
    compare(lively(model), images, target, ["layer4", "layer1", "layer3"], grad=grad, values=[0.5, 0.2, 0.3])


def test_a_frozen_piece_between_the_blocks(device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    model.layer2.requires_grad_(False)
    model.fc.requires_grad_(False)
    compare(lively(model), images, target, ["layer1", "layer2", "layer4"], steps=2, values=[0.5, 0.2, 0.3])


@pytest.mark.parametrize("values", [None, [0.6, 0.4]])
@pytest.mark.parametrize("grad", ["full", "tail"])
@pytest.mark.parametrize(
    ("toy", "blocks"),
    [
        (UNet, ["middle"]),
        (UNet, ["down1", "up"]),
        (UNet, ["middle", "down2"]),
        (Shared, ["block"]),
        (InPlace, ["skip", "block"]),
        (InPlace, ["stem", "block"]),
        (Small, ["stem", "neck"]),
    ],
)
def test_awkward_models(
    toy: type[nn.Module], blocks: list[str], grad: str, values: list[float] | None, device: torch.device
) -> None:
    torch.manual_seed(3)
    model = lively(toy().double().to(device).train())
    compare(model, *batch(12, device=device), blocks, steps=2, grad=grad, values=values and values[: len(blocks)])


@pytest.mark.parametrize("grad", ["full", "tail"])
def test_nested_outputs(grad: str, device: torch.device) -> None:
    model = Nested().double().to(device).train()
    compare(
        model,
        *batch(12, device=device),
        ["branches", "stem"],
        criterion=Nested.criterion,
        steps=2,
        grad=grad,
        values=[0.7, 0.3],
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bounds(norm: str, device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    compare(lively(model), images, target, ["layer3", "layer4"], norm=norm, eps=1.5 / 255, steps=3, values=[0.5, 0.5])


def test_uniform_start(device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    compare(lively(model), images, target, ["layer4", "layer3"], eps=0.02, init="uniform", steps=2, values=[0.3, 0.7])


def test_a_block_without_influence_is_refused(device: torch.device) -> None:
    class Deaf(Small):
        def forward(self, x: Tensor) -> Tensor:
            self.block(self.stem(x))
            return self.head(self.neck(x.mean(dim=(2, 3)).repeat(1, 3)[:, :8]))

    alfa = AlfaWrapper(Deaf().to(device).train(), F.cross_entropy, ["block"])
    images, target = batch(8, dtype=torch.float32, device=device)
    with pytest.raises(BlockError, match="'block' has no influence on the loss"):
        TailByTailStep(alfa.engine, AlfaLoss(F.cross_entropy))(images, target, 1.0, {"block": 1.0})


def step_of(model: nn.Module, *, gamma: float = 0.5) -> TailByTailStep:
    alfa = AlfaWrapper(model, F.cross_entropy, ["stem", "block"], alpha=0.05, learnable=True)
    return TailByTailStep(alfa.engine, AlfaLoss(F.cross_entropy, gamma=gamma))


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_loss_scaling_reaches_the_weights_and_not_eta(device: torch.device) -> None:
    torch.manual_seed(5)
    model = Small(drop=0.0).double().to(device).train()
    images, target = batch(8, device=device)
    found = []
    for factor in (1.0, 1024.0):
        model.zero_grad()
        result = step_of(model)(images, target, 1.0, {"stem": 0.5, "block": 0.5})
        (result.loss * factor).backward()
        found.append((result, gradients_of(model)))
    assert torch.equal(found[0][0].eta_gradient, found[1][0].eta_gradient)
    assert bool((found[0][0].eta_gradient != 0).all())
    assert len(found[0][1]) == len(list(model.parameters()))
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one * 1024, other)


def test_halving_the_loss_in_place_halves_the_gradients(device: torch.device) -> None:
    torch.manual_seed(5)
    model = Small(drop=0.0).double().to(device).train()
    images, target = batch(8, device=device)
    totals = []
    for index in (0, 1):
        model.zero_grad()
        step_of(model)(images + index, target, 1.0, {"stem": 1.0, "block": 1.0}).loss.backward()
        totals.append(gradients_of(model))
    model.zero_grad()
    for index in (0, 1):
        loss = step_of(model)(images + index, target, 1.0, {"stem": 1.0, "block": 1.0}).loss
        loss /= 2
        loss.backward()
    for found, *both in zip(gradients_of(model), *totals, strict=True):
        torch.testing.assert_close(found, sum(both) / 2, rtol=1e-12, atol=1e-15)


@pytest.fixture
def _every_warning() -> Iterator[None]:
    """Those that torch gives once per process, too, whatever ran in it before."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("_every_warning")
def test_second_derivatives_are_refused(device: torch.device) -> None:
    images, target = batch(8, dtype=torch.float32, device=device)
    found = step_of(Small().to(device).train())(images, target, 1.0, {"stem": 1.0, "block": 1.0})
    with (
        pytest.warns(UserWarning, match="create_graph"),  # torch's own warning about reference cycles
        pytest.raises(RuntimeError, match="no second derivatives"),
    ):
        found.loss.backward(create_graph=True)


def half_precision_gradients(
    model: nn.Module, images: Tensor, target: Tensor, how: str, *, shrink: float
) -> tuple[list[Tensor], Tensor]:
    """Of the second step, in units of the true gradient: the first one tells the step the loss's scale."""

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target) * shrink

    model = copy.deepcopy(model)
    alfa = AlfaWrapper(model, criterion, ["stem", "block"], alpha=0.05, learnable=True)
    step, slope = TailByTailStep(alfa.engine, AlfaLoss(criterion)), torch.zeros(2)
    scale = 1.0 if how in ("float32", "unscaled") else 2.0**16
    for _ in range(2):
        model.zero_grad()
        with torch.autocast(images.device.type, torch.float16, enabled=how != "float32"):
            if how in ("plain", "unscaled"):
                loss = criterion(model(images), target)
            else:
                found = step(images, target, 1.0, {"stem": 1.0, "block": 1.0})
                loss, slope = found.loss, found.eta_gradient
        (loss * scale).backward()
    return [gradient / scale for gradient in gradients_of(model)], slope


def zeros(gradients: list[Tensor]) -> float:
    return float(torch.cat([gradient.flatten() == 0 for gradient in gradients]).float().mean())


def test_float16_keeps_small_gradients(device: torch.device) -> None:
    torch.manual_seed(5)
    model = lively(Small(drop=0.0).to(device).train())
    images, target = batch(8, 8, dtype=torch.float32, device=device)
    expected, slope = half_precision_gradients(model, images, target, "float32", shrink=1e-6)
    found, found_slope = half_precision_gradients(model, images, target, "sweep", shrink=1e-6)
    largest = max(float(gradient.norm()) for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        if float(other.norm()) > 1e-4 * largest:  # biases before a batch norm have none
            assert float((one - other).norm() / other.norm()) < 0.1
    torch.testing.assert_close(found_slope, slope, rtol=0.1, atol=0)
    plain, unscaled = (
        zeros(half_precision_gradients(model, images, target, how, shrink=1e-6)[0]) for how in ("plain", "unscaled")
    )
    assert unscaled > plain + 0.5  # so that there is something to lose
    assert zeros(found) <= plain


def small_task(device: torch.device, **options: Any) -> AlfaTask:
    torch.manual_seed(4)
    model = lively(UNet().double().to(device).train())
    return AlfaTask(
        model,
        F.cross_entropy,
        ["down1", "down2", "middle", "up"],
        alpha=0.02,
        norm="l2",
        lam=0.8,
        verbose=False,
        **options,
    )


def drawn(task: AlfaTask, images: Tensor, target: Tensor) -> tuple[tuple[str, ...], Tensor, list[Tensor]]:
    """Blocks, loss and gradients of one step, at the same random state each time."""
    model = task.get_trainable_module()
    model.zero_grad()
    torch.manual_seed(11)
    result = task(images, target)
    result["loss"].backward()
    blocks = tuple(name for name in task.engine.blocks if name in result["loss_adv_by_block"])
    return blocks, result["loss"].detach().clone(), gradients_of(model)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", [{}, {"grad": "tail", "reduction": "mean"}, {"learnable": True}])
def test_sampled_blocks_are_unbiased(count: int, options: dict[str, Any], device: torch.device) -> None:
    images, target = batch(12, device=device)
    whole = small_task(device, **options)
    _, expected_loss, expected = drawn(whole, images, target)
    task = small_task(device, sample_blocks=count, **options)
    found: dict[tuple[str, ...], tuple[Tensor, list[Tensor]]] = {}
    wanted = set(combinations(task.engine.blocks, count))
    for _ in range(100):
        blocks, loss, gradients = drawn(task, images, target)
        found[blocks] = loss, gradients
        if found.keys() == wanted:
            break
    assert found.keys() == wanted
    losses, gradients = zip(*found.values(), strict=True)
    assert max(losses) - min(losses) > 1e-4
    torch.testing.assert_close(torch.stack(losses).mean(), expected_loss, rtol=1e-12, atol=0)
    for mean, gradient in zip(
        (torch.stack(parts).mean(0) for parts in zip(*gradients, strict=True)), expected, strict=True
    ):
        torch.testing.assert_close(mean, gradient, rtol=1e-10, atol=1e-15)


def test_sampled_blocks_give_an_unbiased_gradient_of_eta(device: torch.device) -> None:
    """Through its own step: with momentum from 0, eta moves by the projected gradient, which is linear."""
    images, target = batch(12, device=device)
    moved: dict[Any, Tensor] = {}
    for sample in (None, 1):
        task = small_task(device, learnable=True, sample_blocks=sample, eta_lr=1e-3)
        model = task.get_trainable_module()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for passes in range(60):
            task.engine.passes = passes
            with torch.no_grad():
                task.engine.eta.values.fill_(0.25)
            task.engine.eta.velocity.zero_()
            blocks, _, _ = drawn(task, images, target)
            optimizer.step()
            moved[blocks] = task.engine.eta.values.detach() - 0.25
            if len(moved) == (1 if sample is None else 5):
                break
    whole = moved.pop(("down1", "down2", "middle", "up"))
    assert len(moved) == 4
    torch.testing.assert_close(torch.stack(list(moved.values())).mean(0), whole, rtol=1e-8, atol=1e-15)


def draws(seed: int, steps: int, **options: Any) -> list[tuple[str, ...]]:
    torch.manual_seed(seed + 100)  # what else is random does not matter
    task = AlfaTask(
        nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))),
        F.cross_entropy,
        ["0", "1", "2", "3"],
        seed=seed,
        verbose=False,
        **options,
    )
    inputs, target = torch.randn(2, 2), torch.tensor([0, 1])
    return [tuple(sorted(task(inputs, target)["loss_adv_by_block"])) for _ in range(steps)]


def test_the_draw_is_a_function_of_seed_and_step(device: torch.device) -> None:
    first = draws(3, 12, sample_blocks=2)
    assert draws(3, 12, sample_blocks=2) == first
    assert draws(4, 12, sample_blocks=2) != first
    assert all(len(set(blocks)) == 2 for blocks in first)
    task = small_task(device, sample_blocks=2, seed=3)
    images, target = batch(12, device=device)
    expected = [tuple(task(images, target)["loss_adv_by_block"]) for _ in range(4)]
    resumed = small_task(device, sample_blocks=2, seed=3)
    resumed.load_task_state({"passes": 2})
    assert [tuple(resumed(images, target)["loss_adv_by_block"]) for _ in range(2)] == expected[2:]


def test_every_block_is_drawn_equally_often() -> None:
    counts = [0] * 4
    for (block,) in draws(0, 400, sample_blocks=1):
        counts[int(block)] += 1
    assert all(70 < count < 130 for count in counts), counts  # 100 each, standard deviation 9


def test_blocks_that_are_not_drawn_are_not_touched(device: torch.device) -> None:
    found: StepResult = step_of(Small(drop=0.0).to(device).train(), gamma=0.0)(
        *batch(8, dtype=torch.float32, device=device), 1.0, {"block": 2.0}, observe=lambda delta, feature: len(delta)
    )
    assert found.adversarial.keys() == found.observed.keys() == {"block"}
    assert found.eta_gradient[0] == 0
    assert found.eta_gradient[1] != 0
    torch.testing.assert_close(found.loss.detach(), found.clean + 2 * found.adversarial["block"])


class Note:
    """Lives as long as the piece of the graph that holds it."""


class Noted(nn.Module):
    """A layer whose part of the graph holds a note."""

    def __init__(self, notes: weakref.WeakSet[Note]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.notes = notes

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        note = Note()
        self.notes.add(note)
        x.register_hook(lambda gradient, note=note: gradient)
        return torch.tanh(x)


@pytest.mark.parametrize("drawn", [["0"], ["2"], ["0", "2"], ["0", "1", "2", "3"]])
def test_the_clean_tail_is_freed_before_the_attack(
    drawn: list[str], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    notes: weakref.WeakSet[Note] = weakref.WeakSet()
    alive: list[int] = []
    find = Engine.find_delta

    def counted(self: Engine, *args: Any, **kwargs: Any) -> Any:
        alive.append(len(notes))
        return find(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "find_delta", counted)
    model = nn.Sequential(*(Noted(notes) for _ in range(4)), nn.Linear(6, 10)).to(device)
    alfa = AlfaWrapper(model, nn.CrossEntropyLoss(), ["0", "1", "2", "3"])
    step = TailByTailStep(alfa.engine, AlfaLoss(nn.CrossEntropyLoss()))
    images, target = torch.randn(5, 6).to(device), torch.arange(5).to(device)
    step(images, target, 1.0, dict.fromkeys("0123", 1.0))  # finds out what bypasses the blocks
    alive.clear()
    step(images, target, 1.0, dict.fromkeys(drawn, 1.0))
    assert alive == [int(block) + 1 for block in reversed(drawn)]  # the layers up to the block itself


def test_gradients_become_the_weights_without_a_copy_and_once() -> None:
    model = Small().train()
    images, target = batch(8, dtype=torch.float32)
    loss = AlfaTask(model, nn.CrossEntropyLoss(), "block", verbose=False)(images, target)["loss"]
    found = {gradient.data_ptr() for gradient in loss.grad_fn.gradients}
    loss.backward()
    assert model.head.weight.grad.data_ptr() in found
    with pytest.raises(RuntimeError, match="can be walked backward once"):
        loss.backward()
