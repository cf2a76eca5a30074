"""Numbers that are infinite, or none: never added to a feature, and never stepped on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from timm.task import ClassificationTask
from torch import Tensor, nn
from toys import Small, batch
from training_images import make_image_folder

from timm_alfa import AlfaTask, AlfaWrapper
from timm_alfa.errors import NonFiniteError
from timm_alfa.pgd import is_finite, pgd_step
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.device import Precision
from timm_alfa.train.finite import check_weights
from timm_alfa.train.loop import Training, train_one_epoch
from timm_alfa.utils.distributed import leave_group

BAD = [float("nan"), float("inf"), float("-inf")]
BLOCKS = ["stem", "block"]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("value", BAD)
def test_a_step_along_a_bad_gradient_is_finite(norm: Any, value: float, device: torch.device) -> None:
    gradients = [torch.randn(3, 4, device=device), torch.randn(3, 2, 2, device=device)]
    expected = pgd_step(None, gradients, alpha=0.5, norm=norm, eps=0.3)
    gradients[1][1, 0, 1] = value
    found = pgd_step(None, gradients, alpha=0.5, norm=norm, eps=0.3)
    assert all(part.isfinite().all() for part in found)
    for sample in (0, 2):
        assert all(torch.equal(one[sample], other[sample]) for one, other in zip(found, expected, strict=True))
    if norm == "l2":
        assert all(not part[1].any() for part in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite(dtype: torch.dtype, device: torch.device) -> None:
    largest = torch.finfo(torch.float16).max
    parts = [torch.full((40, 30), largest, dtype=dtype, device=device), torch.zeros(3, dtype=dtype, device=device)]
    assert is_finite(parts)
    for value in BAD:
        parts[1][1] = value
        assert not is_finite(parts)


class Breaking(torch.autograd.Function):
    """The identity, whose gradient is a given number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(gradient, ctx.value), None


class Faulty(nn.Module):
    """Two convolutions and a head. In the steps that ``faults`` lists, what it names goes wrong."""

    def __init__(self, faults: dict[int, str], value: float = float("nan")) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Conv2d(6, 8, 3, padding=1)
        self.after = nn.Identity()
        self.head = nn.Linear(8, 10)
        self.faults, self.value, self.calls = faults, value, 0

    def forward(self, x: Tensor) -> Tensor:
        fault = self.faults.get(self.calls, "")
        self.calls += 1
        x = self.stem(x).tanh()
        x = self.block(x + self.value if fault == "feature" else x)
        if fault == "feature":
            x = torch.nan_to_num(self.after(x))  # the loss never learns of it
        if fault == "gradient":
            x = Breaking.apply(x, self.value)
        output: Tensor = self.head(x.mean(dim=(2, 3)))
        return output * self.value if fault == "loss" else output


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("value", BAD)
def test_perturbations_that_are_not_finite_are_never_added(norm: Any, value: float, device: torch.device) -> None:
    """In a loop of one's own: nothing raises, and nothing bad is added."""
    model = Faulty(dict.fromkeys(range(9), "gradient"), value).to(device)
    alfa = AlfaWrapper(model, nn.CrossEntropyLoss(), ["block"], norm=norm, steps=3)
    images, target = batch(8, dtype=torch.float32, device=device)
    result = alfa(images, target)
    assert result.deltas["block"].isfinite().all()
    assert result.adv_outputs["block"].isfinite().all()
    model.calls = 0
    other = Faulty(dict.fromkeys(range(9), "gradient"), value).to(device)
    task = AlfaTask(other, None, ["block"], norm=norm, device=device, verbose=False)
    step = task(images, target)
    assert step["loss"].isfinite()
    assert {name for name, fine in step["finite"].items() if not fine} == {"perturbation of block"}


def _training(task: ClassificationTask, batches: list[Any], flags: str = "", **changes: Any) -> Training:
    args = parse_args(flags.split())
    args.distributed, args.world_size, args.rank, args.prefetcher = False, 1, 0, False
    for name, value in changes.items():
        setattr(args, name, value)
    model = task.get_trainable_module()
    assert model is not None
    return Training(
        args=args,
        task=task,
        loader=batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        device=next(model.parameters()).device,
        precision=Precision(None, torch.enable_grad, None),
        batch_size=4.0,
    )


def _alfa(model: nn.Module) -> AlfaTask:
    return AlfaTask(model, nn.CrossEntropyLoss(), ["block"], verbose=False)


def _plain(model: nn.Module) -> ClassificationTask:
    return ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)


def _state(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.state_dict().values()]


