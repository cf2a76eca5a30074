"""Fast AdvProp: which image goes through what, against plain models; the life cycle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import MEAN, STD, check_life_cycle, checked, small, task_from, train
from torch import nn
from toys import batch

from timm_alfa import UsageError
from timm_alfa.peers import FastAdvPropTask, PixelAttack


def _task(model: nn.Module, share: float = 0.25, init: Any = "zero") -> FastAdvPropTask:
    attack = PixelAttack(2.0, 1.0, 1, MEAN, STD, init)
    return FastAdvPropTask(model, nn.CrossEntropyLoss(), attack, share=share, verbose=False)


def test_parity_with_two_plain_models(device: torch.device) -> None:
    images, target = batch(8, batch_size=8, device=device)
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = images.clamp((0.1 - mean) / std, (0.9 - mean) / std)
    model = small(drop=0.0, device=device)
    clean_model, adversarial_model = copy.deepcopy(model), copy.deepcopy(model)
    result = _task(model)(images, target)
    result["loss"].backward()

    clean = F.cross_entropy(clean_model(images[:6]), target[:6])
    leaf = images[6:].clone().requires_grad_()
    start = F.cross_entropy(adversarial_model(leaf), target[6:])
    (gradient,) = torch.autograd.grad(start, leaf, retain_graph=True)
    end = F.cross_entropy(adversarial_model(images[6:] + gradient.sign() / 255 / std), target[6:])
    expected = 6 / 8 * clean + 1 / 8 * start + 1 / 8 * end
    expected.backward()

    torch.testing.assert_close(result["loss"], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(result["loss_adv"], ((start + end) / 2).detach(), rtol=1e-10, atol=0)
    own = dict(model.named_parameters())
    norms = {name for name, module in model.named_modules() if hasattr(module, "aux")}
    adversarial = dict(adversarial_model.named_parameters())
    for name, parameter in clean_model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in norms:
            torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-8, atol=1e-13)
            torch.testing.assert_close(own[f"{owner}.aux.{kind}"].grad, adversarial[name].grad, rtol=1e-8, atol=1e-13)
        else:
            total = parameter.grad + adversarial[name].grad
            torch.testing.assert_close(own[name].grad, total, rtol=1e-8, atol=1e-13)
    buffers = dict(model.named_buffers())
    other = dict(adversarial_model.named_buffers())
    for name, buffer in clean_model.named_buffers():
        owner, _, kind = name.rpartition(".")
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(buffers[f"{owner}.aux.{kind}"], other[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("size", "share", "attacked"), [(8, 0.01, 1), (8, 0.99, 7), (10, 0.2, 2), (4, 0.5, 2)])
def test_how_many_images_are_attacked(size: int, share: float, attacked: int, device: torch.device) -> None:
    images, target = batch(8, batch_size=size, device=device)
    model = small(device=device)
    model.neck[1] = nn.Identity()  # one image has no variance over the batch
    assert len(_task(model, share)(images, target)["output"]) == size - attacked


def test_a_single_image_is_refused(device: torch.device) -> None:
    images, target = batch(8, batch_size=1, device=device)
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        _task(small(device=device))(images, target)


def test_compiled(device: torch.device) -> None:
    found = []
    for compiled in (False, True):
        model = small(drop=0.0, device=device)
        task = FastAdvPropTask(
            model, nn.CrossEntropyLoss(), PixelAttack(2.0, 1.0, 1, MEAN, STD), share=0.5, verbose=False
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if compiled:
            torch.compiler.reset()
            task.compile(backend="aot_eager")
        found.append(train(task, optimizer, steps=2))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


def test_life_cycle(device: torch.device) -> None:
    check_life_cycle("--method", "fast-advprop", "--fast-advprop-share", "0.5", device=device)


def test_summary(device: torch.device) -> None:
    task = task_from(small(device=device), "--method", "fast-advprop")
    assert task.summary_lines() == [
        "Fast AdvProp: PGD-1, eps 1/255, alpha 1/255, uniform start, 20% of each batch, 3 auxiliary batch norms"
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--fast-advprop-share", "0"], "--fast-advprop-share 0.0: expected a share between 0 and 1"),
        (["--fast-advprop-share", "1"], "--fast-advprop-share 1.0: expected a share between 0 and 1"),
        (["--fast-advprop-eps", "-1"], "--fast-advprop-eps -1.0: expected at least 0"),
        (["--fast-advprop-alpha", "0"], "--fast-advprop-alpha 0.0: expected a finite step above 0"),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked("--method", "fast-advprop", *argv)
    with pytest.raises(UsageError, match="has no effect without --method fast-advprop"):
        checked(*argv)


def test_bad_attack(device: torch.device) -> None:
    with pytest.raises(ValueError, match="expected one step and no targets"):
        FastAdvPropTask(small(device=device), nn.CrossEntropyLoss(), PixelAttack(1.0, 1.0, 2, MEAN, STD))
    with pytest.raises(ValueError, match="share: "):
        _task(small(device=device), share=1.0)
