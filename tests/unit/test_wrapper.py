"""AlfaWrapper: what it accepts, what a step moves, and that the model is left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from rng import rng_state, set_rng_state
from timm.layers import EvoNorm2dB0
from torch import Tensor, nn
from toys import Repeated, Small, batch
from untouched import picture

from timm_alfa import AlfaLoss, AlfaOutput, AlfaWrapper, BlockError
from timm_alfa.engine import float16


def _small(device: torch.device, **options: Any) -> tuple[Small, AlfaWrapper, Tensor, Tensor]:
    model = Small().to(device).train()
    return model, AlfaWrapper(model, F.cross_entropy, "block", **options), *batch(6, dtype=torch.float32, device=device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha: expected a finite step size above 0, such as 0.5/255, found 0.0"),
        ({"alpha": -1.0}, "alpha: .* found -1.0"),
        ({"alpha": float("nan")}, "alpha: .* found nan"),
        ({"alpha": float("inf")}, "alpha: .* found inf"),
        ({"steps": 0}, "steps: expected a whole number of at least 1, found 0"),
        ({"steps": 1.5}, "steps: .* found 1.5"),
        ({"steps": True}, "steps: .* found True"),
        ({"eps": -0.1}, "eps: expected a finite radius of at least 0, or None for no bound, found -0.1"),
        ({"eps": float("nan")}, "eps: .* found nan"),
        ({"init": "uniform"}, "init: 'uniform' .* needs eps"),
        ({"norm": "l1"}, "norm: expected one of linf, l2, found 'l1'"),
        ({"init": "normal"}, "init: expected one of zero, uniform, found 'normal'"),
        ({"grad": "none"}, "grad: expected one of full, tail, found 'none'"),
        ({"bn": "frozen"}, "bn: expected one of clean, shared.*found 'frozen'"),
        ({"eta_set": "ball"}, "eta_set: expected one of hyperplane, simplex, found 'ball'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlfaWrapper(Small(), F.cross_entropy, "block", **options)


def test_criterion_has_to_be_callable() -> None:
    with pytest.raises(TypeError, match=r"criterion: expected something to call .* found 'ce'"):
        AlfaWrapper(Small(), "ce", "block")  # type: ignore[arg-type]


def test_a_compiled_model_is_refused() -> None:
    model = Small()
    for one in (torch.compile(model, backend="eager"), copy.deepcopy(model)):
        if isinstance(one, Small):
            one.compile(backend="eager")
        with pytest.raises(ValueError, match=r"model: pass the model as it was before torch\.compile"):
            AlfaWrapper(one, F.cross_entropy, "block")  # type: ignore[arg-type]


def test_a_block_without_influence(device: torch.device) -> None:
    images, target = batch(6, dtype=torch.float32, device=device)
    model = Repeated().to(device).train()
    before = picture(model)
    alfa = AlfaWrapper(model, F.cross_entropy, "nowhere")
    with pytest.raises(BlockError, match="'nowhere' has no influence on the loss"):
        alfa(images, target)
    assert picture(model) == before


@pytest.mark.parametrize(("block", "message"), [("twice", "several times"), ("never", "did not run")])
def test_check_blocks_finds_out_before_training(block: str, message: str, device: torch.device) -> None:
    model = Repeated().to(device).train()
    before, state = picture(model), rng_state(device)
    with pytest.raises(BlockError, match=message):
        AlfaWrapper(model, F.cross_entropy, block).check_blocks((3, 6, 6))
    assert picture(model) == before
    assert torch.equal(rng_state(device), state)


def test_check_blocks_moves_nothing(device: torch.device) -> None:
    model, alfa, _, _ = _small(device)
    before, state = copy.deepcopy(model.state_dict()), rng_state(device)
    alfa.check_blocks((3, 6, 6))
    assert torch.equal(rng_state(device), state)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_outputs_of_a_training_step(device: torch.device) -> None:
    model, alfa, images, target = _small(device, steps=3, alpha=0.5)
    state = rng_state(device)
    output = alfa(images, target)
    assert isinstance(output, AlfaOutput)
    assert output.eta.tolist() == [1.0]
    assert output.deltas["block"].shape == (4, 8, 6, 6)
    assert not output.deltas["block"].requires_grad
    assert output.deltas["block"].abs().max() <= 1.5
    set_rng_state(state, device)
    assert torch.equal(output.output, copy.deepcopy(model)(images))
    assert F.cross_entropy(output.adv_outputs["block"], target) > F.cross_entropy(output.output, target)


def test_without_target_without_training_without_gradients(device: torch.device) -> None:
    model, alfa, images, target = _small(device)
    assert isinstance(alfa(images), Tensor)
    with torch.no_grad():
        assert alfa(images, target).adv_outputs == {}
    model.eval()
    output = alfa(images, target)
    assert output.adv_outputs == output.deltas == {}
    assert torch.equal(output.output, model(images))
    assert AlfaLoss(F.cross_entropy)(output, target).loss.item() == F.cross_entropy(model(images), target).item()


def test_uniform_start_is_within_the_ball_and_new_each_time(device: torch.device) -> None:
    model, _, images, target = _small(device)
    model.requires_grad_(True)
    flat = AlfaWrapper(model, lambda output, target: 0 * output.sum(), "block", init="uniform", eps=0.25)
    state = rng_state(device)
    first, second = flat(images, target).deltas["block"], flat(images, target).deltas["block"]
    # the gradient is zero: what is left is the start
    assert first.abs().max() <= 0.25
    assert first.abs().max() > 0.24
    assert first.mean().abs() < 0.02
    assert not torch.equal(first, second)
    set_rng_state(state, device)
    again = AlfaWrapper(copy.deepcopy(model), flat.criterion, "block", init="uniform", eps=0.25)
    assert torch.equal(again(images, target).deltas["block"], first)


class Norms(Small):
    """With a norm that is no batch norm and keeps statistics, on either side of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(self.stem, EvoNorm2dB0(6))
        self.neck = nn.Sequential(nn.Unflatten(1, (8, 1, 1)), EvoNorm2dB0(8), nn.Flatten(), self.neck)


