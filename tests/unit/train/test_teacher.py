"""--kd-model-name: timm's own task, built in timm's order, and teachers that cannot teach told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from torch import nn

from timm_alfa import UsageError
from timm_alfa.export import export_model
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.device import create_precision
from timm_alfa.train.teacher import create_distillation

TOKEN = "--model deit_tiny_distilled_patch16_224 --kd-distill-type token"
SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher of three classes."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    export_model(timm.create_model("test_resnet", num_classes=3), folder)
    return f"local-dir:{folder}"


def _create(name: str, extra: str = "", classes: int = 3, size: int = 32) -> Any:
    argv = f"--model test_resnet --num-classes {classes} --kd-model-name {name} {extra}"
    args = parse_args([*argv.split(), "--device", "cpu"])
    torch.manual_seed(3)
    model = timm.create_model(args.model, num_classes=classes, **(SMALL if "deit" in args.model else {}))
    device = torch.device("cpu")
    return create_distillation(
        args, model, nn.CrossEntropyLoss(), device=device, precision=create_precision(args, device),
        input_size=(3, size, size), verbose=False,
    )  # fmt: skip


def test_the_flags_become_timms_arguments(folder: str):
    task = _create(folder, "--kd-temperature 2 --task-loss-weight 0.25")
    assert type(task) is LogitDistillationTask
    assert (task.temperature, task.task_loss_weight, task.distill_loss_weight) == (2.0, 0.25, 0.75)
    task = _create(folder, "--kd-distill-type feature --distill-loss-weight 5 --kd-student-feature-dim 96")
    assert type(task) is FeatureDistillationTask
    assert (task.task_loss_weight, task.distill_loss_weight) == (1.0, 5.0)
    task = _create(folder, f"{TOKEN} --kd-token-distill-type hard")
    assert type(task) is TokenDistillationTask
    assert task.distill_type == "hard"
    assert not task.teacher.model.training


def test_weights_and_random_draws_are_timms(folder: str):
    """A wider student needs a projection, which is drawn after the teacher."""
    ours = _create(folder, "--kd-distill-type feature --model test_efficientnet")
    after = torch.get_rng_state()
    torch.manual_seed(3)
    student = timm.create_model("test_efficientnet", num_classes=3)
    own = FeatureDistillationTask(student, folder, nn.CrossEntropyLoss(), verbose=False)
    assert ours.trainable_module.projection is not None
    for name, value in own.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert torch.equal(torch.get_rng_state(), after)


def test_the_trial_moves_nothing(folder: str):
    task = _create(folder)
    torch.manual_seed(3)
    fresh = timm.create_model("test_resnet", num_classes=3)
    assert all(
        torch.equal(value, task.trainable_module.state_dict()[name]) for name, value in fresh.state_dict().items()
    )
    assert task.trainable_module.training


def test_teachers_that_cannot_teach(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    export_model(timm.create_model("test_vit3", num_classes=3), tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    wrong = [
        (("resnet18x",), "--kd-model-name resnet18x: timm has no such model; nearest: resnet18"),
        ((f"local-dir:{tmp_path / 'empty'}",), "cannot be set up: Config file not found"),
        (("hf-hubb:a/b",), "cannot be set up: Unknown model source 'hf-hubb'"),
        ((folder, "", 4), "its weights tell 3 classes, --num-classes is 4; expected a teacher of the same classes"),
        ((folder, "--kd-distill-type token"), "--kd-distill-type token: cannot be set up: Model ResNet does not have"),
        ((folder, "--kd-distill-type feature --kd-student-feature-dim 7"), "cannot be compared on images [3, 32, 32]"),
        ((folder, "--kd-distill-type feature --kd-teacher-feature-dim 7"), "gives [96] per image where the student"),
        ((f"local-dir:{tmp_path / 'vit'}", "", 3, 48), "cannot be compared on images [3, 48, 48]: Input height (48)"),
    ]
    for arguments, message in wrong:
        with pytest.raises(UsageError) as caught:
            _create(*arguments)
        assert message in str(caught.value), arguments
        assert "\n" not in str(caught.value)


def test_other_classes_do_not_matter_to_features(folder: str):
    assert _create(folder, "--kd-distill-type feature", classes=4).trainable_module.student.num_classes == 4
