"""AlfaTask: the gradients of the plain objective, and everything that timm's training loop asks of a task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import processes
import pytest
import timm
import torch
import torch.nn.functional as F
from parity import gradient_errors
from reference.plain_alfa import plain_alfa
from rng import rng_state, set_rng_state
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from toys import FAMILIES, Dependent, Nested, Shared, Small, UNet, batch, family
from untouched import picture

from timm_alfa import AlfaTask
from timm_alfa.utils.distributed import leave_group

ALPHA = 1.0 / 255


def _check(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    blocks: list[str],
    *,
    criterion: Any = F.cross_entropy,
    lam: float = 0.7,
    reduction: Any = "sum",
    **options: Any,
) -> None:
    """Three steps: the first one looks for what bypasses the blocks, the others cut the graph there."""
    device = images.device
    task = AlfaTask(model, criterion, blocks, alpha=ALPHA, lam=lam, reduction=reduction, verbose=False, **options)
    plain = copy.deepcopy(model)
    for _ in range(3):
        state = rng_state(device)
        expected = plain_alfa(
            plain, criterion, images, target, blocks, alpha=ALPHA, lam=lam, reduction=reduction, **options
        )
        end = rng_state(device)
        set_rng_state(state, device)
        model.zero_grad()
        result = task(images, target)
        result["loss"].backward()
        assert torch.equal(rng_state(device), end)
        torch.testing.assert_close(result["loss"].detach(), expected.loss.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(result["loss_clean"], expected.clean.detach(), rtol=1e-9, atol=0)
        adversarial = torch.stack(list(expected.adversarial.values())).detach()
        torch.testing.assert_close(result["loss_adv"], adversarial.mean(), rtol=1e-9, atol=0)
        for name, error in gradient_errors(model, expected.gradients).items():
            assert error < 1e-9, name
        for (name, buffer), (_, other) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
            assert torch.equal(buffer, other), name


@pytest.mark.parametrize(("steps", "grad", "reduction"), [(1, "full", "sum"), (3, "tail", "mean"), (3, "full", "sum")])
@pytest.mark.parametrize("name", FAMILIES)
def test_parity(name: str, steps: int, grad: str, reduction: str, device: torch.device) -> None:
    model, images, target = family(name, device=device)
    _check(model, images, target, list(FAMILIES[name][3:]), steps=steps, grad=grad, reduction=reduction)


@pytest.mark.parametrize("grad", ["full", "tail"])
@pytest.mark.parametrize(
    "blocks",
    [["layer1.0.bn1"], ["layer2.0.bn2"], ["layer3.0.downsample", "layer2.0.bn2"], ["layer3", "layer3.0"], ["layer4"]],
)
@pytest.mark.parametrize("norm", ["linf", "l2"])  # l2 normalises sample by sample, linf forgives a wrong factor
def test_parity_inside_residual_blocks(blocks: list[str], grad: str, norm: str, device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    _check(model, images, target, blocks, steps=2, grad=grad, norm=norm)


@pytest.mark.parametrize("grad", ["full", "tail"])
def test_parity_with_a_frozen_prefix(grad: str, device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    for child in (model.conv1, model.bn1, model.layer1, model.layer2, model.layer3):
        child.requires_grad_(False)
    _check(model, images, target, ["layer3", "layer4"], steps=2, grad=grad)


@pytest.mark.parametrize("grad", ["full", "tail"])
@pytest.mark.parametrize(
    ("toy", "blocks"),
    [
        (UNet, ["middle"]),
        (UNet, ["down1", "up"]),
        (Shared, ["block"]),
        (UNet, ["middle", "down2"]),
        (Dependent, ["chain"]),
    ],
)
def test_parity_of_awkward_models(toy: type[nn.Module], blocks: list[str], grad: str, device: torch.device) -> None:
    torch.manual_seed(3)
    _check(toy().double().to(device).train(), *batch(12, device=device), blocks, steps=2, grad=grad)


@pytest.mark.parametrize("grad", ["full", "tail"])
def test_parity_of_nested_outputs(grad: str, device: torch.device) -> None:
    _check(
        Nested().double().to(device).train(),
        *batch(12, device=device),
        ["branches"],
        criterion=Nested.criterion,
        steps=2,
        grad=grad,
    )


def test_lambda_zero_is_timms_own_task_bit_for_bit(device: torch.device) -> None:
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=10, drop_rate=0.3, drop_path_rate=0.3).to(device).train()
    model = copy.deepcopy(plain)
    images, target = batch(32, dtype=torch.float32, device=device)
    tasks = [
        ClassificationTask(plain, nn.CrossEntropyLoss(), verbose=False),
        AlfaTask(model, nn.CrossEntropyLoss(), ["@last", "layer2"], lam=0.0, steps=2, verbose=False),
    ]
    for task in tasks:
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
        for _ in range(20):
            optimizer.zero_grad()
            task(images + torch.randn(1, device=device), target)["loss"].backward()
            optimizer.step()
    for (name, value), (_, expected) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name


def _small(device: torch.device, **options: Any) -> tuple[Small, AlfaTask, Tensor, Tensor]:
    model = Small().to(device).train()
    task = AlfaTask(model, nn.CrossEntropyLoss(), "block", verbose=False, **options)
    return model, task, *batch(6, dtype=torch.float32, device=device)


def test_the_trainable_module_is_the_bare_model(device: torch.device) -> None:
    model, task, images, target = _small(device)
    before = picture(model)
    assert task.get_trainable_module() is model
    assert task.get_eval_model() is model
    assert [id(parameter) for parameter in task.get_clip_parameters()] == [id(p) for p in model.parameters()]
    assert [id(parameter) for parameter in task.get_clip_parameters(exclude_head=True)] == [
        id(parameter) for parameter in list(model.parameters())[:-2]
    ]
    task(images, target)["loss"].backward()
    assert picture(model) == before


def test_changing_the_loss_in_place_changes_no_other_entry(device: torch.device) -> None:
    _, task, images, target = _small(device, lam=0.0)
    result = task(images, target)
    others = {key: result[key].clone() for key in ("loss_clean", "loss_adv")}
    result["loss"] /= 2
    torch.testing.assert_close(result["loss"].detach(), others["loss_clean"] / 2)
    assert all(torch.equal(result[key], value) for key, value in others.items())
    assert not any(result[key].requires_grad for key in others)


def test_only_the_models_mode_counts(device: torch.device) -> None:
    model, task, images, target = _small(device)
    task.eval()
    model.train()
    assert float(task(images, target)["loss_adv"]) != float(task(images, target)["loss_clean"])
    task.train()
    model.eval()
    with torch.no_grad():
        result = task(images, target)
    assert result["loss"].item() == F.cross_entropy(model(images), target).item()


def test_criterion_from_timms_options() -> None:
    task = AlfaTask(Small(), None, "block", criterion_kwargs={"smoothing": 0.1}, verbose=False)
    assert isinstance(task.criterion, LabelSmoothingCrossEntropy)
    assert task.engine.criterion is task.criterion


def test_soft_targets(device: torch.device) -> None:
    _, task, images, target = _small(device)
    soft = F.one_hot(target, 10).float() * 0.9 + 0.01
    assert task(images, soft)["loss"].isfinite()


def test_layer_decay_builds_from_the_trainable_module() -> None:
    model = timm.create_model("test_vit", num_classes=10)
    task = AlfaTask(model, nn.CrossEntropyLoss(), verbose=False)
    groups = create_optimizer_v2(task.get_trainable_module(), "adamw", lr=1.0, layer_decay=0.5).param_groups
    assert len({group["lr_scale"] for group in groups}) > 2


def test_ema_and_checkpoints_are_those_of_the_plain_model(device: torch.device) -> None:
    model, task, images, target = _small(device)
    task(images, target)["loss"].backward()
    task.setup_ema(decay=0.5)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    task.update_ema(step=1)
    state, averaged = task.get_checkpoint_state(), task.get_checkpoint_state(ema=True)
    for weights in (state["state_dict"], averaged["state_dict_ema"]):
        Small().load_state_dict(weights, strict=True)
    other = AlfaTask(Small().to(device), nn.CrossEntropyLoss(), "block", verbose=False)
    other.load_checkpoint_state(state["state_dict"], state.get("task_state"))
    for value, expected in zip(other.engine.model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(value, expected)


def test_summary_and_log_lines(device: torch.device) -> None:
    model = timm.create_model("test_resnet", num_classes=10).to(device).train()
    task = AlfaTask(model, nn.CrossEntropyLoss(), ["layer3", "@last"], verbose=False)
    lines = task.summary_lines((3, 32, 32))
    assert "PGD-1" in lines[0]
    assert "0.5/255" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["layer3", "layer4"]
    assert task.interval_text() == ""
    results = [task(*batch(32, dtype=torch.float32, device=device)) for _ in range(2)]
    assert "Clean" in task.interval_text()
    metrics = task.epoch_metrics()
    mean = sum(float(result["loss_clean"]) for result in results) / 2
    assert metrics["loss_clean"] == pytest.approx(mean, rel=1e-5)
    images, target = batch(32, dtype=torch.float32, device=device)
    task(images, (target + 1) % 10)
    assert task.epoch_metrics()["loss_clean"] != pytest.approx(mean, rel=1e-5)  # averages start anew


def _rank(rank: int, world_size: int, folder: str, device: torch.device) -> None:
    device = processes.join_group(rank, world_size, folder, device)
    torch.manual_seed(0)
    model = UNet().double().to(device).train()
    model.drop.p = 0.0
    task = AlfaTask(model, nn.CrossEntropyLoss(), "middle", alpha=ALPHA, steps=2, verbose=False)
    task.prepare_distributed(None if device.type == "cpu" else [device])
    assert unwrap_model(task.get_trainable_module()) is model
    assert list(task.get_checkpoint_state()["state_dict"]) == list(model.state_dict())
    for index in range(4):  # two updates of two batches each, communicating with the second one
        images, target = batch(8, 4 * world_size, device=device)
        half = slice(rank * 4, rank * 4 + 4)
        if index == 2:
            model.zero_grad()
        if index % 2 == 0:
            with task.no_sync():
                task(images[half] + index, target[half])["loss"].backward()
        else:
            task(images[half] + index, target[half])["loss"].backward()
    torch.save([parameter.grad for parameter in model.parameters()], f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.ranks(2)
def test_ranks_average_their_gradients(tmp_path: Path, world_size: int, device: torch.device) -> None:
    processes.call_ranks(_rank, (world_size, str(tmp_path), device), world_size, device)
    torch.manual_seed(0)
    model = UNet().double().to(device).train()
    model.drop.p = 0.0
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for index in (2, 3):
        images, target = batch(8, 4 * world_size, device=device)
        for half in (slice(4 * rank, 4 * rank + 4) for rank in range(world_size)):
            plain = plain_alfa(
                model, F.cross_entropy, images[half] + index, target[half], ["middle"], alpha=ALPHA, steps=2
            )
            for total, gradient in zip(expected, plain.gradients.values(), strict=True):
                total += gradient / world_size
    for rank in range(world_size):
        for found, total in zip(torch.load(tmp_path / f"{rank}.pt", map_location=device), expected, strict=True):
            torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-15)
