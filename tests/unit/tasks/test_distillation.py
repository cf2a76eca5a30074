"""ALFA with a teacher: timm's own task at lam = 0 bit for bit, a plain implementation by hand to 1e-9, and timm's care
for teacher, projection and student's weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from parity import gradient_errors
from reference.plain_alfa import plain_alfa
from students import BLOCKS, DISTILL_WEIGHT, KINDS, TASK_WEIGHT, TEMPERATURE, distillation, student, teacher
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from toys import batch

from timm_alfa import BlockError
from timm_alfa.tasks.distillation import AlfaDistillationTask, DistillationLoss, Distilled, NoiseDistillationTask
from timm_alfa.utils.distributed import leave_group

ALPHA = 1 / 255


def _taught_by_hand(model: nn.Module, images: Tensor, *, features: bool) -> Tensor:
    """What a teacher makes of images that were normalised for a student with timm's usual mean and deviation."""
    rgb = images * _channels(0.229, 0.224, 0.225) + _channels(0.485, 0.456, 0.406)
    seen = (rgb - _channels(0.5, 0.4, 0.3)) / _channels(0.2, 0.25, 0.5)
    with torch.no_grad():
        model.eval()
        last = model.layer4(
            model.layer3(model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(seen)))))))
        )
        pooled = last.mean(dim=(2, 3))
        return pooled if features else model.fc(pooled)


def _channels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)


def _criterion_by_hand(kind: str, labels: Tensor, taught: Tensor) -> Any:
    """The whole loss in elementary operations."""

    def of_labels(logits: Tensor) -> Tensor:
        log_q = logits - logits.logsumexp(dim=1, keepdim=True)
        return -(0.9 * log_q.gather(1, labels[:, None]).mean() + 0.1 * log_q.mean())  # label smoothing

    def of_logits(logits: Tensor) -> Tensor:
        p = (taught / TEMPERATURE).exp() / (taught / TEMPERATURE).exp().sum(dim=1, keepdim=True)
        scaled = logits / TEMPERATURE
        log_q = scaled - scaled.logsumexp(dim=1, keepdim=True)
        return TEMPERATURE**2 * (p * (p.log() - log_q)).sum() / len(logits)

    def criterion(output: Any, target: Any) -> Tensor:
        logits, compared = (output, output) if kind == "logit" else output
        if kind == "feature":
            distance = ((compared - taught) ** 2).sum() / taught.numel()
        elif kind == "token hard":
            log_q = compared - compared.logsumexp(dim=1, keepdim=True)
            distance = -torch.stack([row[int(t.argmax())] for row, t in zip(log_q, taught, strict=True)]).mean()
        else:
            distance = of_logits(compared)
        return TASK_WEIGHT * of_labels(logits) + DISTILL_WEIGHT * distance

    return criterion


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "grad", "several"), [(1, "full", False), (3, "full", True), (2, "tail", False)])
def test_gradients_are_those_of_plain_torch(kind: str, steps: int, grad: str, several: bool) -> None:
    images, labels = batch(32)
    task = AlfaDistillationTask(
        distillation(kind), list(BLOCKS[kind.split()[0]][: 1 + several]), alpha=ALPHA, steps=steps, grad=grad, lam=0.7
    )
    trained = task.get_trainable_module()
    plain = copy.deepcopy(trained)
    taught = _taught_by_hand(teacher(), images, features=kind == "feature")
    criterion = _criterion_by_hand(kind, labels, taught)
    for _ in range(2):
        state = torch.get_rng_state()
        expected = plain_alfa(
            plain, criterion, images, labels, task.engine.blocks, alpha=ALPHA, steps=steps, grad=grad, lam=0.7
        )
        torch.set_rng_state(state)
        trained.zero_grad()
        result = task(images, labels)
        result["loss"].backward()
        torch.testing.assert_close(result["loss"].detach(), expected.loss.detach(), rtol=1e-9, atol=0)
        for name, error in gradient_errors(trained, expected.gradients).items():
            assert error < 1e-9, name
        logits = expected.output if kind == "logit" else expected.output[0]
        torch.testing.assert_close(result["output"], logits.detach(), rtol=1e-9, atol=1e-12)
        parts = TASK_WEIGHT * result["loss_task"] + DISTILL_WEIGHT * result["loss_distill"]
        torch.testing.assert_close(parts, result["loss_clean"])


