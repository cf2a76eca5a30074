"""Flags that are changed on ``--resume``: every one takes effect, is refused, or is kept and said to be."""

from __future__ import annotations

import logging
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import StepLRScheduler
from training_images import make_image_folder

from timm_alfa.perturbation import Pgd
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import build_parser, parse_args
from timm_alfa.train.build import Plan, assemble, check_inputs
from timm_alfa.train.checkpoints import resume_flags
from timm_alfa.train.checkpoints.resume_flags import FATES, Fate, settle_flags

BASE = (
    "--model test_resnet --img-size 32 --num-classes 3 -b 8 --workers 0 --opt adamw --lr 1e-3 --weight-decay 0.05 "
    "--warmup-epochs 0 --epochs 3 --experiment run --hflip 0 --model-ema --alfa-blocks layer3 @last"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=6)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was stopped after the first of its three epochs."""
    output = tmp_path_factory.mktemp("trained")
    main(_arguments(images, output, "--stop-epoch 1"))
    return output


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "out"


def _arguments(images: Path, output: Path, extra: str) -> list[str]:
    return [*BASE.split(), "--data-dir", str(images), "--output", str(output), *extra.split()]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _checkpoint(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def _change_args(output: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = output / "run" / "last.pth.tar"
    checkpoint = _checkpoint(path)
    change(checkpoint)
    torch.save(checkpoint, path)


def _plan(images: Path, output: Path, extra: str) -> Plan:
    """What the command would train with."""
    args = parse_args(_arguments(images, output, f"--resume auto {extra}"))
    args.prefetcher = True
    path, checkpoint = check_inputs(args)
    assert checkpoint is not None
    settle_flags(args, path, checkpoint)
    return assemble(args, path, checkpoint)


def test_every_flag_has_one_fate() -> None:
    flags = {action.dest for action in build_parser()._actions} - {"help", "config"}
    assert flags == set(FATES)
    names = [name for line in resume_flags._NAMES.values() for name in line.split()]
    assert sorted([*names, *resume_flags._BY_VALUE]) == sorted(FATES)


def test_unchanged_flags_are_not_spoken_of(images: Path, output: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        plan = _plan(images, output, "")
    assert plan.start_epoch == 1
    assert not [line for line in caplog.messages if "from here on" in line or "changed values" in line]
    assert "has no effect" not in caplog.text


def _group_values(plan: Plan, key: str) -> list[Any]:
    return [group[key] for group in plan.run.optimizer.param_groups]


HOLDS: dict[str, Callable[[Plan], bool]] = {
    "--lr 0.5": lambda plan: _group_values(plan, "initial_lr") == [0.5, 0.5] == plan.run.scheduler.base_values,
    "--lr 0 --lr-base 0.25": lambda plan: _group_values(plan, "initial_lr") == [0.25 * (8 / 256) ** 0.5] * 2,
    "--weight-decay 0.3": lambda plan: _group_values(plan, "weight_decay") == [0.0, 0.3],
    "--opt-betas 0.5 0.6": lambda plan: [tuple(b) for b in _group_values(plan, "betas")] == [(0.5, 0.6)] * 2,
    "--opt-eps 0.01": lambda plan: _group_values(plan, "eps") == [0.01] * 2,
    "--epochs 7": lambda plan: (plan.num_epochs, plan.run.scheduler.t_initial) == (7, 7),
    "--sched step --decay-epochs 1 --decay-rate 0.5": lambda plan: (
        isinstance(plan.run.scheduler, StepLRScheduler) and plan.run.learning_rate == 0.5e-3
    ),
    "--sched none": lambda plan: plan.run.scheduler is None and plan.run.learning_rate == 1e-3,
    "--min-lr 9e-4": lambda plan: plan.run.learning_rate > 9e-4,
    "--smoothing 0.3": lambda plan: plan.run.task.criterion.smoothing == 0.3,
    "--mixup 0.7": lambda plan: (
        isinstance(plan.run.task.criterion, SoftTargetCrossEntropy)
        and plan.run.loader.loader.collate_fn.mixup_alpha == 0.7
    ),
    "--clip-grad 0.1": lambda plan: plan.run.args.clip_grad == 0.1,
    "--drop 0.4": lambda plan: plan.run.module.drop_rate == 0.4,
    "--model-ema-decay 0.5": lambda plan: plan.run.task.trainable_module_ema.decay == 0.5,
    "--batch-size 4": lambda plan: plan.run.loader.loader.batch_size == 4,
    "--img-size 48": lambda plan: plan.data_config["input_size"][-1] == 48,
    "--alfa-alpha 0.1 --alfa-steps 3": lambda plan: plan.run.task.engine.perturbation == Pgd(0.1, 3),
    "--alfa-lambda 0.5": lambda plan: plan.run.task.objective.lam == 0.5,
    "--alfa-bn shared": lambda plan: plan.run.task.engine.bn == "shared",
    "--opt sgd --no-resume-opt": lambda plan: type(plan.run.optimizer).__name__ == "SGD",
    "--layer-decay 0.5 --no-resume-opt": lambda plan: min(_group_values(plan, "lr_scale")) < 0.5,
}


@pytest.mark.parametrize("extra", HOLDS)
def test_what_takes_effect_is_what_the_run_goes_on_with(
    images: Path, output: Path, extra: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        plan = _plan(images, output, extra)
    assert HOLDS[extra](plan)
    assert plan.run.optimizer.state or "--no-resume-opt" in extra
    said = [line for line in caplog.messages if ": from here on --" in line or "with changed values" in line]
    assert said


def test_layer_decay_takes_another_value(images: Path, tmp_path: Path) -> None:
    main(_arguments(images, tmp_path, "--layer-decay 0.5 --stop-epoch 1"))
    plan = _plan(images, tmp_path, "--layer-decay 0.9 --weight-decay 0")
    assert min(_group_values(plan, "lr_scale")) == pytest.approx(0.9**5)
    assert set(_group_values(plan, "weight_decay")) == {0.0}


# all but the last three are flags whose values a checkpoint's optimizer would bring along
TRAINED_WITH = (
    "--lr 0.01", "--weight-decay 0.9", "--opt-betas 0.1 0.2", "--opt-eps 0.1", "--sched none", "--smoothing 0.4",
    "--mixup 0.5", "--alfa-lambda 3",
)  # fmt: skip


def test_a_run_that_goes_on_with_other_flags_ends_otherwise_and_says_so(
    images: Path, output: Path, tmp_path: Path
) -> None:
    ends = []
    for index, extra in enumerate(("", *TRAINED_WITH)):
        shutil.copytree(output, tmp_path / str(index))
        arguments = _arguments(images, tmp_path / str(index), f"--stop-epoch 2 {extra}")
        last = tmp_path / str(index) / "run" / "last.pth.tar"
        main([*arguments, "--resume", "auto" if index % 2 else str(last)])
        checkpoint = _checkpoint(last)
        assert checkpoint["epoch"] == 1
        ends.append(checkpoint["state_dict"]["conv1.0.weight"])
        saved = yaml.safe_load((last.parent / "args.yaml").read_text())
        wanted = vars(parse_args(arguments))
        assert {name: saved[name] for name in wanted if name != "resume"} == {
            name: value for name, value in wanted.items() if name != "resume"
        }
        groups = checkpoint["optimizer"]["param_groups"]
        assert [group["weight_decay"] for group in groups] == [0.0, wanted["weight_decay"]]
        assert [group.get("initial_lr", wanted["lr"]) for group in groups] == [wanted["lr"]] * 2
    for index, end in enumerate(ends):
        assert not any(torch.equal(end, other) for other in ends[:index]), ("", *TRAINED_WITH)[index]


REFUSED = {
    "--model test_vit": "--model test_resnet",
    "--num-classes 4": "--num-classes 3",
    "--in-chans 1": "",
    "--gp max": "no --gp",
    "--model-kwargs drop_rate=0.1": "no --model-kwargs",
    "--method alfa --alfa-blocks layer4": "--alfa-blocks layer3 @last",
    "--alfa-learnable": "no --alfa-learnable",
    "--alfa-bn aux": "--alfa-bn clean",
    "--moex-block layer1": "no --moex-block",
    "--opt sgd": "--opt adamw",
    "--opt-kwargs amsgrad=True": "no --opt-kwargs",
    "--momentum 0": "--momentum 0.9",
    "--weight-decay 0": "--weight-decay 0.05",
    "--layer-decay 0.5": "no --layer-decay",
    "--val-fraction 0.2": "no --val-fraction",
    "--split-seed 3": "--split-seed 0",
    "--eval-metric loss": "--eval-metric top1",
    "--val-split train": "--val-split validation",
    "--model-ema-force-cpu": "no --model-ema-force-cpu",
}


@pytest.mark.parametrize("extra", REFUSED)
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_what_cannot_be_changed_ends_the_command_in_one_line(
    images: Path, output: Path, resume: str, extra: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(output)
    path = output / "run" / "last.pth.tar"
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*_arguments(images, output, extra), "--resume", "auto" if resume == "auto" else str(path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert error.startswith(f"train_alfa.py: error: --resume {path}: ")
    assert error.count("\n") == 1
    assert REFUSED[extra] in error
    assert _contents(output) == before


def test_another_method_is_refused(images: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = _arguments(images, output, "--resume auto --method noise")
    at = plain.index("--alfa-blocks")
    del plain[at : at + 3]
    for arguments in (plain, plain[:-2]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "but the run was started with --method alfa" in capsys.readouterr().err


def test_names_of_the_same_blocks_are_the_same(images: Path, output: Path) -> None:
    for names in ("layer3 layer4", "@last layer3"):
        assert sorted(_plan(images, output, f"--alfa-blocks {names}").run.task.engine.blocks) == ["layer3", "layer4"]


KEPT = {
    "--seed 7": ("seed", 42),
    "--head-init-scale 0.1": ("head_init_scale", None),
    "--initial-checkpoint {file}": ("initial_checkpoint", ""),
    "--pretrained --pretrained-path {file}": ("pretrained_path", None),
}


def test_what_is_kept_is_said_and_recorded_to_be(
    images: Path, output: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "other.pt"  # not even read: the weights are the checkpoint's
    ends = []
    for extra in ("", *KEPT):
        shutil.copytree(output, tmp_path / "run", dirs_exist_ok=False)
        caplog.clear()
        main(_arguments(images, tmp_path / "run", f"--stop-epoch 2 --resume auto {extra.format(file=file)}"))
        ends.append(_checkpoint(tmp_path / "run" / "run" / "last.pth.tar"))
        if extra:
            name, value = KEPT[extra]
            assert yaml.safe_load((tmp_path / "run" / "run" / "args.yaml").read_text())[name] == value
            assert getattr(ends[-1]["args"], name) == value
            flag = "--" + name.replace("_", "-")
            assert any(flag in line and "has no effect, the run goes on with" in line for line in caplog.messages)
        shutil.rmtree(tmp_path / "run")
    for end in ends[1:]:
        assert all(torch.equal(tensor, end["state_dict"][name]) for name, tensor in ends[0]["state_dict"].items())
    assert not file.exists()


def test_a_seed_holds_where_there_are_no_random_states_to_go_on_with(images: Path, output: Path) -> None:
    _change_args(output, lambda checkpoint: checkpoint.pop("random_states"))
    assert _plan(images, output, "--seed 7").run.args.seed == 7


@pytest.mark.parametrize("extra", ["--eval-metric loss", "--val-split train", "--val-split="])
def test_what_decides_the_ranking_may_change_in_a_folder_of_its_own(images: Path, output: Path, extra: str) -> None:
    path = output / "run" / "last.pth.tar"
    main([*_arguments(images, output, f"--stop-epoch 2 --resume {path} {extra}"), "--experiment", "other"])
    history = _checkpoint(output / "other" / "last.pth.tar")["saver"]
    assert (history["checkpoint_files"], history["best_epoch"], history["pending"][0]) == ([], None, 1)


def test_an_average_that_starts_late_is_told(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = [word for word in _arguments(images, tmp_path, "--stop-epoch 1") if word != "--model-ema"]
    main(arguments)
    path = tmp_path / "run" / "last.pth.tar"
    main([*_arguments(images, tmp_path, f"--stop-epoch 2 --resume {path}"), "--experiment", "other"])
    assert "has no averaged weights; the average starts from the plain ones" in caplog.text
    assert (tmp_path / "other" / "model.safetensors").exists()


def test_a_checkpoint_of_timm_is_compared_too(images: Path, output: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It holds the flags of timm's script after set-up, and none of this package's."""

    def make_foreign(checkpoint: dict[str, Any]) -> None:
        ours = ("alfa_", "noise_", "moex_", "advprop_", "pgd_", "fast_advprop_", "eval_pgd", "method")
        theirs = {name: value for name, value in vars(checkpoint["args"]).items() if not name.startswith(ours)}
        checkpoint["args"] = Namespace(**theirs, flag_of_theirs=True)
        del checkpoint["task_state"], checkpoint["random_states"], checkpoint["saver"]

    _change_args(output, make_foreign)
    path = output / "run" / "last.pth.tar"
    plain = _arguments(images, output, f"--stop-epoch 2 --resume {path} --weight-decay 0.3 --experiment other")
    with pytest.raises(SystemExit) as caught:
        main(plain)
    assert caught.value.code == 2  # it was not trained with ALFA
    at = plain.index("--alfa-blocks")
    del plain[at : at + 3]
    with caplog.at_level(logging.INFO):
        main(plain)
    assert "--weight-decay 0.3 (it was --weight-decay 0.05)" in caplog.text
    assert _checkpoint(output / "other" / "last.pth.tar")["optimizer"]["param_groups"][1]["weight_decay"] == 0.3


