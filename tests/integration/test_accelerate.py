"""ALFA under Hugging Face Accelerate, with the real package: the weights and eta of a plain loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from own_loops import (
    assert_trained_alike,
    free_port,
    join_group,
    make_alfa,
    make_batches,
    make_model,
    make_optimizer,
    train_plainly,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate", reason="an optional extra, part of the test extra")


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Accelerate remembers its settings in the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("prepared", [False, True], ids=["bare optimizer", "prepared optimizer"])
def test_the_plain_loops_weights(accumulate: int, prepared: bool) -> None:
    batches = make_batches()
    model = make_model()
    alfa, loss_fn = make_alfa(model)
    optimizer = make_optimizer(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    if not prepared:
        alfa.follow(optimizer, accelerator.scaler)
    loader = DataLoader(batches, batch_size=None)
    alfa, optimizer, loader = accelerator.prepare(alfa, optimizer, loader)
    if prepared:
        alfa.follow(optimizer, accelerator.scaler)
    for images, target in loader:
        with accelerator.accumulate(alfa):
            accelerator.backward(loss_fn(alfa(images, target), target).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_trained_alike(model, alfa.eta.values, train_plainly(batches, accumulate=accumulate))
    make_model().load_state_dict(model.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
def test_a_compiler_around_the_wrapper() -> None:
    batches = make_batches()
    model = make_model()
    alfa, loss_fn = make_alfa(model)
    optimizer = make_optimizer(model)
    accelerator = accelerate.Accelerator(cpu=True, dynamo_backend="aot_eager")
    alfa.follow(optimizer, accelerator.scaler)
    compiled, optimizer, loader = accelerator.prepare(alfa, optimizer, DataLoader(batches, batch_size=None))
    for images, target in loader:
        accelerator.backward(loss_fn(compiled(images, target), target).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert_trained_alike(model, alfa.eta.values, train_plainly(batches))


def test_bfloat16_takes_the_loss_in_float32() -> None:
    model = make_model().float()
    alfa, loss_fn = make_alfa(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    alfa, optimizer = accelerator.prepare(alfa, make_optimizer(model))
    alfa.follow(optimizer, accelerator.scaler)
    images, target = make_batches()[0]
    with accelerator.autocast():
        output = alfa(images.float(), target)
        result = loss_fn(output, target)
    assert output.output.dtype == torch.bfloat16
    assert result.loss.dtype == torch.float32
    accelerator.backward(result.loss)
    optimizer.step()
    assert not torch.equal(alfa.eta.values, torch.full((2,), 0.5, dtype=torch.float64))


def test_eta_is_resumed(tmp_path: Path) -> None:
    batches = make_batches()
    saved = []
    for start in (True, False):
        fresh = accelerate.Accelerator(cpu=True)
        model = make_model()
        alfa, loss_fn = make_alfa(model)
        alfa, optimizer = fresh.prepare(alfa, make_optimizer(model))
        alfa.follow(optimizer)
        fresh.register_for_checkpointing(alfa.eta)
        if not start:
            fresh.load_state(str(tmp_path))
        for images, target in batches[:2] if start else batches[2:]:
            fresh.backward(loss_fn(alfa(images, target), target).loss)
            optimizer.step()
            optimizer.zero_grad()
        if start:
            fresh.save_state(str(tmp_path))
        saved.append((model, alfa.eta.values))
    assert_trained_alike(*saved[1], train_plainly(batches))


def _rank(rank: int, port: int, folder: str) -> None:
    join_group(rank, port)
    model = make_model()
    alfa, loss_fn = make_alfa(model)
    optimizer = make_optimizer(model)
    accelerator = accelerate.Accelerator(cpu=True)
    alfa.follow(optimizer, accelerator.scaler)
    wrapped, optimizer = accelerator.prepare(alfa, optimizer)
    assert isinstance(wrapped, DistributedDataParallel)
    for images, target in make_batches()[rank::2]:
        accelerator.backward(loss_fn(wrapped(images, target), target).loss)
        optimizer.step()
        optimizer.zero_grad()
    torch.save((model.state_dict(), alfa.eta.values.detach()), f"{folder}/{rank}.pt")
    accelerator.end_training()


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates(tmp_path: Path) -> None:
    """Gradients of weights and eta are averaged over processes, as over the batches of an update."""
    torch.multiprocessing.spawn(_rank, (free_port(), str(tmp_path)), nprocs=2)
    expected = train_plainly(make_batches(), accumulate=2)
    for rank in (0, 1):
        weights, eta = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        model = make_model()
        model.load_state_dict(weights)
        assert_trained_alike(model, eta, expected)
