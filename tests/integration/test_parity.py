"""Loss, perturbations and every parameter's gradient against the plain implementation, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradient_errors, relative
from reference.plain_alfa import PlainResult, feature_of, plain_alfa
from rng import rng_state, set_rng_state
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from toys import FAMILIES, Dependent, InPlace, Nested, Shared, UNet, batch, family

from timm_alfa import AlfaLoss, AlfaWrapper, pgd

TOLERANCE = 1e-9
ALPHA = 1.0 / 255


def _assert_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, error in gradient_errors(model, expected).items():
        assert error < TOLERANCE, name


def _assert_deltas(found: dict[str, Any], expected: dict[str, list[Tensor]], blocks: list[str]) -> None:
    assert list(found) == blocks
    for block in blocks:
        tensors = [leaf for leaf in tree_leaves(found[block]) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        assert len(tensors) == len(expected[block])
        assert any(float(part.norm()) > 0 for part in expected[block])
        for one, other in zip(tensors, expected[block], strict=True):
            assert not one.requires_grad
            assert relative(one, other) < TOLERANCE, block


def check(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    blocks: list[str],
    *,
    criterion: Any = F.cross_entropy,
    rounds: int = 1,
    lam: float = 1.0,
    reduction: Any = "sum",
    start: dict[str, list[Tensor]] | None = None,
    **options: Any,
) -> PlainResult:
    """Compare ``rounds`` steps: the first one looks for what is written in place, the second one relies on it."""
    options = {"alpha": ALPHA, "steps": 1, **options}
    alfa = AlfaWrapper(model, criterion, blocks, **options)
    loss_fn = AlfaLoss(criterion, lam=lam, reduction=reduction)
    plain_options = {key: value for key, value in options.items() if key != "init"}
    device = images.device
    for turn in range(rounds):
        state = rng_state(device)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        expected = plain_alfa(
            model, criterion, images, target, blocks, lam=lam, reduction=reduction, start=start, **plain_options
        )
        end = rng_state(device)
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.load_state_dict(before, strict=False)

        set_rng_state(state, device)
        model.zero_grad()
        output = alfa(images, target)
        result = loss_fn(output, target)
        result.loss.backward()

        assert relative(result.loss, expected.loss) < TOLERANCE
        assert relative(result.clean, expected.clean) < TOLERANCE
        assert list(result.adversarial) == list(output.adv_outputs) == blocks
        for block in blocks:
            assert relative(result.adversarial[block], expected.adversarial[block]) < TOLERANCE
        _assert_deltas(output.deltas, expected.deltas, blocks)
        _assert_gradients(model, expected.gradients)
        assert torch.equal(rng_state(device), end), f"round {turn}: random numbers went missing"
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, after[name]), name
    return expected


@pytest.mark.parametrize("grad", ["full", "tail"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, count: int, steps: int, grad: str, device: torch.device) -> None:
    model, images, target = family(name, device=device)
    expected = check(model, images, target, [*FAMILIES[name][3:]][:count], steps=steps, grad=grad, rounds=2)
    # The adversarial loss has to differ from the clean one by more than the tolerance, or nothing was compared.
    for loss in expected.adversarial.values():
        assert (loss - expected.clean).item() > 1e-4


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [None, 1.5 / 255])
def test_norms_and_bounds(norm: str, eps: float | None, device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    expected = check(model, images, target, ["layer3", "layer4"], steps=3, norm=norm, eps=eps)
    if eps is not None:  # three steps of 1/255 leave the ball, so that the bound is at work
        flat = torch.cat([part.flatten(1) for part in expected.deltas["layer4"]], 1)
        reached = flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)
        torch.testing.assert_close(reached, torch.full_like(reached, 1.5 / 255))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_uniform_start(norm: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    eps, blocks = 2 / 255, ["layer4", "layer3"]
    state = rng_state(device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    start = {
        block: pgd.uniform(feature_of(model, images, block), eps, torch.Generator(device).manual_seed(5))
        for block in blocks
    }
    model.load_state_dict(buffers, strict=False)
    set_rng_state(state, device)
    shapes = {parts[0].shape: parts for parts in start.values()}
    monkeypatch.setattr(pgd, "uniform", lambda features, eps, generator: list(shapes[features[0].shape]))
    check(model, images, target, blocks, steps=2, norm=norm, eps=eps, init="uniform", start=start)


@pytest.mark.parametrize(("lam", "reduction"), [(0.4, "sum"), (1.0, "mean"), (2.5, "mean")])
def test_weights_of_the_terms(lam: float, reduction: str, device: torch.device) -> None:
    model, images, target = family("vit", device=device)
    check(model, images, target, ["blocks.1", "blocks.2"], lam=lam, reduction=reduction)


@pytest.mark.parametrize("grad", ["full", "tail"])
@pytest.mark.parametrize(
    "block", ["layer2.0.bn2", "layer1.0.bn1", "layer1.0.conv1", "layer2.0.downsample", "layer2.0.act1", "bn1"]
)
def test_blocks_inside_residual_blocks(block: str, grad: str, device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    check(model, images, target, [block], steps=3, grad=grad, rounds=3)


def test_several_blocks_inside_residual_blocks(device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    check(model, images, target, ["layer3.0.downsample", "layer2.0.bn2", "layer1.0.bn1"], steps=2, rounds=3)


@pytest.mark.parametrize("frozen", ["layer3", "layer4"])
@pytest.mark.parametrize("grad", ["full", "tail"])
def test_frozen_prefix(frozen: str, grad: str, device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    for name, child in model.named_children():
        child.requires_grad_(False)
        if name == frozen:
            break
    check(model, images, target, ["layer3", "layer4"], steps=3, grad=grad, rounds=2)


def test_frozen_tail(device: torch.device) -> None:
    model, images, target = family("vit", device=device)
    model.blocks[2].requires_grad_(False)
    model.head.requires_grad_(False)
    check(model, images, target, ["blocks.1"], steps=2)


@pytest.mark.parametrize("blocks", [["layer3", "layer3.0"], ["layer3.0", "layer3"], ["layer4", "layer1", "layer3"]])
def test_nested_blocks_and_any_order(blocks: list[str], device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    check(model, images, target, blocks, steps=3, rounds=2)


@pytest.mark.parametrize("grad", ["full", "tail"])
@pytest.mark.parametrize(
    ("toy", "blocks"),
    [
        (UNet, ["middle"]),
        (UNet, ["down1", "up"]),
        (UNet, ["down2.1", "down2"]),
        (Shared, ["block"]),
        (InPlace, ["block"]),
        (InPlace, ["skip", "block"]),
        (InPlace, ["stem"]),
        (Dependent, ["chain"]),
    ],
)
def test_awkward_models(toy: type[nn.Module], blocks: list[str], grad: str, device: torch.device) -> None:
    torch.manual_seed(3)
    images, target = batch(12, device=device)
    # the sequence's last child returns the very tensor that the sequence returns: both at once are two blocks
    check(toy().double().to(device).train(), images, target, blocks, steps=3, grad=grad, rounds=3)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("grad", ["full", "tail"])
def test_nested_outputs(norm: str, grad: str, device: torch.device) -> None:
    images, target = batch(12, device=device)
    model = Nested().double().to(device).train()
    check(model, images, target, ["branches"], criterion=Nested.criterion, steps=3, norm=norm, grad=grad, eps=0.01)
    deltas = AlfaWrapper(model, Nested.criterion, "branches")(images, target).deltas["branches"]
    assert [tuple(part.shape) for part in deltas["maps"]] == [(4, 4, 6, 6), (4, 5)]


def test_learned_strengths(device: torch.device) -> None:
    model, images, target = family("convnext", device=device)
    blocks = ["stages.3", "stages.1", "stages.2"]
    alfa = AlfaWrapper(model, F.cross_entropy, blocks, alpha=ALPHA, steps=2, learnable=True)
    values = [0.2, 0.9, -0.1]
    with torch.no_grad():
        alfa.eta.values.copy_(torch.tensor(values, dtype=torch.float64))
    state = rng_state(device)

    def plain(strengths: list[float]) -> PlainResult:
        set_rng_state(state, device)
        return plain_alfa(
            model,
            F.cross_entropy,
            images,
            target,
            blocks,
            alpha=ALPHA,
            steps=2,
            strengths=dict(zip(blocks, strengths, strict=True)),
        )

    expected = plain(values)
    set_rng_state(state, device)
    output = alfa(images, target)
    result = AlfaLoss(F.cross_entropy, gamma=0.5)(output, target)
    result.loss.backward()
    assert relative(result.loss, expected.loss + 0.5 * 1.2) < TOLERANCE
    _assert_deltas(output.deltas, expected.deltas, blocks)
    _assert_gradients(model, expected.gradients)
    # d loss / d eta by central differences; gamma's share is sign(eta)
    for index, sign in enumerate([1, 1, -1]):
        sides = [plain([v + side * (i == index) for i, v in enumerate(values)]).loss for side in (1e-4, -1e-4)]
        slope = (sides[0] - sides[1]).item() / 2e-4 + 0.5 * sign
        assert float(alfa.eta.values.grad[index]) == pytest.approx(slope, rel=1e-6)
