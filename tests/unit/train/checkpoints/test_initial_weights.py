"""Weights that a run starts from: those that do not fit are refused, with what would help; none are random unsaid."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from training_images import make_image_folder

from timm_alfa.errors import UsageError
from timm_alfa.robust.command import main as robust
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.model import build_model

VIT = "--model test_vit --num-classes 3"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the model, and of others that differ in one respect."""
    folder = tmp_path_factory.mktemp("weights")
    for name, model, options in (
        ("same", "test_vit", {}),
        ("size", "test_vit", {"img_size": 64}),
        ("classes", "test_vit", {"num_classes": 7}),
        ("channels", "test_vit", {"in_chans": 1}),
        ("model", "test_resnet", {}),
    ):
        built = timm.create_model(model, **{"num_classes": 3} | options)
        save_file(built.state_dict(), folder / f"{name}.safetensors")
    return folder


def _build(flags: str) -> nn.Module:
    return build_model(parse_args([*VIT.split(), *flags.split()]))


MISFITS = {
    "size": "of another size than --model test_vit: pos_embed is [1, 17, 64], expected [1, 101, 64]",
    "classes": "has another classifier than --model test_vit with --num-classes 3",
    "channels": "of another size than --model test_vit: patch_embed.proj.weight",
    "model": "of another model than --model test_vit: 170 weights are in one only (blocks.0.attn.proj.bias, ",
}


@pytest.mark.parametrize("name", MISFITS)
def test_an_initial_checkpoint_that_does_not_fit_names_what_would_help(files: Path, name: str) -> None:
    path = files / f"{name}.safetensors"
    with pytest.raises(UsageError) as caught:
        _build(f"--initial-checkpoint {path}")
    message = str(caught.value)
    assert message.startswith(f"--initial-checkpoint {path}: {MISFITS[name]}")
    assert f"--pretrained --pretrained-path {path} adapts" in message
    assert "--model-kwargs img_size=N" in message
    assert "\n" not in message


def test_what_the_message_names_helps(files: Path) -> None:
    """Both remedies."""
    torch.manual_seed(0)
    own = timm.create_model("test_vit", num_classes=3).state_dict()
    for name in ("size", "classes"):
        given = _build(f"--pretrained --pretrained-path {files / name}.safetensors").state_dict()
        theirs = _build("--model-kwargs img_size=64" if name == "size" else "--num-classes 7").state_dict()
        assert given["pos_embed"].shape == own["pos_embed"].shape
        assert given["head.weight"].shape == own["head.weight"].shape
        assert given["blocks.0.attn.qkv.weight"].shape == theirs["blocks.0.attn.qkv.weight"].shape
    model = _build(f"--model-kwargs img_size=64 --initial-checkpoint {files / 'size.safetensors'}")
    expected = timm.create_model("test_vit", num_classes=3, img_size=64,
                                 checkpoint_path=str(files / "size.safetensors")).state_dict()  # fmt: skip
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("flag", ["--initial-checkpoint", "--pretrained --pretrained-path"])
def test_weights_that_fit_are_those_that_timm_loads(files: Path, flag: str, caplog: pytest.LogCaptureFixture) -> None:
    path = str(files / "same.safetensors")
    pretrained = "--pretrained" in flag
    options = {"pretrained_cfg_overlay": {"file": path, "num_classes": -1}} if pretrained else {"checkpoint_path": path}
    torch.manual_seed(0)
    model = _build(f"{flag} {path}")
    torch.manual_seed(0)
    expected = timm.create_model("test_vit", num_classes=3, pretrained=pretrained, **options).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert "at random" not in caplog.text
    assert nn.Module.load_state_dict.__name__ == "load_state_dict"  # as before


def test_pretrained_weights_of_another_model_are_no_start_at_random(files: Path) -> None:
    path = files / "model.safetensors"
    with pytest.raises(UsageError) as caught:
        _build(f"--pretrained --pretrained-path {path}")
    assert str(caught.value).startswith(
        f"--pretrained-path {path}: of another model than --model test_vit: 78 of 78 weights are not in it (blocks.0."
    )
    assert nn.Module.load_state_dict.__name__ == "load_state_dict"


def test_pretrained_weights_that_timm_does_not_adapt_name_what_would_help(files: Path, tmp_path: Path) -> None:
    weights = timm.create_model("test_vit", num_classes=3).state_dict()
    weights["blocks.0.norm1.weight"] = torch.zeros(7)
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    with pytest.raises(UsageError) as caught:
        _build(f"--pretrained --pretrained-path {path}")
    assert str(caught.value).startswith(f"--pretrained-path {path}: does not fit --model test_vit")
    assert "blocks.0.norm1.weight" in str(caught.value)
    assert "--model-kwargs img_size=N" in str(caught.value)


def test_weights_that_are_partly_missing_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = timm.create_model("test_vit", num_classes=3).state_dict()
    del weights["norm.weight"], weights["norm.bias"]
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    _build(f"--pretrained --pretrained-path {path}")
    assert f"{path}: 2 weights of --model test_vit are not in it and start at random (norm.bias, norm.weight)" in (
        caplog.text
    )


@pytest.mark.parametrize("flag", ["--initial-checkpoint", "--pretrained --pretrained-path"])
def test_a_file_that_is_none_of_weights_is_named(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_text("not weights")
    with pytest.raises(UsageError) as caught:
        _build(f"{flag} {path}")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_loaded_is_refused(files: Path) -> None:
    path = files / "same.safetensors"
    with pytest.raises(UsageError, match="is loaded only with --pretrained"):
        parse_args(["--pretrained-path", str(path)])


def test_robust_accuracy_is_not_that_of_a_random_classifier(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = files / "same.safetensors"
    with pytest.raises(SystemExit) as caught:
        robust([*VIT.split(), "--dataset", "digits", "--pretrained", "--pretrained-path", str(path)])
    assert caught.value.code == 2
    assert f"--pretrained-path {path}: timm leaves the classifier in it out; use --initial-checkpoint" in (
        capsys.readouterr().err
    )


def test_a_size_that_a_model_is_not_built_for_names_what_would_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_image_folder(tmp_path / "images", train=1, validation=1)
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "--data-dir",
                str(images),
                "--model",
                "test_vit",
                "--model-kwargs",
                "dynamic_img_size=False",
                "--img-size",
                "48",
                "--num-classes",
                "3",
            ]
        )
    assert caught.value.code == 2
    assert "takes another with --model-kwargs img_size=48" in capsys.readouterr().err
