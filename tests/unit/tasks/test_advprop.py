"""AdvProp: the objective against plain training and split batch norms, which branch learns what, the life cycle."""

from __future__ import annotations

import copy
from typing import Any

import processes
import pytest
import timm
import torch
import torch.nn.functional as F
from peers import MEAN, STD, check_life_cycle, checked, small, task_from, train
from rng import rng_state, set_rng_state
from timm.layers import convert_splitbn_model
from torch import Tensor, nn
from toys import batch, family

from timm_alfa import UsageError
from timm_alfa.peers import AdvPropTask, PixelAttack
from timm_alfa.utils.distributed import leave_group


def _task(model: nn.Module, *, eps: float = 4.0, steps: int = 2, init: Any = "zero", **options: Any) -> AdvPropTask:
    attack = PixelAttack(eps, 1.0, steps, MEAN, STD, init, options.pop("targeted", False))
    return AdvPropTask(model, nn.CrossEntropyLoss(), attack, verbose=False, **options)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_without_perturbation_it_is_plain_training_on_a_doubled_batch_with_split_statistics(
    device: torch.device,
) -> None:
    model = small(drop=0.0)
    model.neck[1] = nn.Identity()  # timm splits two-dimensional norms
    split = convert_splitbn_model(copy.deepcopy(model), 2).double().to(device)
    model.to(device)
    images, target = batch(8, device=device)
    task = _task(model, eps=0.0, reduction="mean")
    for _ in range(2):
        result = task(images, target)
        result["loss"].backward()
        loss = F.cross_entropy(split(torch.cat([images, images])), torch.cat([target, target]))
        loss.backward()
        torch.testing.assert_close(result["loss"], loss, rtol=1e-12, atol=0)
    expected = {name.replace("aux_bn.0", "aux"): gradient for name, gradient in _gradients(split).items()}
    found = _gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-14, msg=name)
    buffers = {name.replace("aux_bn.0", "aux"): buffer for name, buffer in split.named_buffers()}
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-12, atol=1e-15, msg=name)


@pytest.mark.parametrize("attack_bn", ["train", "eval"])
@pytest.mark.parametrize("name", ["resnet", "efficientnet", "vit"])
def test_parity_with_two_plain_models(name: str, attack_bn: str, device: torch.device) -> None:
    """One plain model for each kind of image; what is not a batch norm they would share."""
    model, images, target = family(name, device=device)
    clean_model, adversarial_model = copy.deepcopy(model), copy.deepcopy(model)
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    low, high = (0 - mean) / std, (1 - mean) / std
    images = images.clamp(low, high)
    task = _task(model, eps=3.0, attack_bn=attack_bn)
    state = rng_state(device)
    result = task(images, target)
    result["loss"].backward()
    end = rng_state(device)

    set_rng_state(state, device)
    clean = F.cross_entropy(clean_model(images), target)
    assert torch.equal(rng_state(device), end)
    perturbed = images
    for _ in range(2):
        attacked = copy.deepcopy(adversarial_model).train(attack_bn == "train")
        leaf = perturbed.detach().requires_grad_()
        set_rng_state(state, device)
        F.cross_entropy(attacked(leaf), target).backward()
        perturbed = leaf.detach() + 1 / 255 / std * leaf.grad.sign()
        perturbed = torch.minimum(torch.maximum(perturbed, images - 3 / 255 / std), images + 3 / 255 / std)
        perturbed = torch.minimum(torch.maximum(perturbed, low), high)
    set_rng_state(state, device)
    adversarial = F.cross_entropy(adversarial_model(perturbed), target)
    (clean + adversarial).backward()

    torch.testing.assert_close(result["loss"], clean + adversarial, rtol=1e-9, atol=0)
    torch.testing.assert_close(result["loss_adv"], adversarial.detach(), rtol=1e-9, atol=0)
    own, of_clean, of_adversarial = (_gradients(m) for m in (model, clean_model, adversarial_model))
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for key, gradient in of_clean.items():
        owner, _, kind = key.rpartition(".")
        if owner in norms:  # each kind of image trains its own branch, and nothing else does
            torch.testing.assert_close(own[key], gradient, rtol=1e-7, atol=1e-12, msg=key)
            torch.testing.assert_close(own[f"{owner}.aux.{kind}"], of_adversarial[key], rtol=1e-7, atol=1e-12, msg=key)
        else:
            torch.testing.assert_close(own[key], gradient + of_adversarial[key], rtol=1e-7, atol=1e-11, msg=key)
    buffers = dict(model.named_buffers())
    for key, buffer in clean_model.named_buffers():
        owner, _, kind = key.rpartition(".")
        torch.testing.assert_close(buffers[key], buffer, rtol=1e-12, atol=1e-15)
        if owner in norms:
            other = dict(adversarial_model.named_buffers())[key]
            torch.testing.assert_close(buffers[f"{owner}.aux.{kind}"], other, rtol=1e-12, atol=1e-15)


