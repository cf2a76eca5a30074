"""Images without a target: they are perturbed, their divergence counts, and the clean loss does not see them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Small, batch

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.loss import divergence
from timm_alfa.tasks.unlabeled import LabelledLoss, VirtualLoss

OPTIONS = {"alpha": "2%", "eps": "2%", "init": "uniform", "steps": 2}


def _gradients(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_the_virtual_loss_by_hand(device: torch.device):
    output = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], dtype=torch.float64, device=device)
    target = torch.tensor([1], device=device)
    found = VirtualLoss(F.cross_entropy)(output, target)
    likeliest = -(output[1:].softmax(1).max(1).values.log().mean())
    torch.testing.assert_close(found, F.cross_entropy(output[:1], target) + likeliest)
    torch.testing.assert_close(LabelledLoss(F.cross_entropy)(output, target), F.cross_entropy(output[:1], target))
    torch.testing.assert_close(VirtualLoss(F.cross_entropy)(output[:1], target), F.cross_entropy(output[:1], target))


def test_the_task_equals_the_wrapper_and_moves_every_image(device: torch.device):
    model = Small().double().to(device).train()
    images, target = batch(6, 8, device=device)
    images, target = images.double(), target[:4]
    block = [name for name, _ in model.named_children()][1]
    own, other = copy.deepcopy(model), copy.deepcopy(model)

    torch.manual_seed(0)
    wrapper = AlfaWrapper(own, VirtualLoss(F.cross_entropy), block, **OPTIONS)
    output = wrapper(images, target)
    expected = AlfaLoss(LabelledLoss(F.cross_entropy), objective="kl")(output, target).loss
    by_hand = F.cross_entropy(output.output[:4], target) + divergence(output.output, output.adv_outputs[block])
    torch.testing.assert_close(expected, by_hand, rtol=1e-12, atol=0)
    moved = (output.adv_outputs[block] - output.output).abs().sum(1)
    assert (moved > 0).all()
    wanted = _gradients(own, expected)

    torch.manual_seed(0)
    task = AlfaTask(other, F.cross_entropy, block, objective="kl", unlabeled=True, verbose=False, **OPTIONS)
    loss = task(images, target)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    for parameter, gradient in zip(other.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_the_attack_raises_the_divergence_of_images_without_a_target_more_than_noise_does(device: torch.device):
    torch.manual_seed(1)
    # No batch norm: it would hand the attack on labelled images on to the others.
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2))
    model.extend([nn.Flatten(), nn.Linear(32, 10)]).double().to(device)
    images, target = batch(8, 32, device=device)
    images, target = images.double(), target[:4]
    block = "1"
    rises = []
    for alpha in ("5%", 1e-12):
        torch.manual_seed(2)
        wrapper = AlfaWrapper(
            model.train(), VirtualLoss(F.cross_entropy), block, alpha=alpha, eps="5%", init="uniform", steps=3
        )
        output = wrapper(images, target)
        rises.append(divergence(output.output[4:], output.adv_outputs[block][4:]).item())
    assert rises[0] > 2 * rises[1]


@pytest.mark.parametrize("options", [{"objective": "ce", "init": "uniform", "eps": 0.1}, {"objective": "kl"}])
def test_what_needs_a_target_is_refused(options: dict):
    with pytest.raises(ValueError, match="unlabeled: needs objective='kl' and init='uniform'"):
        AlfaTask(Small(), F.cross_entropy, "@last", unlabeled=True, verbose=False, **options)