FAULTS: list[tuple[Callable[[nn.Module], ClassificationTask], str, str]] = [
    (_plain, "loss", "rank 0: loss."),
    (_alfa, "loss", "rank 0: loss, perturbation of block"),
    (_alfa, "feature", "feature of block"),
    (_alfa, "gradient", "rank 0: perturbation of block."),
]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("build", "fault", "named"), FAULTS)
def test_a_run_stops_before_the_weights_take_the_step(
    build: Callable[[nn.Module], ClassificationTask], fault: str, named: str, value: float, device: torch.device
) -> None:
    calls_per_step = 1 if build is _plain else 2  # ALFA's tail is a second call
    model = Faulty({2 * calls_per_step: fault}, value).to(device)
    run = _training(build(model), [batch(8, dtype=torch.float32, device=device)] * 5)
    states = []
    run.optimizer.register_step_post_hook(lambda *_: states.append(_state(model)))
    with pytest.raises(NonFiniteError) as caught:
        train_one_epoch(run, 7)
    assert str(caught.value).startswith("epoch 7, step 2: not finite on rank 0: ")
    assert named in str(caught.value)
    assert len(states) == 2
    assert all(map(torch.equal, states[-1], _state(model)))


def test_an_adversarial_loss_is_named_with_its_block(device: torch.device) -> None:
    model = Faulty({1: "loss"}).to(device)  # the replay of the block's tail
    with pytest.raises(NonFiniteError, match="rank 0: loss, adversarial loss of block"):
        train_one_epoch(_training(_alfa(model), [batch(8, dtype=torch.float32, device=device)]), 0)


def test_a_bad_batch_of_an_accumulated_update_stops_that_update(device: torch.device) -> None:
    model = Faulty({2: "loss"}).to(device)
    run = _training(_plain(model), [batch(8, dtype=torch.float32, device=device)] * 6, "--grad-accum-steps 2")
    steps = []
    run.optimizer.register_step_post_hook(lambda *_: steps.append(0))
    with pytest.raises(NonFiniteError, match="epoch 0, step 1: not finite on rank 0: loss"):
        train_one_epoch(run, 0)
    assert len(steps) == 1


def test_overflows_of_scaled_gradients_are_left_to_the_loss_scaler(device: torch.device) -> None:
    """float16 losses are scaled, and a gradient that then overflows is an everyday matter."""
    task = AlfaTask(Faulty({0: "gradient"}, float("inf")).to(device), nn.CrossEntropyLoss(), BLOCKS, verbose=False)
    images, target = batch(8, dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=torch.float16):
        step = task(images, target)
    assert all(step["finite"].values())
    assert step["loss"].isfinite()
    assert not any(name.startswith("perturbation") for name in step["finite"])


def test_weights_that_are_not_finite_are_not_saved(device: torch.device) -> None:
    args = parse_args([])
    args.distributed = False
    model = Small().to(device)
    check_weights(args, model, device, 3)
    with torch.no_grad():
        model.head.bias[4] = float("inf")
    with pytest.raises(NonFiniteError, match=r"epoch 3, after its last step: not finite on rank 0: head\.bias"):
        check_weights(args, model, device, 3)


def test_the_command_ends_in_one_line_with_code_1_and_keeps_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    images = make_image_folder(tmp_path / "images")
    command = (
        f"--data-dir {images} --model test_resnet --img-size 32 --num-classes 3 -b 8 --workers 0 --warmup-epochs 0 "
        f"--device {device} --epochs 3 --output {tmp_path} --experiment run --resume auto --alfa-blocks layer4 "
        "--sched none"
    )
    main([*command.split(), "--stop-epoch", "1"])
    before = (tmp_path / "run" / "last.pth.tar").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--no-resume-opt", "--lr", "1e30"])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("train_alfa.py: error: epoch 1, step ")
    assert error.count("\n") == 1
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == before
    main([*command.split(), "--lr", "0.01"])
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() != before


def _rank(rank: int, folder: str, fault: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Faulty({2: fault} if rank == 1 else {})  # the first batch of the second update
    task = _alfa(model) if fault == "gradient" else _plain(model)
    if fault == "gradient":
        model.faults = {key * 2: value for key, value in model.faults.items()}
    task.prepare_distributed()
    flags = "--grad-accum-steps 2"
    run = _training(task, [batch(8, dtype=torch.float32)] * 6, flags, distributed=True, world_size=2, rank=rank)
    steps: list[int] = []
    run.optimizer.register_step_post_hook(lambda *_: steps.append(0))
    try:
        train_one_epoch(run, 0)
    except NonFiniteError as error:
        torch.save((str(error), len(steps), _state(model)), f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.parametrize(("fault", "named"), [("loss", "loss"), ("gradient", "perturbation of block")])
def test_all_ranks_stop_together_and_name_the_one(tmp_path: Path, fault: str, named: str) -> None:
    processes.call_ranks(_rank, (str(tmp_path), fault), 2)
    (message, steps, weights), (other_message, other_steps, other_weights) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    assert message == other_message
    assert message.startswith(f"epoch 0, step 1: not finite on rank 1: {named}. ")
    assert steps == other_steps == 1
    assert all(map(torch.equal, weights, other_weights))
    assert all(weight.isfinite().all() for weight in weights)
