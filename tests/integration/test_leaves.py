"""Gradients of whatever the loss depends on, and hooks: AlfaTask against AlfaWrapper and against plain hooks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import lively, relative
from reference.plain_alfa import plain_alfa
from rng import rng_state, set_rng_state
from torch import Tensor, nn
from toys import InPlace, Shared, Small, UNet, batch, family

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.perturbation import Gaussian
from timm_alfa.tasks.noise import NoiseTask
from timm_alfa.utils.distributed import leave_group

ALPHA = 0.02
BLOCKS: dict[type[nn.Module], list[str]] = {
    UNet: ["down2", "middle", "up"],
    Shared: ["stem", "block"],
    InPlace: ["stem", "skip", "block"],
    Small: ["stem", "block", "neck"],
}


class Proxies(nn.Module):
    """A metric-learning loss with weights of its own, and a learned temperature; its loss has the shape [1]."""

    def __init__(self) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(10, 10, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        similarity = F.normalize(output) @ F.normalize(self.proxies).T
        return F.cross_entropy(similarity * 8 * self.log_scale.exp(), target) + self.log_scale.square()


def weighted(weight: Tensor, output: Tensor, target: Tensor) -> Tensor:
    """A plain function that holds on to a learned weight per class."""
    return F.cross_entropy(output * weight, target)


@dataclass
class Setting:
    """What a step depends on: a model, a criterion, a stem in front, labels; and the leaves of all of them."""

    model: nn.Module
    criterion: Callable[[Any, Any], Tensor]
    stem: Callable[[Tensor], Tensor]
    images: Tensor
    target: Tensor
    leaves: dict[str, Tensor]
    calls: list[str] = field(default_factory=list)

    def hook(self, names: list[str]) -> None:
        for name in names:
            leaf = self.leaves[name]
            leaf.register_hook(partial(self._halve, name))
            leaf.register_post_accumulate_grad_hook(lambda leaf, name=name: self.calls.append(f"after {name}"))

    def _halve(self, name: str, gradient: Tensor) -> Tensor:
        self.calls.append(name)
        return gradient / 2

    def clear(self) -> None:
        self.calls.clear()
        for leaf in self.leaves.values():
            leaf.grad = None


def make(
    kind: type[nn.Module],
    criterion: str,
    in_front: str,
    labels: str,
    frozen: list[int],
    seed: int,
    device: torch.device,
) -> Setting:
    torch.manual_seed(seed)
    model = lively(kind().double().to(device).train())
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index not in frozen)
    leaves: dict[str, Tensor] = {f"model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    images, target = batch(8, device=device)
    stem: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    if in_front == "stem":
        stem = nn.Conv2d(3, 3, 3, padding=1).double().to(device)
        leaves |= {f"in front.{n}": p for n, p in stem.named_parameters()}
    elif in_front == "prompt":
        prompt = torch.zeros(1, 3, 8, 8, dtype=torch.float64, device=device, requires_grad=True)
        stem, leaves["prompt"] = prompt.add, prompt
    elif in_front == "images":
        leaves["images"] = images.requires_grad_()
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    if criterion == "module":
        loss = Proxies().to(device)
        leaves |= {f"criterion.{n}": p for n, p in loss.named_parameters()}
    elif criterion == "closure":
        weight = torch.ones(10, dtype=torch.float64, device=device, requires_grad=True)
        loss, leaves["weight"] = partial(weighted, weight), weight
    if labels != "hard":
        target = F.one_hot(target, 10).double() * 0.9 + 0.01
        if labels == "learned":
            leaves["target"] = target.requires_grad_()
    return Setting(model, loss, stem, images, target, leaves)


@settings(max_examples=60)
@given(data=st.data())
def test_every_leaf_gets_what_plain_hooks_give_it(data: st.DataObject, device: torch.device) -> None:
    kind = data.draw(st.sampled_from(list(BLOCKS)), "model")
    blocks = data.draw(st.lists(st.sampled_from(BLOCKS[kind]), min_size=1, max_size=3, unique=True), "blocks")
    parts = {
        "criterion": data.draw(st.sampled_from(["plain", "module", "closure"]), "criterion"),
        "in_front": data.draw(st.sampled_from(["nothing", "stem", "prompt", "images"]), "in front"),
        "labels": data.draw(st.sampled_from(["hard", "soft", "learned"]), "labels"),
        "frozen": data.draw(st.lists(st.integers(0, 7), max_size=4, unique=True), "frozen"),
        "seed": data.draw(st.integers(0, 3), "seed"),
        "device": device,
    }
    attack: dict[str, Any] = {
        "alpha": ALPHA,
        "norm": "l2",
        "steps": data.draw(st.integers(1, 2), "steps"),
        "grad": data.draw(st.sampled_from(["full", "tail"]), "grad"),
    }
    lam = data.draw(st.sampled_from([0.0, 0.7]), "lam")
    reduction: Any = data.draw(st.sampled_from(["sum", "mean"]), "reduction")
    by_task, by_wrapper, by_hooks = (make(kind, **parts) for _ in range(3))
    hooked = data.draw(st.lists(st.sampled_from(sorted(by_task.leaves)), max_size=4, unique=True), "hooks")
    by_task.hook(hooked)
    by_wrapper.hook(hooked)
    task = AlfaTask(
        by_task.model, by_task.criterion, blocks, lam=lam, reduction=reduction, device=device, verbose=False, **attack
    )
    wrapper = AlfaWrapper(by_wrapper.model, by_wrapper.criterion, blocks, **attack)
    loss_fn = AlfaLoss(by_wrapper.criterion, lam, reduction=reduction)
    for _ in range(2):  # the first step looks for what bypasses the blocks
        by_task.clear(), by_wrapper.clear()
        state = rng_state(device)
        task(by_task.stem(by_task.images), by_task.target)["loss"].backward()
        set_rng_state(state, device)
        loss_fn(wrapper(by_wrapper.stem(by_wrapper.images), by_wrapper.target), by_wrapper.target).loss.backward()
        set_rng_state(state, device)
        expected = plain_alfa(
            by_hooks.model,
            by_hooks.criterion,
            by_hooks.stem(by_hooks.images),
            by_hooks.target,
            blocks,
            lam=lam,
            reduction=reduction,
            others={k: v for k, v in by_hooks.leaves.items() if not k.startswith("model.")},
            **attack,
        ).gradients
        assert sorted(by_task.calls) == sorted(by_wrapper.calls)
        assert len(by_task.calls) == len(set(by_task.calls))
        floor = 1e-6 * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
        for name, leaf in by_task.leaves.items():
            whole = expected[name.removeprefix("model.")] / (2 if name in hooked else 1)
            assert relative(leaf.grad, whole, floor) < 1e-9, name
            assert relative(leaf.grad, by_wrapper.leaves[name].grad, floor) < 1e-9, name
            assert (leaf.grad is None) == (by_wrapper.leaves[name].grad is None), name


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_noise_reaches_every_leaf_too(lam: float, device: torch.device) -> None:
    by_task, by_wrapper = (make(UNet, "module", "stem", "learned", [], 0, device) for _ in range(2))
    task = NoiseTask(by_task.model, by_task.criterion, "middle", sigma=0.1, lam=lam, device=device, verbose=False)
    wrapper = AlfaWrapper(by_wrapper.model, by_wrapper.criterion, "middle", perturbation=Gaussian(0.1))
    loss_fn = AlfaLoss(by_wrapper.criterion, lam)
    by_task.hook(list(by_task.leaves))
    by_wrapper.hook(list(by_wrapper.leaves))
    for _ in range(2):
        by_task.clear(), by_wrapper.clear()
        state = rng_state(device)
        task(by_task.stem(by_task.images), by_task.target)["loss"].backward()
        set_rng_state(state, device)
        loss_fn(wrapper(by_wrapper.stem(by_wrapper.images), by_wrapper.target), by_wrapper.target).loss.backward()
        assert sorted(by_task.calls) == sorted(by_wrapper.calls)
        assert len(by_task.calls) == 2 * len(by_task.leaves)
        for name, leaf in by_task.leaves.items():
            torch.testing.assert_close(leaf.grad, by_wrapper.leaves[name].grad, rtol=1e-9, atol=1e-12)


def test_hooks_are_back_after_an_error(device: torch.device) -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise ArithmeticError

    setting = make(Small, "plain", "nothing", "hard", [], 0, device)
    setting.hook(list(setting.leaves))
    task = AlfaTask(
        setting.model, lambda output, target: F.cross_entropy(Breaks.apply(output), target), "block", verbose=False
    )
    with pytest.raises(ArithmeticError):
        task(setting.images, setting.target)
    sum(leaf.sum() for leaf in setting.leaves.values()).backward()
    assert sorted(call for call in setting.calls if not call.startswith("after")) == sorted(setting.leaves)


def test_a_hook_that_is_removed_in_between_is_gone(device: torch.device) -> None:
    setting = make(Small, "plain", "nothing", "hard", [], 0, device)
    calls: list[Tensor] = []
    handle = setting.model.head.weight.register_hook(calls.append)
    task = AlfaTask(setting.model, setting.criterion, "block", verbose=False)
    task(setting.images, setting.target)["loss"].backward()
    handle.remove()
    task(setting.images, setting.target)["loss"].backward()
    assert len(calls) == 1


def test_sparse_gradients_of_a_criterion() -> None:
    class Centers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centers = nn.Embedding(10, 10, sparse=True, dtype=torch.float64)

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target) + (output - self.centers(target)).square().mean()

    found = []
    for kind in ("task", "wrapper"):
        setting = make(Small, "plain", "nothing", "hard", [], 0, processes.CPU)
        centers = Centers()
        centers.load_state_dict({"centers.weight": torch.arange(100, dtype=torch.float64).reshape(10, 10) / 50})
        if kind == "task":
            task = AlfaTask(setting.model, centers, ["stem", "block"], norm="l2", verbose=False)
            loss = task(setting.images, setting.target)["loss"]
        else:
            wrapper = AlfaWrapper(setting.model, centers, ["stem", "block"], norm="l2")
            loss = AlfaLoss(centers)(wrapper(setting.images, setting.target), setting.target).loss
        (2 * loss).backward()
        found.append(centers.centers.weight.grad)
    assert found[0].is_sparse
    torch.testing.assert_close(found[0].to_dense(), found[1].to_dense(), rtol=1e-9, atol=1e-14)


def test_gradients_retained_on_what_goes_in(device: torch.device) -> None:
    setting = make(UNet, "plain", "stem", "hard", [], 0, device)
    setting.model.drop.p = 0.0
    task = AlfaTask(setting.model, setting.criterion, "middle", alpha=ALPHA, norm="l2", verbose=False)
    wrapper = AlfaWrapper(copy.deepcopy(setting.model), setting.criterion, "middle", alpha=ALPHA, norm="l2")
    loss_fn = AlfaLoss(setting.criterion)
    for _ in range(2):
        images, others = (setting.stem(setting.images) for _ in range(2))
        images.retain_grad(), others.retain_grad()
        task(images, setting.target)["loss"].backward()
        loss_fn(wrapper(others, setting.target), setting.target).loss.backward()
        torch.testing.assert_close(images.grad, others.grad, rtol=1e-9, atol=1e-14)


def test_a_loss_on_the_output_is_refused_not_ignored(device: torch.device) -> None:
    setting = make(Small, "plain", "nothing", "hard", [], 0, device)
    result = AlfaTask(setting.model, setting.criterion, "block", verbose=False)(setting.images, setting.target)
    with pytest.raises(RuntimeError, match=r"output of an AlfaTask is freed.*AlfaWrapper"):
        (result["loss"] + result["output"].mean()).backward()


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_family_with_a_stem_and_proxies(name: str, device: torch.device) -> None:
    found = []
    blocks = ["layer2", "layer4"] if name == "resnet" else ["blocks.0", "blocks.2"]
    for kind in ("task", "wrapper"):
        model, images, target = family(name, device=device)
        lively(model)
        torch.manual_seed(5)
        stem, criterion = nn.Conv2d(3, 3, 1).double().to(device), Proxies().to(device)
        parameters = [*model.parameters(), *stem.parameters(), *criterion.parameters()]
        for parameter in parameters:
            parameter.register_hook(lambda gradient: gradient / 2)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = None
            if kind == "task":
                task = AlfaTask(model, criterion, blocks, norm="l2", device=device, verbose=False)
                loss = task(stem(images), target)["loss"]
            else:
                loss = AlfaLoss(criterion)(
                    AlfaWrapper(model, criterion, blocks, norm="l2")(stem(images), target), target
                ).loss
            loss.backward()
        found.append([parameter.grad for parameter in parameters])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


def _rank(rank: int, world_size: int, folder: str, log: str, device: torch.device) -> None:
    device = processes.join_group(rank, world_size, folder, device)
    logging.basicConfig(filename=f"{log}-{rank}.txt", format="%(message)s", force=True)
    mine = slice(4 * rank, 4 * rank + 4)
    found = {}
    for criterion in ("module", "closure"):
        setting = make(Small, criterion, "stem", "hard", [], 0, device)
        setting.model.drop.p = 0.0
        images, target = batch(8, 4 * world_size, device=device)
        task = AlfaTask(setting.model, setting.criterion, "block", alpha=ALPHA, norm="l2", device=device, verbose=False)
        task.prepare_distributed(None if device.type == "cpu" else [device])
        for _ in range(2):
            setting.clear()
            task(setting.stem(images[mine]), target[mine])["loss"].backward()
        found[criterion] = {name: leaf.grad for name, leaf in setting.leaves.items()}
        count = sum(len(parameter) for parameter in task.get_clip_parameters())
        assert count == sum(len(parameter) for parameter in setting.model.parameters())
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.ranks(2)
def test_ranks_average_the_gradients_of_a_criterion_and_say_what_they_do_not(
    tmp_path: Path, world_size: int, device: torch.device
) -> None:
    processes.call_ranks(_rank, (world_size, str(tmp_path), str(tmp_path / "log"), device), world_size, device)
    by_rank = [torch.load(tmp_path / f"{rank}.pt", map_location=device) for rank in range(world_size)]
    images, target = batch(8, 4 * world_size, device=device)
    for criterion in ("module", "closure"):
        expected = []
        for rank in range(world_size):
            setting = make(Small, criterion, "stem", "hard", [], 0, device)
            setting.model.drop.p = 0.0
            wrapper = AlfaWrapper(setting.model, setting.criterion, "block", alpha=ALPHA, norm="l2")
            mine = slice(4 * rank, 4 * rank + 4)
            loss_fn = AlfaLoss(setting.criterion)
            loss_fn(wrapper(setting.stem(images[mine]), target[mine]), target[mine]).loss.backward()
            expected.append({name: leaf.grad for name, leaf in setting.leaves.items()})
        for name in expected[0]:
            mean = torch.stack([one[name] for one in expected]).mean(0)
            averaged = name.startswith(("model.", "criterion."))
            for rank in range(world_size):
                whole = mean if averaged else expected[rank][name]
                torch.testing.assert_close(by_rank[rank][criterion][name], whole, rtol=1e-9, atol=1e-13)
    for rank in range(world_size):
        lines = (tmp_path / f"log-{rank}.txt").read_text().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("the loss depends on 1 tensors outside of the model and the criterion's modules (of")
