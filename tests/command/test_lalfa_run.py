"""L-ALFA through the training command: resumed runs, what is recorded, mistakes; and eta on several ranks."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reference.plain_alfa import plain_alfa
from summaries import read_summary, reproducible_summary
from torch import nn
from toys import UNet, batch
from training_images import make_image_folder

from timm_alfa import AlfaTask, project_hyperplane
from timm_alfa.run_folder.eta_history import read_history
from timm_alfa.train import main
from timm_alfa.utils.distributed import leave_group

LEARN = (
    "--alfa-blocks layer2 layer3 @last --alfa-learnable --alfa-gamma 0.5 --alfa-alpha 0.05 --alfa-eta-lr 0.1 "
    "--alfa-sample-blocks 2"
)
LOOP = "--model-ema --model-ema-decay 0.8 --mixup 0.2 --drop 0.1 --aa rand-m9 --warmup-epochs 1 --grad-accum-steps 2"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


def run(images: Path, output: Path, extra: str) -> Path:
    arguments = "--model test_resnet --img-size 32 --num-classes 3 -b 6 --workers 0 --opt adamw --lr 1e-3"
    main(
        [*arguments.split(), "--data-dir", str(images), "--output", str(output), "--experiment", "run", *extra.split()]
    )
    return output / "run"


def checkpoint(folder: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        state: dict[str, Any] = torch.load(folder / "last.pth.tar", weights_only=True)
    return state


def test_two_epochs_and_two_more_are_four(images: Path, tmp_path: Path, device: torch.device) -> None:
    flags = f"--device {device} --epochs 4 {LEARN} {LOOP}"
    whole = run(images, tmp_path / "whole", flags)
    run(images, tmp_path / "parts", f"{flags} --stop-epoch 2")
    early = checkpoint(tmp_path / "parts" / "run")
    parts = run(images, tmp_path / "parts", f"{flags} --resume auto")
    expected, found = checkpoint(whole), checkpoint(parts)
    for key in ("state_dict", "state_dict_ema"):
        assert expected[key].keys() == found[key].keys()
        assert all(torch.equal(tensor, found[key][name]) for name, tensor in expected[key].items()), key
    for key in ("eta", "velocity"):
        assert torch.equal(expected["task_state"]["eta"][key], found["task_state"]["eta"][key])
        assert not torch.equal(early["task_state"]["eta"][key], found["task_state"]["eta"][key])
    assert expected["task_state"]["eta"]["blocks"] == ["layer2", "layer3", "layer4"]
    assert expected["task_state"]["passes"] == found["task_state"]["passes"] == 2 * early["task_state"]["passes"]
    assert (whole / "eta.csv").read_bytes() == (parts / "eta.csv").read_bytes()
    assert reproducible_summary(whole) == reproducible_summary(parts)
    weights = torch.load(whole / "last.pth.tar", weights_only=False)["state_dict"]
    assert not any("eta" in name for name in weights)


def test_what_a_run_records(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    with caplog.at_level(logging.INFO):
        folder = run(images, tmp_path, f"--device {device} --epochs 2 {LEARN} --log-interval 1")
    lines = [message for message in caplog.messages if message.startswith("Train: ")]
    assert len(lines) == 10
    blocks, history = read_history(folder)
    assert blocks == ["layer2", "layer3", "layer4"]
    assert [row[0] for row in history] == list(range(1, 11))
    assert history[0][1:] == [1 / 3] * 3
    assert all(sum(row[1:]) == pytest.approx(1, abs=1e-12) for row in history)
    assert len({tuple(row[1:]) for row in history}) == 10
    for line, following in zip(lines, history[1:], strict=False):  # a line shows eta after its step
        shown = line.partition("Eta: ")[2].split()[:3]
        assert [float(value) for value in shown] == pytest.approx(following[1:], abs=5e-5)
    last = read_summary(folder)[-1]
    names = [f"train_{kind}_{block}" for block in blocks for kind in ("eta", "delta_l2", "delta_linf", "delta_ratio")]
    assert set(names) < set(last)
    state = checkpoint(folder)["task_state"]["eta"]
    assert [float(last[f"train_eta_{block}"]) for block in blocks] == state["eta"].tolist()


def fails(images: Path, output: Path, extra: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a run which cannot start leaves."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(images, output, f"--epochs 2 {extra}")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train_alfa.py: error: ")
    assert error.count("\n") == 1
    return error


def test_another_list_of_blocks_is_refused(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    learn = "--alfa-learnable --alfa-gamma 1"
    folder = run(images, tmp_path, f"--epochs 2 --stop-epoch 1 --alfa-blocks layer3 layer4 {learn}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for blocks, names in (("layer4 layer3", "layer4, layer3"), ("layer2 layer3 layer4", "layer2, layer3, layer4")):
        error = fails(images, tmp_path, f"--resume auto --alfa-blocks {blocks} {learn}", capsys)
        assert f"learned for the blocks layer3, layer4 but this run perturbs {names};" in error
        assert "--resume" in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("--alfa-blocks layer3 layer4 --alfa-sample-blocks 3", "--alfa-sample-blocks 3: expected at most the number"),
        ("--alfa-blocks layer3 --alfa-sample-blocks 0", "--alfa-sample-blocks 0: expected a whole number of at"),
        ("--alfa-blocks layer3 --alfa-learnable --alfa-gamma -1", "--alfa-gamma -1.0: expected a finite weight"),
        ("--alfa-blocks layer3 --alfa-learnable --alfa-gamma nan", "--alfa-gamma nan: must be a finite number"),
        ("--alfa-blocks layer3 --alfa-learnable --alfa-eta-lr 0", "--alfa-eta-lr 0.0: expected a finite learning rate"),
        ("--alfa-blocks layer3 --alfa-learnable --alfa-eta-lr -0.1", "--alfa-eta-lr -0.1: expected a finite learning"),
        ("--alfa-blocks layer3 --alfa-gamma 1", "--alfa-gamma 1.0: has no effect without --alfa-learnable"),
        ("--alfa-blocks layer3 --alfa-eta-set simplex", "--alfa-eta-set simplex: has no effect without --alfa-learn"),
        ("--alfa-learnable", "--alfa-learnable: has no effect without --alfa-blocks"),
        ("--alfa-blocks @paper9", "'@paper9' is a set for ResNet-18, ResNet-50 and ResNet-56s, found ResNet"),
    ],
)
def test_mistakes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: str, expected: str) -> None:
    assert expected in fails(images, tmp_path / "out", extra, capsys)
    assert not (tmp_path / "out").exists()


BLOCKS = ["middle", "down2"]


def model_without_dropout() -> UNet:
    torch.manual_seed(0)
    model = UNet().double().train()
    model.drop.p = 0.0
    return model


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = model_without_dropout()
    task = AlfaTask(
        model, nn.CrossEntropyLoss(), BLOCKS, alpha=0.05, gamma=0.5, learnable=True, eta_lr=0.1, verbose=False
    )
    task.prepare_distributed()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    etas = []
    images, target = batch(8, 8)
    half = slice(rank * 4, rank * 4 + 4)
    for index in range(3):
        optimizer.zero_grad()
        with task.no_sync():
            loss = task(images[half] + index, target[half])["loss"]
            loss /= 2
            loss.backward()
        loss = task(images[half] - index, target[half])["loss"]
        loss /= 2
        loss.backward()
        optimizer.step()
        etas.append(task.engine.eta.values.detach().clone())
    torch.save((etas, list(model.state_dict().values()), task.epoch_metrics()), f"{folder}/{rank}.pt")
    leave_group()


def test_two_ranks_learn_the_same_strengths(tmp_path: Path) -> None:
    """Both have the eta of the averaged gradient, which one process takes from central differences of full forwards."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    (etas, weights, metrics), (other_etas, other_weights, other_metrics) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    assert all(map(torch.equal, etas, other_etas))
    assert all(map(torch.equal, weights, other_weights))
    assert metrics == other_metrics

    model = model_without_dropout()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, target = batch(8, 8)
    eta, velocity = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for index in range(3):
        parts = [
            (images[half] + shift, target[half]) for half in (slice(0, 4), slice(4, 8)) for shift in (index, -index)
        ]

        def step(part: Any, values: torch.Tensor, model: nn.Module = model) -> Any:
            strengths = dict(zip(BLOCKS, values.tolist(), strict=True))
            return plain_alfa(
                model, nn.functional.cross_entropy, *part, BLOCKS, alpha=0.05, steps=1, strengths=strengths
            )

        slope = 0.5 * torch.sign(eta)
        for entry in range(2):
            change = torch.zeros(2, dtype=torch.float64)
            change[entry] = 1e-4
            sides = [sum(step(part, eta + side * change).loss.item() for part in parts) / 4 for side in (1, -1)]
            slope[entry] += (sides[0] - sides[1]) / 2e-4
        gradients = [step(part, eta).gradients for part in parts]
        for name, parameter in model.named_parameters():
            parameter.grad = torch.stack([gradient[name] for gradient in gradients]).mean(0)
        optimizer.step()
        velocity = 0.9 * velocity + slope
        eta = project_hyperplane(eta - 0.1 * velocity)
        torch.testing.assert_close(etas[index], eta, rtol=0, atol=1e-8)
    assert float((eta - 0.5).abs().max()) > 1e-4
    for found, expected in zip(weights, model.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