def test_the_strengths_are_learned_from_the_whole_loss() -> None:
    images, labels = batch(32)
    task = AlfaDistillationTask(distillation("feature"), ["layer3", "layer4"], alpha=ALPHA, learnable=True, gamma=0.3)
    plain = copy.deepcopy(task.get_trainable_module())
    criterion = _criterion_by_hand("feature", labels, _taught_by_hand(teacher(), images, features=True))
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-3)
    assert task.engine.blocks == ["student.layer3", "student.layer4"]
    state = torch.get_rng_state()
    slopes = []
    for move in (-1e-4, 1e-4):  # along a direction that stays on the hyperplane
        torch.set_rng_state(state)
        strengths = {"student.layer3": 0.5 + move, "student.layer4": 0.5 - move}
        expected = plain_alfa(
            plain, criterion, images, labels, task.engine.blocks, alpha=ALPHA, steps=1, strengths=strengths
        )
        slopes.append(float(expected.loss.detach()))
    torch.set_rng_state(state)
    task(images, labels)["loss"].backward()
    optimizer.step()
    moved = task.engine.eta.values.detach()
    slope = (slopes[1] - slopes[0]) / 2e-4
    assert moved.sum().item() == pytest.approx(1)
    assert (moved[0] - moved[1]).item() == pytest.approx(-0.01 * slope, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_lambda_zero_is_timms_own_task_bit_for_bit(kind: str) -> None:
    images, labels = batch(32)
    own, ours = distillation(kind), AlfaDistillationTask(distillation(kind), lam=0.0)
    optimizers = []
    for task in (own, ours):
        task.setup_ema(decay=0.5)
        module = task.get_trainable_module()
        optimizers.append(create_optimizer_v2(module, "sgd", lr=0.1, momentum=0.9, weight_decay=0.05, layer_decay=0.7))
    for step in range(3):
        state = torch.get_rng_state()
        results = []
        for task, optimizer in zip((own, ours), optimizers, strict=True):
            torch.set_rng_state(state)
            result = task(images + step, labels)
            result["loss"].backward()
            gradients = [parameter.grad.clone() for parameter in task.get_trainable_module().parameters()]
            torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=step)
            distance = result["distill_loss" if kind.startswith("token") else "kd_loss"] if task is own else None
            parts = (result["task_loss"], distance) if task is own else (result["loss_task"], result["loss_distill"])
            results.append([result["loss"], result["output"], *parts, *gradients])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    for ema in (False, True):
        expected, found = own.get_checkpoint_state(ema=ema), ours.get_checkpoint_state(ema=ema)
        _assert_equal(expected, found)


def _assert_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Everything of timm's is there, in its order."""
    for key, value in expected.items():
        if isinstance(value, dict):
            assert [name for name in found[key] if name in value] == list(value)
            _assert_equal(value, found[key])
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(found[key])), key


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_asked_once_per_step_in_evaluation_mode_and_left_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = AlfaDistillationTask(distillation(kind), alpha=ALPHA, steps=4)
    task.train()  # of the whole task, which timm's loop does not do
    asked: list[tuple[bool, bool]] = []
    model = task.distillation.teacher.model
    monkeypatch.setattr(task.distillation.teacher, "forward", _noting(task.distillation.teacher.forward, asked, model))
    before = copy.deepcopy(model.state_dict())
    images, labels = batch(32)
    for count in (1, 2):
        task(images, labels)["loss"].backward()
        assert asked == [(False, False)] * count
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    trained = {id(parameter) for parameter in task.get_trainable_module().parameters()}
    assert not trained.intersection(map(id, model.parameters()))