@pytest.mark.parametrize("init", ["zero", "uniform"])
@pytest.mark.parametrize("steps", [1, 3])
def test_clean_statistics_are_those_of_a_plain_step(steps: int, init: Any, device: torch.device) -> None:
    model = Norms().to(device).train()
    plain = copy.deepcopy(model)
    alfa = AlfaWrapper(model, F.cross_entropy, ["stem", "block"], steps=steps, init=init, eps=0.1)
    images, target = batch(6, dtype=torch.float32, device=device)
    for seed in range(3):
        torch.manual_seed(seed)
        plain(images + seed)
        torch.manual_seed(seed)
        output = alfa(images + seed, target)
        AlfaLoss(F.cross_entropy)(output, target).loss.backward()
    for (name, buffer), (_, expected) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name


@pytest.mark.parametrize("steps", [1, 3])
def test_shared_statistics_move_with_every_pass_of_a_tail(steps: int, device: torch.device) -> None:
    model, alfa, images, target = _small(device, bn="shared", steps=steps)
    alfa(images, target)
    assert model.stem[1].num_batches_tracked == 1
    assert model.block[1].num_batches_tracked == 1
    assert model.neck[1].num_batches_tracked == 1 + steps


@pytest.mark.parametrize("block", ["@last", "layer2.0.bn2"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_lambda_zero_is_plain_training_bit_for_bit(block: str, reduction: Any, device: torch.device) -> None:
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=10, drop_rate=0.3, drop_path_rate=0.3).to(device).train()
    model = copy.deepcopy(plain)
    alfa = AlfaWrapper(model, F.cross_entropy, block, steps=2)
    loss_fn = AlfaLoss(F.cross_entropy, lam=0.0, reduction=reduction)
    images, target = batch(32, dtype=torch.float32, device=device)

    def train(one: nn.Module, loss_of: Any) -> None:
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss_of(images + torch.randn(1, device=device)).backward()
            optimizer.step()

    train(plain, lambda images: F.cross_entropy(plain(images), target))
    train(model, lambda images: loss_fn(alfa(images, target), target).loss)
    for (name, value), (_, expected) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name


def test_nothing_is_left_on_the_model(device: torch.device) -> None:
    model, alfa, images, target = _small(device, steps=2)
    before = picture(model)
    for _ in range(2):
        AlfaLoss(F.cross_entropy)(alfa(images, target), target).loss.backward()
        assert picture(model) == before
    alfa.remove()
    alfa.remove()
    assert picture(model) == before
    assert alfa(images).shape == (4, 10)
    with pytest.raises(RuntimeError, match="was removed"):
        alfa(images, target)
    Small().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_nothing_is_left_after_an_error_in_the_criterion(call: int, device: torch.device) -> None:
    calls = []

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == call:
            raise KeyError("criterion")
        return F.cross_entropy(output, target)

    model = Small().to(device).train()
    images, target = batch(6, dtype=torch.float32, device=device)
    alfa = AlfaWrapper(model, criterion, "block", steps=3)
    before = picture(model)
    with pytest.raises(KeyError, match="criterion"):
        alfa(images, target)
    assert picture(model) == before
    assert alfa(images, target).adv_outputs["block"].shape == (4, 10)


def test_copies_of_the_wrapper_are_independent(device: torch.device) -> None:
    model, alfa, images, target = _small(device)
    alfa(images, target)
    before = copy.deepcopy(model.state_dict())
    other = copy.deepcopy(alfa)
    AlfaLoss(F.cross_entropy)(other(images, target), target).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in other.module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bfloat16_autocast_does_not_round_the_perturbation_away(device: torch.device) -> None:
    seen: list[Tensor] = []

    class Tail(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().float())
            return x.mean(dim=(2, 3))

    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), Tail(), nn.Linear(64, 10)).to(device).train()
    images, target = batch(8, dtype=torch.float32, device=device)
    alfa = AlfaWrapper(model, F.cross_entropy, "1")
    with torch.autocast(device.type, torch.bfloat16):
        output = alfa(images * 3, target)
    clean, adversarial = seen
    delta = output.deltas["1"]
    assert delta.dtype == torch.float32
    moved = (adversarial != clean)[delta != 0]
    assert moved.float().mean() == 1.0
    rounded = ((clean + delta).bfloat16().float() != clean)[delta != 0]
    assert rounded.float().mean() < 0.95  # what would be left in bfloat16


def _share_of_zero_signs(dtype: torch.dtype | None, device: torch.device) -> float:
    torch.manual_seed(0)
    model = (
        nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.Conv2d(32, 32, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        .to(device)
        .train()
    )
    images = torch.randn(16, 3, 32, 32).to(device)
    target = torch.randint(0, 10, (16,)).to(device)
    alfa = AlfaWrapper(model, lambda output, target: F.cross_entropy(output, target) * 1e-2, "0")
    with torch.autocast(device.type, dtype or torch.float16, enabled=dtype is not None):
        delta = alfa(images, target).deltas["0"]
    return float((delta == 0).float().mean())


def test_float16_gradients_of_the_attack_do_not_underflow(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    full = _share_of_zero_signs(None, device)
    assert _share_of_zero_signs(torch.float16, device) < full + 0.01
    monkeypatch.setattr(float16, "SCALES", (1.0,))
    assert _share_of_zero_signs(torch.float16, device) > full + 0.1
