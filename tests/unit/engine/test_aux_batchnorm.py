"""Auxiliary batch norms: their own tensors in adversarial passes, none in state dicts, none at evaluation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from toys import Small, batch, family

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper, BlockError
from timm_alfa.engine.aux_batchnorm import AuxBatchNorms, norms_behind


def _norm(kind: str, device: torch.device) -> tuple[nn.Module, Tensor]:
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device)
    if kind == "1d":
        return nn.BatchNorm1d(3).double().to(device), images.mean(3)
    if kind == "act":
        return BatchNormAct2d(3, act_layer=nn.SiLU).double().to(device), images
    options = {"plain": {}, "fixed": {"affine": False}, "untracked": {"track_running_stats": False}}[kind]
    return nn.BatchNorm2d(3, **options).double().to(device), images


@pytest.mark.parametrize("kind", ["plain", "1d", "act", "fixed", "untracked"])
@pytest.mark.parametrize("training", [True, False])
def test_an_active_branch_is_a_second_norm(kind: str, training: bool, device: torch.device) -> None:
    norm, images = _norm(kind, device)
    model = nn.Sequential(norm).train(training)
    aux = AuxBatchNorms(model)
    for parameter in norm.aux.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    other = _norm(kind, device)[0].train(training)
    other.load_state_dict(norm.aux.tensors())
    untouched = copy.deepcopy(norm.state_dict())
    with aux.active():
        assert torch.equal(model(images), other(images))
    for name, tensor in norm.aux.tensors().items():
        assert torch.equal(tensor, other.state_dict()[name])
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor, untouched[name])


def test_gradients_go_to_the_branch_that_computed(device: torch.device) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).to(device)
    aux, images = AuxBatchNorms(model), torch.randn(4, 3, 5, 5, device=device)
    with aux.active():
        loss = model(images).square().mean()
    loss.backward()  # after the switch went back
    assert model[1].weight.grad is None
    assert model[1].aux.weight.grad.norm() > 0
    model.zero_grad()
    model(images).square().mean().backward()
    assert model[1].weight.grad.norm() > 0
    assert model[1].aux.weight.grad is None


def test_synchronised_norms_have_branches_too() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3), SyncBatchNormAct(3)).eval()
    model[1].act, model[1].drop = nn.Identity(), nn.Identity()  # timm sets them when it converts
    aux, images = AuxBatchNorms(model), torch.randn(2, 3, 4, 4)
    nn.init.constant_(model[0].aux.weight, 3.0)
    plain = model(images)
    with aux.active():
        torch.testing.assert_close(model(images), 3 * plain)


def test_state_dicts_are_those_of_the_plain_model() -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    keys, weights = list(model.state_dict()), copy.deepcopy(model.state_dict())
    aux = AuxBatchNorms(model)
    assert list(model.state_dict()) == keys
    assert model.load_state_dict(weights) == ([], [])
    assert list(copy.deepcopy(model).state_dict()) == keys
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith("aux.weight") for name in names)
    aux.remove()
    aux.remove()
    assert [name for name, _ in model.named_parameters()] == [key for key in keys if key in names]
    assert len(aux) == 0
    AuxBatchNorms(model)


def test_after_an_error_the_main_branch_is_back() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    weight = model[0].weight

    def fail() -> None:
        with AuxBatchNorms(model).active():
            assert model[0].weight is not weight
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model[0].weight is weight


def test_saved_and_loaded(device: torch.device) -> None:
    first, second = (AuxBatchNorms(Small().to(device)) for _ in range(2))
    images = torch.randn(4, 3, 8, 8, device=device)
    model = Small().to(device)
    aux = AuxBatchNorms(model)
    with aux.active():
        model(images)
    first.load_state_dict(aux.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, aux.state_dict()[name])
    assert not torch.equal(second.state_dict()["stem.1.running_mean"], first.state_dict()["stem.1.running_mean"])
    with pytest.raises(ValueError, match="20 tensors do not fit, the first is"):
        AuxBatchNorms(nn.Sequential(nn.BatchNorm2d(3))).load_state_dict(aux.state_dict())


def test_two_sets_on_one_model_are_refused() -> None:
    model = Small()
    AuxBatchNorms(model)
    with pytest.raises(ValueError, match="already"):
        AuxBatchNorms(model)


def test_norms_behind_a_block(device: torch.device) -> None:
    model, images = Small().to(device), torch.randn(2, 3, 8, 8, device=device)
    assert norms_behind(model, ["block.0"], images) == ["block.1", "neck.1"]
    assert norms_behind(model, ["block"], images) == ["neck.1"]
    with pytest.raises(BlockError, match="no batch norm runs behind 'neck'"):
        norms_behind(model, ["neck"], images)


# ALFA with auxiliary batch norms.


def _reference(model: nn.Module, aux: AuxBatchNorms, images: Tensor, target: Tensor, steps: int) -> Tensor:
    """The objective for Small at ``block``, its tail written out."""

    def tail(feature: Tensor) -> Tensor:
        return model.head(model.neck(feature.mean(dim=(2, 3))))

    feature = model.block(model.stem(images))
    loss = F.cross_entropy(tail(feature), target)
    delta = torch.zeros_like(feature)
    with aux.active():
        kept = aux.state_dict()
        for _ in range(steps):
            delta.requires_grad_()
            attacked = F.cross_entropy(tail(feature.detach() + delta), target)
            (gradient,) = torch.autograd.grad(attacked, delta)
            delta = delta.detach() + 1 / 255 * gradient.sign()
    aux.load_state_dict(kept)
    with aux.active():
        return loss + F.cross_entropy(tail(feature + delta), target)


@pytest.mark.parametrize("as_task", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_alfa_with_auxiliary_norms(steps: int, as_task: bool, device: torch.device) -> None:
    images, target = batch(8, device=device)
    options: dict[str, Any] = {"alpha": 1 / 255, "steps": steps, "bn": "aux"}
    model, plain = (Small(drop=0.0).double().to(device).train() for _ in range(2))
    plain.load_state_dict(model.state_dict())
    plain_aux = AuxBatchNorms(plain)
    if as_task:
        task = AlfaTask(model, nn.CrossEntropyLoss(), ["block"], verbose=False, **options)
        aux = task.engine.aux
    else:
        alfa = AlfaWrapper(model, nn.CrossEntropyLoss(), ["block"], **options)
        aux = alfa.aux
    nn.init.constant_(model.neck[1].aux.weight, 1.5)
    nn.init.constant_(plain.neck[1].aux.weight, 1.5)
    for _ in range(2):
        expected = _reference(plain, plain_aux, images, target, steps)
        expected.backward()
        if as_task:
            loss = task(images, target)["loss"]
        else:
            loss = AlfaLoss(nn.CrossEntropyLoss())(alfa(images, target), target).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for (name, parameter), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12)
    for (name, buffer), (_, other) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-15, msg=name)
    assert aux is not None


def test_alfa_without_a_norm_behind_its_block_is_refused(device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    with pytest.raises(BlockError, match="no batch norm runs behind 'layer4'"):
        AlfaWrapper(model, nn.CrossEntropyLoss(), ["layer4"], bn="aux")(images, target)


def test_life_cycle_with_optimizer_ema_and_checkpoint(device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    plain_keys = list(model.state_dict())
    task = AlfaTask(model, nn.CrossEntropyLoss(), ["layer3"], bn="aux", verbose=False)
    task.engine.check_blocks((3, 64, 64))
    assert task.engine.aux is not None
    assert all(name.startswith("layer4") for name in task.engine.aux.names)
    optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.1, weight_decay=1e-4)
    task.setup_ema(decay=0.5)
    start = task.engine.aux.state_dict()
    for step in range(2):
        task(images, target)["loss"].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
    end = task.engine.aux.state_dict()
    assert all(not torch.equal(start[name], end[name]) for name in start)
    for ema in (False, True):
        state = task.get_checkpoint_state(ema=ema)
        assert list(state["state_dict_ema" if ema else "state_dict"]) == plain_keys
    checkpoint = task.get_checkpoint_state()
    again = AlfaTask(family("resnet", device=device)[0], nn.CrossEntropyLoss(), ["layer3"], bn="aux", verbose=False)
    again.engine.check_blocks((3, 64, 64))
    again.load_checkpoint_state(checkpoint["state_dict"], checkpoint["task_state"])
    assert again.engine.aux is not None
    assert all(torch.equal(tensor, end[name]) for name, tensor in again.engine.aux.state_dict().items())
    task.engine.remove()
    assert [name for name, _ in model.named_parameters()] == [
        key for key in plain_keys if "running" not in key and "num_batches" not in key
    ]
