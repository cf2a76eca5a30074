"""Independent labels: timm's own task at lam = 0 bit for bit, plain torch to 1e-9, and every other method."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradient_errors
from peers import checked, small
from reference.plain_alfa import feature_of, forward_with, plain_alfa
from timm.loss import BinaryCrossEntropy
from timm.task import MultiLabelClassificationEvaluator, MultiLabelClassificationTask, TrainingTask
from torch import Tensor, nn
from toys import FAMILIES, batch, family

from timm_alfa import AlfaTask, UsageError
from timm_alfa.tasks import registry

ALPHA = 1 / 255
METHODS = {
    "alfa": "--alfa-blocks block",
    "lalfa": "--alfa-blocks stem block --alfa-learnable",
    "noise": "--method noise --noise-blocks block --noise-sigma 5%",
    "moex": "--method moex --moex-block block",
    "alfa with moex": "--alfa-blocks block --moex-block stem",
    "advprop": "--method advprop",
    "fast-advprop": "--method fast-advprop --fast-advprop-share 0.5",
    "pgd-at": "--method pgd-at --pgd-at-steps 2",
}


def _labels(count: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    """[count, 10], about a third of them present, and one image without any."""
    labels = (torch.rand(count, 10, generator=torch.Generator().manual_seed(5)) < 0.3).to(dtype)
    labels[0] = 0
    return labels


def _criterion() -> BinaryCrossEntropy:
    return BinaryCrossEntropy(smoothing=0.1, smooth_dense=True, pos_weight=2.0)


def _bce_by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    """Labels smoothed towards a half, present ones weighted twice, averaged over images and labels."""
    labels = 0.9 * labels + 0.05
    present, absent = logits.sigmoid().log(), (1 - logits.sigmoid()).log()
    return -(2 * labels * present + (1 - labels) * absent).mean()


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_are_those_of_plain_torch(name: str, steps: int) -> None:
    model, images, _ = family(name)
    blocks, labels = list(FAMILIES[name][3:]), _labels()
    task = AlfaTask(model, _criterion().double(), blocks, alpha=ALPHA, steps=steps, lam=0.7, verbose=False)
    task.set_multilabel()
    plain = copy.deepcopy(model)
    for _ in range(2):
        state = torch.get_rng_state()
        expected = plain_alfa(plain, _bce_by_hand, images, labels, blocks, alpha=ALPHA, steps=steps, lam=0.7)
        torch.set_rng_state(state)
        model.zero_grad()
        result = task(images, labels)
        result["loss"].backward()
        torch.testing.assert_close(result["loss"].detach(), expected.loss.detach(), rtol=1e-9, atol=0)
        assert max(gradient_errors(model, expected.gradients).values()) < 1e-9


def test_kl_is_the_divergence_of_independent_labels() -> None:
    model, images, _ = family("resnet")
    block, labels = FAMILIES["resnet"][3], _labels()
    task = AlfaTask(model, _criterion().double(), block, alpha=20 * ALPHA, objective="kl", lam=0.7, verbose=False)
    task.set_multilabel()
    plain = copy.deepcopy(model)
    state = torch.get_rng_state()

    # the attack raises the criterion; the adversarial term compares the predictions
    delta = plain_alfa(plain, _bce_by_hand, images, labels, [block], alpha=20 * ALPHA, steps=1).deltas[block]
    torch.set_rng_state(state)
    clean = plain(images)
    torch.set_rng_state(state)
    perturbed = forward_with(plain, images, block, delta, detach=False)
    p, q = (torch.distributions.Bernoulli(logits=logits) for logits in (clean.detach(), perturbed))
    loss = _bce_by_hand(clean, labels) + 0.7 * torch.distributions.kl_divergence(p, q).mean()
    parameters = dict(plain.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    torch.set_rng_state(state)
    result = task(images, labels)
    result["loss"].backward()
    torch.testing.assert_close(result["loss"].detach(), loss.detach(), rtol=1e-9, atol=0)
    assert max(gradient_errors(model, gradients).values()) < 1e-9
    assert feature_of(plain, images, block)[0].shape == delta[0].shape


def _task(argv: str, criterion: nn.Module, dtype: torch.dtype = torch.float64) -> TrainingTask:
    return registry.create_task(
        checked(*argv.split()), small().to(dtype), criterion.to(dtype), device=torch.device("cpu"), dtype=None,
        verbose=False, input_size=(3, 8, 8), threshold=0.4,
    )  # fmt: skip


def _train(task: TrainingTask, dtype: torch.dtype) -> list[Tensor]:
    """Losses, gradients and weights of three updates."""
    torch.manual_seed(7)
    module = task.get_trainable_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    task.setup_ema(decay=0.5)
    found = []
    for step in range(3):
        loss = task(batch(8, dtype=dtype)[0] + step, _labels(dtype=dtype))["loss"]
        loss.backward()
        found += [loss.detach(), *(parameter.grad.clone() for parameter in module.parameters())]
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step)
    for ema in (False, True):
        found += [value.clone() for value in task.get_eval_model(ema=ema).state_dict().values()]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_zero_is_timms_own_task_bit_for_bit(dtype: torch.dtype) -> None:
    own = MultiLabelClassificationTask(small().to(dtype), _criterion().to(dtype), threshold=0.4, verbose=False)
    expected = _train(own, dtype)
    for argv in ("--method standard", "--alfa-blocks block --alfa-lambda 0", "--noise-blocks block --method noise "
                 "--noise-lambda 0"):  # fmt: skip
        found = _train(_task(argv, _criterion(), dtype), dtype)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), argv
    assert type(_task("--method standard", _criterion())) is MultiLabelClassificationTask


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_with_labels_and_is_evaluated_by_them(name: str) -> None:
    task = _task(METHODS[name], _criterion())
    before = [parameter.detach().clone() for parameter in task.get_trainable_module().parameters()]
    assert all(value.isfinite().all() for value in _train(task, torch.float64))
    moved = [torch.equal(a, b) for a, b in zip(task.get_trainable_module().parameters(), before, strict=True)]
    assert not all(moved)
    evaluator = task.create_evaluator(max_samples=3)
    assert isinstance(evaluator, MultiLabelClassificationEvaluator)
    assert (evaluator.threshold, evaluator.max_samples) == (0.4, 3)


def test_the_first_step_of_advprop_is_plain_torch_by_hand() -> None:
    task = _task("--method advprop --advprop-eps 0", _criterion())
    images, labels = batch(8)[0], _labels()
    torch.manual_seed(1)
    result = task(images, labels)
    model = small()
    torch.manual_seed(1)
    expected = _bce_by_hand(model(images), labels)
    for loss in (result["loss_clean"], result["loss_adv"]):  # nothing is added to the images
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)


def test_targets_of_another_kind_are_refused() -> None:
    task = _task("--alfa-blocks block", _criterion())
    images, classes = batch(8)
    wrong: list[Any] = [classes, _labels().long(), _labels()[:, 0]]
    for target in wrong:
        with pytest.raises(ValueError, match=r"target: expected labels \[B, num_classes\] in floating point"):
            task(images, target)


def test_what_does_not_go_with_labels_is_refused() -> None:
    task = AlfaTask(small(), nn.CrossEntropyLoss(), "block", objective="kl", init="uniform", eps="2%", unlabeled=True,
                    verbose=False)  # fmt: skip
    with pytest.raises(ValueError, match="unlabeled: is for one class"):
        task.set_multilabel()
    for threshold in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="threshold: expected a probability between 0 and 1"):
            AlfaTask(small(), F.cross_entropy, "block", verbose=False).set_multilabel(threshold)
    args = checked("--method", "advprop")
    args.task, args.advprop_targeted = "multilabel", True
    with pytest.raises(UsageError, match="--advprop-targeted"):
        registry.check_arguments(args)