def test_targeted_with_soft_targets_and_random_start(device: torch.device) -> None:
    images, target = batch(8, device=device)
    soft = F.one_hot(target, 10) * 0.8 + 0.02
    result = _task(small(device=device), init="uniform", targeted=True)(images, soft)
    assert result["loss"].isfinite()
    torch.testing.assert_close(result["loss"].detach(), result["loss_clean"] + result["loss_adv"])


def test_checkpointing_changes_nothing(device: torch.device) -> None:
    found = []
    for checkpointing in (False, True):
        model, images, target = family("resnet", device=device)
        model.set_grad_checkpointing(checkpointing)
        task = _task(model)
        result = task(images, target)
        result["loss"].backward()
        found.append({**_gradients(model), "loss": result["loss"].detach()})
        assert all(getattr(module, "grad_checkpointing", checkpointing) == checkpointing for module in model.modules())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-13, msg=name)


def test_compiled(device: torch.device) -> None:
    found = []
    for compiled in (False, True):
        task = task_from(small(drop=0.0, device=device), "--method", "advprop", "--advprop-init", "zero")
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
        if compiled:
            torch.compiler.reset()
            task.compile(backend="aot_eager")
        found.append(train(task, optimizer, steps=3))
        assert list(task.get_checkpoint_state()["state_dict"]) == list(small(device=device).state_dict())
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


def test_distributed(tmp_path: Any, device: torch.device) -> None:
    images, target = batch(8, device=device)
    alone = _task(small(drop=0.0, device=device))
    alone(images, target)["loss"].backward()
    device = processes.join_group(0, 1, str(tmp_path), device)
    try:
        model = small(drop=0.0, device=device)
        task = _task(model)
        task.prepare_distributed(None if device.type == "cpu" else [device])
        for _ in range(2):  # DDP complains in the second step about what the first left unused
            model.zero_grad()
            task(images, target)["loss"].backward()
        assert list(task.get_checkpoint_state()["state_dict"]) == list(small(device=device).state_dict())
        assert task.epoch_metrics()["loss_clean"] > 0
        expected = _gradients(alone.get_trainable_module())
        for name, gradient in _gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-14, msg=name)
    finally:
        leave_group()


def test_evaluation_is_the_plain_model(device: torch.device) -> None:
    images, target = batch(8, device=device)
    model = small(device=device)
    plain = copy.deepcopy(model).eval()
    task = _task(model)
    nn.init.zeros_(model.neck[1].aux.weight)
    model.eval()
    with torch.no_grad():
        result = task(images, target)
        assert torch.equal(result["output"], plain(images))
    assert task.passes == 0


def test_life_cycle(device: torch.device) -> None:
    check_life_cycle("--method", "advprop", "--advprop-steps", "2", device=device)


def test_model_without_batch_norms(device: torch.device) -> None:
    model = timm.create_model("test_vit", num_classes=10, img_size=32).to(device)
    task = _task(model)
    assert "0 auxiliary batch norms" in task.summary_lines()[0]
    images, target = batch(32, dtype=torch.float32, device=device)
    assert task(images, target)["loss"].isfinite()


def test_state_of_another_model_is_refused(device: torch.device) -> None:
    state = _task(small(device=device)).get_task_state()
    with pytest.raises(UsageError, match="auxiliary batch norms: "):
        _task(nn.Sequential(nn.BatchNorm2d(3))).load_task_state(state)


def test_reports(device: torch.device) -> None:
    task = task_from(small(device=device), "--method", "advprop", "--advprop-eps", "2", "--advprop-targeted")
    assert task.interval_text() == ""
    losses = train(task, torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.0), steps=2)
    assert task.interval_text().startswith("Clean: ")
    metrics = task.epoch_metrics()
    assert metrics["loss_clean"] + metrics["loss_adv"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert task.epoch_metrics()["loss_clean"] != task.epoch_metrics()["loss_clean"]  # NaN: nothing was measured
    assert task.summary_lines() == [
        "AdvProp: PGD-1, eps 2/255, alpha 1/255, uniform start, targeted, attack in train mode, sum, "
        "3 auxiliary batch norms"
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "advprop", "--advprop-eps", "-1"], "--advprop-eps -1.0: expected at least 0"),
        (["--method", "advprop", "--advprop-alpha", "0"], "--advprop-alpha 0.0: expected a finite step above 0"),
        (["--method", "advprop", "--advprop-alpha", "nan"], "--advprop-alpha nan: expected a finite step above 0"),
        (["--method", "advprop", "--advprop-steps", "0"], "--advprop-steps 0: expected a whole number of at least 1"),
        (["--advprop-steps", "2"], "--advprop-steps 2: has no effect without --method advprop"),
        (["--advprop-targeted"], "--advprop-targeted: has no effect without --method advprop"),
        (["--method", "advprop", "--alfa-blocks", "block"], "--alfa-blocks block: has no effect with --method advprop"),
    ],
)
def test_bad_flags(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked(*argv)
