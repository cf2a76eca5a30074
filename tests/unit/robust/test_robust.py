"""Robust accuracy: of plainly and adversarially trained models, of models left as they were, and from the command."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rng import rng_state
from sklearn.datasets import load_digits
from torch import Tensor, nn
from toys import Small, batch
from training_images import make_image_folder

from timm_alfa.errors import UsageError
from timm_alfa.peers import PgdTask, PixelAttack
from timm_alfa.robust import robust_accuracy
from timm_alfa.robust.command import main
from timm_alfa.train import main as train_main
from timm_alfa.train.arguments.command_line import parse_args

EPS = 48.0  # of 255; the digits have strong contrasts


def _digits() -> tuple[Tensor, Tensor]:
    images, target = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(target)


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def _attack(eps: float, steps: int) -> PixelAttack:
    return PixelAttack(eps, max(eps / 4, eps / steps), steps, (0.0,), (1.0,), "uniform")


def _trained(eps: float, steps: int, epochs: int) -> nn.Module:
    images, target = _digits()
    task = PgdTask(_model(), nn.CrossEntropyLoss(), _attack(eps, steps), verbose=False)
    model = task.get_trainable_module()
    assert model is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            task(images[chosen], target[chosen])["loss"].backward()
            optimizer.step()
    return model


def _measure(model: nn.Module) -> dict[str, float]:
    images, target = _digits()
    return robust_accuracy(model, [(images[:200], target[:200]), (images[200:300], target[200:300])], _attack(EPS, 20))


def test_only_adversarial_training_withstands_the_attack() -> None:
    plain = _measure(_trained(1e-3, steps=1, epochs=3))
    robust = _measure(_trained(EPS, steps=3, epochs=4))
    assert plain["images"] == 300
    assert plain["top1"] > 95
    assert plain["robust_top1"] < 5
    assert robust["top1"] > 85
    assert robust["robust_top1"] > 40


def test_the_model_and_the_random_state_are_left_as_they_were(device: torch.device) -> None:
    model = Small().to(device).train()
    model.neck.eval()
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), rng_state(device)
    images, target = batch(8, dtype=torch.float32, device=device)
    attack = PixelAttack(8.0, 2.0, 3, (0.5,), (0.2,), "uniform")
    first = robust_accuracy(model, [(images, target)], attack)
    assert first == robust_accuracy(model, [(images, target)], attack)
    assert torch.equal(rng_state(device), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_no_images() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        robust_accuracy(Small(), [], _attack(8.0, 1))


def test_command_on_a_checkpoint_and_on_its_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_image_folder(tmp_path / "data")
    common = ["--data-dir", str(data), "--model", "resnet20s", "--num-classes", "3", "--workers", "0", "-b", "6"]
    train_main(
        [
            *common,
            "--method",
            "pgd-at",
            "--pgd-at-steps",
            "1",
            "--epochs",
            "1",
            "--output",
            str(tmp_path),
            "--experiment",
            "run",
        ]
    )
    attack = ["--eval-pgd", "2", "--eval-pgd-eps", "4", "--eval-pgd-init", "zero"]
    results = [
        main([*common, *attack, "--initial-checkpoint", str(tmp_path / "run" / name)])
        for name in ("model_best.pth.tar", "model.safetensors")
    ]
    assert results[0] == results[1]
    assert results[0]["images"] == 6
    assert results[0]["robust_top1"] <= results[0]["top1"]
    assert "PGD-2, eps 4/255, alpha 2/255, zero start: clean " in capsys.readouterr().out


def _sixteen_bits(root: Path) -> Path:
    """Grey images of 16 bits, dark and bright, nearly all above the 255 at which PIL's own conversion ends."""
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name, low in (("bright", 40_000), ("dark", 5_000)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(6):
                pixels = generator.integers(low, low + 20_000, (32, 32), dtype=np.uint16)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize("in_chans", ["1", "3"])
def test_images_of_16_bits_are_told_apart(tmp_path: Path, in_chans: str) -> None:
    """Training and the attack see the same images; made constant white, both classes would get the same answer."""
    common = [
        "--data-dir",
        str(_sixteen_bits(tmp_path / "data")),
        "--model",
        "resnet20s",
        "--num-classes",
        "2",
        "--in-chans",
        in_chans,
        "--img-size",
        "16",
        "--workers",
        "0",
        "-b",
        "6",
        "--eval-pgd",
        "1",
    ]
    train_main(
        [
            *common,
            "--epochs",
            "6",
            "--lr",
            "0.05",
            "--warmup-epochs",
            "0",
            "--val-interval",
            "6",
            "--output",
            str(tmp_path),
            "--experiment",
            "run",
            "--color-jitter",
            "0",
        ]
    )
    trained = json.loads((tmp_path / "run" / "robust.json").read_text())
    found = main([*common, "--initial-checkpoint", str(tmp_path / "run" / "model.safetensors")])
    assert trained["top1"] == found["top1"] == 100


def test_an_image_without_a_known_range_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_image_folder(tmp_path / "data", train=2)
    weights = tmp_path / "weights.pth"
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=3).state_dict()}, weights)
    command = [
        "--data-dir",
        str(data),
        "--input-key",
        ".png;.tif",
        "--model",
        "test_resnet",
        "--num-classes",
        "3",
        "--img-size",
        "32",
        "--workers",
        "1",
        "-b",
        "2",
        "--initial-checkpoint",
        str(weights),
    ]
    message = "a 32-bit image with values from 0 to 70000, expected 0 to 65535; store it with 8 or 16 unsigned bits"
    for name, code in (("c/9.tif", 1), ("a/0-.tif", 2)):  # found on the way, and looked at first
        path = data / "validation" / name
        Image.fromarray(np.array([[0, 70_000]] * 2, dtype=np.int32)).save(path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(command)
        error = capsys.readouterr().err
        assert (caught.value.code, error.count("\n")) == (code, 1)
        assert f"{path}: {message}\n" in error


def test_the_classes_must_be_those_of_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_image_folder(tmp_path / "data", train=2)
    common = [
        "--data-dir",
        str(data),
        "--model",
        "test_resnet",
        "--num-classes",
        "3",
        "--img-size",
        "32",
        "--workers",
        "0",
        "-b",
        "2",
        "--eval-pgd",
        "1",
    ]
    train_main([*common, "--epochs", "1", "--lr", "0.01", "--output", str(tmp_path), "--experiment", "run"])
    for name in ("model_best.pth.tar", "model.safetensors"):
        main([*common, "--initial-checkpoint", str(tmp_path / "run" / name)])
    shutil.rmtree(data / "validation" / "b")
    for name in ("model_best.pth.tar", "model.safetensors"):  # 'c' would be number 1
        capsys.readouterr()
        path = tmp_path / "run" / name
        with pytest.raises(SystemExit) as caught:
            main([*common, "--initial-checkpoint", str(path)])
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith(
            f"timm_alfa.robust: error: --initial-checkpoint {path}: was trained on 3 classes, the data has 2: 'b' only "
            "in the checkpoint; expected the same classes\n"
        )


def test_a_run_ends_with_the_robust_accuracy_of_what_it_exported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_image_folder(tmp_path / "data")
    common = ["--data-dir", str(data), "--model", "resnet20s", "--num-classes", "3", "--workers", "0", "-b", "6"]
    attack = ["--eval-pgd", "2", "--eval-pgd-eps", "4"]
    train = [
        *common,
        *attack,
        "--alfa-blocks",
        "@last",
        "--model-ema",
        "--epochs",
        "1",
        "--resume",
        "auto",
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
    ]
    with caplog.at_level("INFO"):
        train_main(train)
    record = tmp_path / "run" / "robust.json"
    found = json.loads(record.read_text())
    assert found == {
        "checkpoint": "model.safetensors",
        "attack": "PGD-2, eps 4/255, alpha 2/255, uniform start",
        **main([*common, *attack, "--initial-checkpoint", str(tmp_path / "run" / "model.safetensors")]),
    }
    line = f"clean {found['top1']:.2f}, robust {found['robust_top1']:.2f} (top-1 in percent, 6 images)"
    assert line in caplog.text
    record.unlink()  # as if killed before it had been measured
    train_main(train)
    assert json.loads(record.read_text()) == found
    train_main([*train, "--eval-pgd", "1"])  # of a run that is complete
    assert json.loads(record.read_text())["attack"] == "PGD-1, eps 4/255, alpha 2/255, uniform start"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eval-pgd", "0"], "--eval-pgd 0: expected a whole number of at least 1"),
        (["--eval-pgd-eps", "4"], "--eval-pgd-eps 4.0: has no effect without --eval-pgd"),
        (["--eval-pgd", "2", "--eval-pgd-alpha", "0"], "--eval-pgd-alpha 0.0: expected a finite step above 0"),
        (
            ["--eval-pgd", "2", "--val-split="],
            "--eval-pgd 2: attacks test or validation images; name some with --val-split",
        ),
    ],
)
def test_bad_flags_of_a_run(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_args(argv)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eval-pgd", "0"], "--eval-pgd 0: expected a whole number of at least 1"),
        (["--eval-pgd-eps", "-1"], "--eval-pgd-eps -1.0: expected at least 0"),
        (["--eval-pgd-alpha", "zero"], "argument --eval-pgd-alpha: expected a number or a fraction"),
        (["--eval-pgd-init", "middle"], "argument --eval-pgd-init: invalid choice: 'middle'"),
        (["--eval-pgd", "2"], "--initial-checkpoint: name the checkpoint to evaluate"),
        (["--initial-checkpoint", "nothing.pth"], "--initial-checkpoint nothing.pth: no such file"),
        (["--initial-checkpoint", __file__, "--val-split="], "--val-split: is empty, expected the split whose images"),
        (["--eval-pdg", "2"], "unrecognized arguments: --eval-pdg"),
    ],
)
def test_bad_flags(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--dataset", "digits", "--model", "resnet20s", *argv])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("timm_alfa.robust: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "--eval-pgd-eps" in shown
    assert "--initial-checkpoint" in shown
