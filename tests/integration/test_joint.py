"""All blocks perturbed together: against plain hooks on the whole model, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradient_errors, relative
from reference.plain_alfa import direction, feature_of, sizes_of
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from toys import FAMILIES, Small, UNet, batch, family

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.perturbation import Gaussian

TOLERANCE = 1e-9


def forward_with_all(model: nn.Module, images: Tensor, deltas: Mapping[str, Sequence[Tensor]], first: str = "") -> Any:
    """The whole model, with a hook at every block that adds its delta; ``first`` is detached before."""

    def adding(block: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            leaves, spec = tree_flatten(output)
            remaining = iter(deltas[block])
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaves[index] = (leaf.detach() if block == first else leaf) + next(remaining)
            return tree_unflatten(leaves, spec)

        return hook

    with ExitStack() as stack:
        for block in deltas:
            handle = model.get_submodule(block).register_forward_hook(adding(block))
            stack.callback(handle.remove)
        return model(images)


def plain(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    blocks: list[str],
    *,
    steps: int,
    alpha: float,
    norm: str = "linf",
    relative_sizes: bool = False,
    strengths: Tensor | None = None,
    lam: float = 1.0,
    tail: str = "",
) -> tuple[Tensor, dict[str, list[Tensor]], dict[str, Tensor], Tensor | None]:
    """Loss, deltas, gradients of all parameters and of the strengths, by full forwards."""
    state = torch.get_rng_state()

    def again() -> None:
        torch.set_rng_state(state)

    clean = F.cross_entropy(model(images), target)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    deltas: dict[str, list[Tensor]] = {}
    for block in blocks:
        again()
        deltas[block] = [torch.zeros_like(part) for part in feature_of(model, images, block)]
    sizes = {}
    for block in blocks:
        again()
        sizes[block] = sizes_of(feature_of(model, images, block), norm) if relative_sizes else [1.0] * 9
    for _ in range(steps):
        leaves = {block: [part.detach().requires_grad_() for part in deltas[block]] for block in blocks}
        again()
        loss = F.cross_entropy(forward_with_all(model, images, leaves), target)
        found = iter(torch.autograd.grad(loss, [leaf for part in leaves.values() for leaf in part]))
        for block in blocks:
            ways = direction([next(found) for _ in leaves[block]], norm)
            moves = [alpha * size * way for way, size in zip(ways, sizes[block], strict=False)]
            deltas[block] = [part + move for part, move in zip(deltas[block], moves, strict=True)]
    if strengths is not None:
        strengths = strengths.detach().clone().requires_grad_()
    scaled = {
        block: [part if strengths is None else strengths[index] * part for part in deltas[block]]
        for index, block in enumerate(blocks)
    }
    again()
    adversarial = F.cross_entropy(forward_with_all(model, images, scaled, first=tail), target)
    total = clean + lam * adversarial
    named = dict(model.named_parameters())
    wanted = [*named.values()] + ([strengths] if strengths is not None else [])
    gradients = list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
    of_strengths = gradients.pop() if strengths is not None else None
    model.load_state_dict(buffers, strict=False)
    return total.detach(), deltas, dict(zip(named, gradients, strict=True)), of_strengths


def models() -> dict[str, tuple[nn.Module, Tensor, Tensor, list[str]]]:
    """Families with two blocks in order of execution, and models whose blocks are nested or bypassed."""
    found = {}
    for name in FAMILIES:
        model, images, target = family(name)
        blocks = [*FAMILIES[name][3:]]
        names = [n for n, _ in model.named_modules()]
        found[name] = (model, images, target, sorted(blocks, key=names.index)[:2])
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_wrapper_and_task(name: str, steps: int, norm: Any) -> None:
    model, images, target, blocks = models()[name]
    options: dict[str, Any] = {"steps": steps, "norm": norm, "alpha": "2%"}
    state = torch.get_rng_state()
    loss, deltas, gradients, _ = plain(
        model, images, target, blocks, steps=steps, alpha=0.02, norm=norm, relative_sizes=True
    )
    end = torch.get_rng_state()
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    alfa = AlfaWrapper(model, F.cross_entropy, blocks[::-1], joint=True, **options)
    task = AlfaTask(model, F.cross_entropy, blocks, joint=True, verbose=False, **options)

    def by_wrapper() -> Tensor:
        output = alfa(images, target)
        result = AlfaLoss(F.cross_entropy)(output, target)
        assert list(output.adv_outputs) == [" + ".join(blocks[::-1])]
        assert list(output.deltas) == blocks[::-1]
        for block in blocks:
            for one, other in zip(tree_flatten(output.deltas[block])[0], deltas[block], strict=True):
                assert relative(one, other) < TOLERANCE
        return result.loss

    def by_task() -> Tensor:
        step = task(images, target)
        assert all(step["finite"].values())
        assert set(step["loss_adv_by_block"]) == set(blocks)
        total: Tensor = step["loss"]
        return total

    for step in (by_wrapper, by_wrapper, by_task, by_task):  # the first ones watch, the others rely on what they saw
        model.load_state_dict(buffers, strict=False)
        model.zero_grad()
        torch.set_rng_state(state)
        total = step()
        total.backward()
        assert relative(total, loss) < TOLERANCE
        for parameter, error in gradient_errors(model, gradients).items():
            assert error < TOLERANCE, (step, parameter)
        assert torch.equal(torch.get_rng_state(), end)


@pytest.mark.parametrize("grad", ["full", "tail"])
@pytest.mark.parametrize("kind", [Small, UNet])
def test_strengths_and_bypasses(kind: Any, grad: Any) -> None:
    torch.manual_seed(2)
    model = kind().double().train()
    images, target = batch(8)
    images = images.double()
    blocks = {Small: ["stem", "block"], UNet: ["down2", "middle"]}[kind]
    eta = torch.tensor([0.5, 0.5], dtype=torch.float64)
    state = torch.get_rng_state()
    options: dict[str, Any] = {"alpha": 0.01, "steps": 2, "joint": True, "learnable": True, "grad": grad}
    loss, _, gradients, of_eta = plain(
        model, images, target, blocks, steps=2, alpha=0.01, strengths=eta, lam=0.7, tail=blocks[0] * (grad == "tail")
    )
    alfa = AlfaWrapper(model, F.cross_entropy, blocks, **options)
    task = AlfaTask(model, F.cross_entropy, blocks, lam=0.7, verbose=False, **options)

    def by_wrapper() -> tuple[Tensor, Any]:
        alfa.eta.values.grad = None
        total = AlfaLoss(F.cross_entropy, lam=0.7)(alfa(images, target), target).loss
        total.backward()
        return total, alfa.eta.values.grad

    def by_task() -> tuple[Tensor, Any]:
        found = task.step(images, target, 1.0, dict.fromkeys(blocks, 0.7))
        found.loss.backward()
        return found.loss, found.eta_gradient

    for step in (by_wrapper, by_wrapper, by_task, by_task):
        model.zero_grad()
        torch.set_rng_state(state)
        total, slope = step()
        assert relative(total, loss) < TOLERANCE
        assert relative(slope, of_eta) < TOLERANCE
        assert all(error < TOLERANCE for error in gradient_errors(model, gradients).values())


def test_one_block_is_as_without() -> None:
    images, target = batch(8)
    found = []
    for joint in (False, True):
        torch.manual_seed(4)
        model = Small().double().train()
        task = AlfaTask(model, F.cross_entropy, "block", alpha=0.01, steps=3, joint=joint, verbose=False)
        for _ in range(3):
            task(images, target)["loss"].backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_one_tail_for_all() -> None:
    counts = []
    for joint in (False, True):
        model = Small().double().train()
        runs: list[int] = []
        model.head.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        task = AlfaTask(model, F.cross_entropy, ["stem", "block"], steps=3, joint=joint, verbose=False)
        for _ in range(3):
            runs.clear()
            task(*batch(8))["loss"].backward()
        counts.append(len(runs))
    assert counts == [1 + 2 * 3, 1 + 3]


def test_what_does_not_go_with_it() -> None:
    with pytest.raises(ValueError, match="sample_blocks: joint=True"):
        AlfaTask(Small(), F.cross_entropy, ["stem", "block"], joint=True, sample_blocks=1)
    with pytest.raises(TypeError, match="joint ones need a method search"):
        AlfaWrapper(Small(), F.cross_entropy, "block", joint=True, perturbation=Gaussian(0.1))