def _noting(forward: Any, asked: list[tuple[bool, bool]], model: nn.Module) -> Any:
    def noting(*args: Any, **kwargs: Any) -> Tensor:
        found = forward(*args, **kwargs)
        asked.append((model.training, found.requires_grad))
        return found

    return noting


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_averages_are_the_students(kind: str) -> None:
    task = AlfaDistillationTask(distillation(kind), alpha=ALPHA)
    task.setup_ema(decay=0.5)
    images, labels = batch(32)
    task(images, labels)["loss"].backward()
    torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1).step()
    task.update_ema(step=1)
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    names = list(student(kind).state_dict())
    assert list(state["state_dict"]) == list(state["state_dict_ema"]) == names
    with_projection = {"projection"} if kind == "feature" else set()
    assert state["task_state"].keys() == {"passes"} | with_projection
    assert state.get("task_state_ema", {}).keys() == with_projection
    again = AlfaDistillationTask(distillation(kind), alpha=ALPHA)
    again.load_checkpoint_state(state["state_dict"], copy.deepcopy(state["task_state"]))
    again.setup_ema(decay=0.5)
    again.load_checkpoint_state(state["state_dict_ema"], state.get("task_state_ema"), ema=True)
    _assert_equal(state, {**again.get_checkpoint_state(), **again.get_checkpoint_state(ema=True)})
    random = torch.get_rng_state()
    expected = task(images, labels)["loss"]
    torch.set_rng_state(random)
    assert torch.equal(again(images, labels)["loss"], expected)
    assert unwrap_model(task.get_eval_model()) is not unwrap_model(task.get_eval_model(ema=True))
    task.get_eval_model().eval()
    with torch.no_grad():
        assert task.get_eval_model()(images).shape == (4, 10)


def test_a_checkpoint_of_timms_own_task_goes_on() -> None:
    own, ours = distillation("feature"), AlfaDistillationTask(distillation("feature"))
    with torch.no_grad():
        for parameter in own.get_trainable_module().parameters():
            parameter.add_(0.1)
    state = own.get_checkpoint_state()
    ours.load_checkpoint_state(state["state_dict"], state["task_state"])
    _assert_equal(state, ours.get_checkpoint_state())


def test_the_parameters_to_clip_are_timms() -> None:
    own, ours = distillation("feature"), AlfaDistillationTask(distillation("feature"))
    for exclude_head in (False, True):
        shapes = [[p.shape for p in task.get_clip_parameters(exclude_head)] for task in (own, ours)]
        assert shapes[0] == shapes[1]
    assert len(ours.get_clip_parameters(True)) == len(ours.get_clip_parameters()) - 2


@pytest.mark.parametrize("kind", KINDS)
def test_noise_with_a_teacher(kind: str) -> None:
    images, labels = batch(32)
    own, ours = distillation(kind, drop=0.0), NoiseDistillationTask(distillation(kind, drop=0.0), sigma=0.0)
    expected, result = own(images, labels), ours(images, labels)
    assert torch.equal(result["loss_clean"], expected["loss"])
    assert torch.equal(result["loss_adv"], expected["loss"])  # no noise at all
    noisy = NoiseDistillationTask(distillation(kind, drop=0.0), sigma="20%")(images, labels)
    assert not torch.equal(noisy["loss_adv"], noisy["loss_clean"])


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_in_evaluation_mode_it_is_the_criterion_alone(kind: str) -> None:
    task = AlfaDistillationTask(distillation(kind))
    images, labels = batch(32)
    task.get_trainable_module().eval()
    with torch.no_grad():
        result = task(images, labels)
    expected = ClassificationTask(task.get_eval_model(), nn.CrossEntropyLoss(label_smoothing=0.1), verbose=False)
    torch.testing.assert_close(result["loss"], expected(images, labels)["loss"])
    assert result["output"].shape == (4, 10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_parts_give_the_same_gradients(kind: str) -> None:
    images, labels = batch(32)
    gradients = []
    for compiled in (False, True):
        task = AlfaDistillationTask(distillation(kind, drop=0.0), alpha=ALPHA, steps=2)
        if compiled:
            task.compile(backend="aot_eager")
        task(images, labels)["loss"].backward()
        gradients.append([parameter.grad for parameter in task.get_trainable_module().parameters()])
    torch._dynamo.reset()
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["feature", "token"])
def test_summary_tells_of_the_teacher_and_metrics_of_both_parts(kind: str) -> None:
    task = AlfaDistillationTask(distillation(kind), alpha=ALPHA)
    lines = task.summary_lines(None if kind == "feature" else (3, 32, 32))
    assert "Teacher: ResNet" in lines[0]
    assert f"weights {TASK_WEIGHT} (labels) and {DISTILL_WEIGHT} (teacher)" in lines[0]
    result = task(*batch(32))
    assert "Task: " in task.interval_text()
    metrics = task.epoch_metrics()
    assert metrics["loss_task"] == pytest.approx(float(result["loss_task"]), rel=1e-5)
    assert metrics["loss_distill"] == pytest.approx(float(result["loss_distill"]), rel=1e-5)


