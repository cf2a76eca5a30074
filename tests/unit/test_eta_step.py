"""When and how eta steps: by hand for two linear layers, and with whatever optimizer holds the weights."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from toys import Small, batch

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.eta import EtaStepper

BLOCKS = ["first", "second"]


class TwoLayers(nn.Module):
    """x = (1, 2) -> f = (1, 2) -> 2 f_1 - f_2 = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 1, bias=False)
        self.double()
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(2))
            self.second.weight.copy_(torch.tensor([[2.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / 2


X, Y = torch.tensor([[1.0, 2.0]], dtype=torch.float64), torch.tensor([[-1.0]], dtype=torch.float64)


def vector(*values: float, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def test_perturbations_and_gradients_by_hand(device: torch.device) -> None:
    """Residual 1, so d crit / d f = (2, -1) and d crit / d output = 1; alpha = 0.5 and eta = 1/2.

    The perturbed outputs are 0 + 0.5 * 0.5 * (2 + 1) = 0.75 and 0 + 0.5 * 0.5 = 0.25, with residuals 1.75 and 1.25.
    """
    model = TwoLayers().to(device)
    alfa = AlfaWrapper(model, half_square, BLOCKS, alpha=0.5, learnable=True)
    images, target = X.to(device), Y.to(device)
    output = alfa(images, target)
    assert output.deltas["first"].tolist() == [[0.5, -0.5]]
    assert output.deltas["second"].tolist() == [[0.5]]
    assert output.eta.tolist() == [0.5, 0.5]
    result = AlfaLoss(half_square, gamma=1.0)(output, target)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(0.5 + 1.75**2 / 2 + 1.25**2 / 2 + 1)
    # residual * (2 * 0.5 + (-1) * (-0.5)), residual * 0.5, and gamma
    torch.testing.assert_close(alfa.eta.values.grad, vector(1.75 * 1.5 + 1, 1.25 * 0.5 + 1, device=device))
    # residual times what each pass fed to the second layer: f, f + eta * delta, f
    expected = (
        1.0 * vector(1, 2, device=device)
        + 1.75 * vector(1.25, 1.75, device=device)
        + 1.25 * vector(1, 2, device=device)
    )
    torch.testing.assert_close(model.second.weight.grad[0], expected)
    torch.testing.assert_close(
        model.first.weight.grad, torch.outer((1 + 1.75 + 1.25) * vector(2, -1, device=device), images[0])
    )


def learn(eta_set: Any, device: torch.device, *, gamma: float, lr: float, steps: int = 2) -> list[Tensor]:
    """eta after each step of a model whose weights stay where they are."""
    task = AlfaTask(
        TwoLayers().to(device),
        half_square,
        BLOCKS,
        alpha=0.5,
        gamma=gamma,
        learnable=True,
        eta_set=eta_set,
        eta_lr=lr,
        verbose=False,
    )
    optimizer = torch.optim.SGD(task.parameters(), lr=0.0)
    etas = []
    for _ in range(steps):
        optimizer.zero_grad()
        task(X.to(device), Y.to(device))["loss"].backward()
        optimizer.step()
        etas.append(task.engine.eta.values.detach().clone())
    return etas


@pytest.mark.parametrize("eta_set", ["hyperplane", "simplex"])
def test_two_steps_by_hand_where_the_sets_agree(eta_set: str, device: torch.device) -> None:
    # gradients (3.625, 1.625): (0.1375, 0.3375), and 0.2625 more each to sum to 1
    # then (2.4 + 1, 0.65 + 1), velocity (6.6625, 3.1125): (-0.26625, 0.28875), and 0.48875 more each
    first, second = learn(eta_set, device, gamma=1.0, lr=0.1)
    torch.testing.assert_close(first, vector(0.4, 0.6, device=device))
    torch.testing.assert_close(second, vector(0.2225, 0.7775, device=device))


def test_two_steps_by_hand_where_the_sets_differ(device: torch.device) -> None:
    # (0.5 - 3.625, 0.5 - 1.625) = (-3.125, -1.125)
    assert learn("hyperplane", device, gamma=1.0, lr=1.0, steps=1)[0].tolist() == pytest.approx([-0.5, 1.5])
    assert learn("simplex", device, gamma=1.0, lr=1.0, steps=1)[0].tolist() == pytest.approx([0.0, 1.0])


def test_gamma_draws_negative_entries_towards_zero_on_the_hyperplane(device: torch.device) -> None:
    # From (-0.5, 1.5) the losses alone give (0.375, 0.875), and gamma adds its sign: (-1, 1). With velocities
    # (2.6375, 3.3375) and (2.7375, 1.4375) the second step ends at:
    assert learn("hyperplane", device, gamma=1.0, lr=1.0)[1].tolist() == pytest.approx([-0.15, 1.15])
    assert learn("hyperplane", device, gamma=0.0, lr=1.0)[1].tolist() == pytest.approx([-1.15, 2.15])


def test_gamma_moves_nothing_on_the_hyperplane_while_every_entry_is_positive(device: torch.device) -> None:
    with_gamma, without = (learn("hyperplane", device, gamma=gamma, lr=0.02, steps=4) for gamma in (2.0, 0.0))
    assert bool((torch.stack(with_gamma) > 0).all())
    torch.testing.assert_close(torch.stack(with_gamma), torch.stack(without), rtol=0, atol=1e-12)


def test_gamma_moves_nothing_on_the_simplex(device: torch.device) -> None:
    with_gamma, without = (torch.stack(learn("simplex", device, gamma=gamma, lr=0.15, steps=6)) for gamma in (2.0, 0.0))
    assert bool((without == 0).any())  # where the subgradient at 0 counts
    assert bool((without > 0).all(dim=1).any())
    torch.testing.assert_close(with_gamma, without, rtol=0, atol=1e-12)


def small(device: torch.device, **options: Any) -> tuple[AlfaTask, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Small(drop=0.0).to(device).train()
    options = {"alpha": 0.05, "eta_lr": 0.1, "gamma": 0.0, "verbose": False, **options}
    return AlfaTask(model, F.cross_entropy, ["stem", "block"], learnable=True, **options), *batch(
        6, 8, dtype=torch.float32, device=device
    )


def eta_of(task: AlfaTask) -> list[float]:
    return task.engine.eta.values.tolist()


@pytest.mark.parametrize("name", ["sgd", "adamw", "lookahead_sgd", "lookahead_adamw"])
def test_eta_steps_once_per_step_of_the_weights(name: str, device: torch.device) -> None:
    task, images, target = small(device)
    expected, _, _ = small(device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt=name, lr=0.0, weight_decay=0.0)
    plain = torch.optim.SGD(expected.get_trainable_module().parameters(), lr=0.0)
    for _ in range(7):  # Lookahead moves its slow weights in every sixth
        for owner, steps in ((task, optimizer), (expected, plain)):
            before = eta_of(owner)
            steps.zero_grad()
            owner(images, target)["loss"].backward()
            assert eta_of(owner) == before
            steps.step()
            assert eta_of(owner) != before
        assert eta_of(task) == eta_of(expected)
    optimizer.step()  # nothing was learned since
    assert eta_of(task) == eta_of(expected)


def test_another_models_optimizer_does_not_step_eta(device: torch.device) -> None:
    task, images, target = small(device)
    other = Small().to(device)
    task(images, target)["loss"].backward()
    before = eta_of(task)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    F.cross_entropy(other(images), target).backward()
    optimizer.step()
    assert eta_of(task) == before
    torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1).step()
    assert eta_of(task) != before


def test_two_tasks_keep_their_steps_apart(device: torch.device) -> None:
    (one, images, target), (two, _, _) = small(device), small(device)
    optimizers = [torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1) for task in (one, two)]
    for task in (one, two):
        task(images, target)["loss"].backward()
    optimizers[1].step()
    assert eta_of(one) == [0.5, 0.5]
    assert eta_of(two) != [0.5, 0.5]


def test_the_listener_ends_with_the_task(device: torch.device) -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks

    before = len(_global_optimizer_post_hooks)
    task, _, _ = small(device)
    assert len(_global_optimizer_post_hooks) == before + 1
    del task
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before


def test_accumulated_batches_are_averaged(device: torch.device) -> None:
    task, images, target = small(device, gamma=0.3)
    other, _, _ = small(device, gamma=0.3)
    parameters = list(task.get_trainable_module().parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    slopes = []
    for index in (0, 1):
        loss = task(images + index, target)["loss"]
        loss /= 2
        loss.backward()
        wrapper = AlfaWrapper(other.engine.model, other.criterion, other.engine.blocks, alpha=0.05, learnable=True)
        other.objective(wrapper(images + index, target), target).loss.backward()
        slopes.append(wrapper.eta.values.grad.clone())
    optimizer.step()
    moved = vector(0.5, 0.5, device=device) - 0.1 * (slopes[0] + slopes[1]) / 2
    torch.testing.assert_close(task.engine.eta.values.detach(), moved - (moved.sum() - 1) / 2, rtol=1e-5, atol=0)
    assert not torch.allclose(slopes[0], slopes[1], rtol=1e-2)


def test_gradients_of_an_update_that_was_given_up_are_dropped(device: torch.device) -> None:
    task, images, target = small(device)
    expected, _, _ = small(device)
    optimizers = [torch.optim.SGD(owner.get_trainable_module().parameters(), lr=0.0) for owner in (task, expected)]
    task(images + 1, target)["loss"].backward()
    optimizers[0].zero_grad()
    for owner, optimizer in zip((task, expected), optimizers, strict=True):
        owner(images, target)["loss"].backward()
        optimizer.step()
    assert eta_of(task) == eta_of(expected)


def test_a_skipped_step_of_the_loss_scaler_moves_neither_weights_nor_eta(device: torch.device) -> None:
    task, images, target = small(device)
    expected, _, _ = small(device)
    for owner, overflow in ((task, True), (expected, False)):
        optimizer = torch.optim.SGD(owner.get_trainable_module().parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=1000)
        for index in range(3):
            if overflow and index == 1:
                before, weights = eta_of(owner), copy.deepcopy(list(owner.parameters()))
                norms = copy.deepcopy(owner.engine.model.state_dict())
                optimizer.zero_grad()
                scaler.scale(owner(images * 3, target)["loss"]).backward()
                next(owner.parameters()).grad[0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                assert scaler.get_scale() == 512
                assert eta_of(owner) == before
                assert all(map(torch.equal, weights, owner.parameters()))
                owner.engine.model.load_state_dict(norms)  # the running statistics
            optimizer.zero_grad()
            scaler.scale(owner(images, target)["loss"]).backward()
            before = eta_of(owner)
            scaler.step(optimizer)
            scaler.update()
            assert eta_of(owner) != before
    assert eta_of(task) == pytest.approx(eta_of(expected), rel=1e-6)
    for one, other in zip(task.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("late", [False, True])
def test_eta_survives_an_overflow_whose_gradients_linger(late: bool, device: torch.device) -> None:
    """Gradients that are zeroed rather than dropped, or only after the forward, do not show that a step was skipped."""
    task, images, target = small(device)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for index in range(4):
        if not late:
            optimizer.zero_grad(set_to_none=False)
        loss = task(images * (float("inf") if index == 1 else 1.0), target)["loss"]
        if late:
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = eta_of(task)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (1024 if index == 0 else 512)
        assert sum(eta_of(task)) == pytest.approx(1)  # and so finite
        if index != 2:  # the step after the skipped one may be lost on eta
            assert (eta_of(task) == before) == (index == 1)


class Fused(torch.optim.SGD):
    """Like a fused optimizer on an accelerator: the scaler steps it whatever happened, and it looks for itself."""

    def __init__(self, parameters: Any, lr: float):
        super().__init__(parameters, lr)
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.found_inf.any():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * parameter.grad / (self.grad_scale if self.grad_scale is not None else 1)


def test_a_fused_optimizer_that_meets_an_overflow_does_not_step_eta(device: torch.device) -> None:
    task, images, target = small(device)
    optimizer = Fused(task.get_trainable_module().parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale(task(images, target)["loss"]).backward()
        if overflow:
            next(task.parameters()).grad[0] = torch.inf
        before, weights = eta_of(task), copy.deepcopy(list(task.parameters()))
        scaler.step(optimizer)
        scaler.update()
        assert (eta_of(task) == before) == overflow
        assert all(map(torch.equal, weights, task.parameters())) == overflow


@pytest.mark.parametrize("scaled", [False, True])
def test_follow_learns_what_the_task_learns(scaled: bool, device: torch.device) -> None:
    task, images, target = small(device, gamma=0.5)
    torch.manual_seed(0)
    model = Small(drop=0.0).to(device).train()
    alfa = AlfaWrapper(model, F.cross_entropy, ["stem", "block"], alpha=0.05, learnable=True, eta_lr=0.1)
    loss_fn = AlfaLoss(F.cross_entropy, gamma=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2, enabled=scaled)
    alfa.follow(optimizer, scaler if scaled else None)
    reference = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    for index in range(5):
        reference.zero_grad()
        task(images + 0.1 * index, target)["loss"].backward()
        reference.step()
        if scaled and index == 2:  # a step that is skipped, on other images
            norms = {name: buffer.clone() for name, buffer in model.named_buffers()}
            optimizer.zero_grad()
            scaler.scale(loss_fn(alfa(images * 2, target), target).loss).backward()
            next(model.parameters()).grad[0] = torch.inf
            before = alfa.eta.values.tolist()
            scaler.step(optimizer)
            scaler.update()
            assert alfa.eta.values.tolist() == before
            model.load_state_dict(norms, strict=False)
        optimizer.zero_grad()
        scaler.scale(loss_fn(alfa(images + 0.1 * index, target), target).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert alfa.eta.values.tolist() == pytest.approx(eta_of(task), rel=1e-4)
    assert eta_of(task) != pytest.approx([0.5, 0.5], abs=1e-3)


def test_the_weights_of_a_stepper_are_those_that_train() -> None:
    model = Small()
    model.stem.requires_grad_(False)
    task_eta = AlfaWrapper(model, F.cross_entropy, ["block"], learnable=True).eta
    stepper = EtaStepper(task_eta, model.parameters())
    assert not stepper.steps_with(torch.optim.SGD(model.stem.parameters(), lr=0.1))
    assert stepper.steps_with(torch.optim.SGD(model.head.parameters(), lr=0.1))