def test_a_checkpoint_without_flags_is_said_not_to_be_compared(
    images: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _change_args(output, lambda checkpoint: checkpoint.pop("args"))
    plan = _plan(images, output, "--lr 0.5")
    assert "does not say with which flags it was trained" in caplog.text
    assert _group_values(plan, "initial_lr") == [0.5, 0.5]


@pytest.mark.parametrize("seed", [-1, "x", 2**40, torch.zeros(3)])
def test_damaged_flags_are_refused(images: Path, output: Path, seed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _change_args(output, lambda checkpoint: setattr(checkpoint["args"], "seed", seed))
    with pytest.raises(SystemExit) as caught:
        main(_arguments(images, output, "--resume auto"))
    assert caught.value.code == 2
    assert "damaged ('args'" in capsys.readouterr().err


def test_fates_by_value() -> None:
    args = parse_args([])
    rules = {name: rule for name, rule in FATES.items() if not isinstance(rule, Fate)}
    assert rules["momentum"](0.9, 0.5, args) is Fate.EFFECTIVE
    assert rules["opt"]("AdamW", "adamw", args) is Fate.EFFECTIVE
    assert rules["layer_decay"](0.7, 0.5, args) is Fate.EFFECTIVE
    args.no_resume_opt = True
    assert {rules[name]("a", None, args) for name in ("opt", "opt_kwargs", "momentum", "layer_decay")} == {
        Fate.EFFECTIVE
    }