def test_moments_know_where_the_students_channels_are() -> None:
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=10).double().train()
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1),
                             num_heads=(2, 2), num_classes=10).double().train()  # fmt: skip
    for found, last in ((model, False), (swin, True)):
        task = AlfaDistillationTask(distillation("feature", student_model=found), space="moments", alpha="5%")
        assert task.engine.perturbation.channels_last is last


def test_what_does_not_go_with_a_teacher_is_refused() -> None:
    with pytest.raises(TypeError, match=r"distillation task of timm's, found ClassificationTask"):
        AlfaDistillationTask(ClassificationTask(student("logit"), verbose=False))  # type: ignore[arg-type]
    for kind in KINDS[1:]:
        with pytest.raises(ValueError, match="objective: 'kl' compares logits alone"):
            AlfaDistillationTask(distillation(kind), objective="kl")
    with pytest.raises(ValueError, match="unlabeled: does not go with a teacher"):
        AlfaDistillationTask(distillation("logit"), unlabeled=True)
    with pytest.raises(BlockError, match="layer9"):
        AlfaDistillationTask(distillation("feature"), "layer9")
    result = AlfaDistillationTask(distillation("logit"), objective="kl", alpha="5%")(*batch(32))
    assert 0 < float(result["loss_adv"]) < float(result["loss_clean"])


def test_other_targets_get_the_criterion_alone() -> None:
    loss = DistillationLoss(distillation("token"))
    logits, labels = torch.randn(4, 10), torch.arange(4)
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(loss((logits, torch.randn(4, 10)), labels), expected)
    assert not torch.equal(loss((logits, torch.randn(4, 10)), Distilled(labels, torch.randn(4, 10))), expected)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    task = AlfaDistillationTask(distillation("feature", drop=0.0), "layer4", alpha=ALPHA, steps=2)
    trained = task.get_trainable_module()
    task.prepare_distributed()
    assert unwrap_model(task.get_trainable_module()) is trained
    assert list(task.get_checkpoint_state()["state_dict"]) == list(student("feature").state_dict())
    images, labels = batch(32, 8)
    half = slice(rank * 4, rank * 4 + 4)
    task(images[half], labels[half])["loss"].backward()
    torch.save([parameter.grad for parameter in trained.parameters()], f"{folder}/{rank}.pt")
    leave_group()


def test_two_ranks_average_their_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    images, labels = batch(32, 8)
    model = distillation("feature", drop=0.0).get_trainable_module().train()
    expected = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for half in (slice(0, 4), slice(4, 8)):
        taught = _taught_by_hand(teacher(), images[half], features=True)
        criterion = _criterion_by_hand("feature", labels[half], taught)
        plain = plain_alfa(model, criterion, images[half], None, ["student.layer4"], alpha=ALPHA, steps=2)
        for total, gradient in zip(expected, plain.gradients.values(), strict=True):
            total += gradient / 2
    for rank in (0, 1):
        for found, total in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-15)
