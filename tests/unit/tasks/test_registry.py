"""The --alfa-* flags: values, combinations, defaults, and one-line errors that name the flag."""

from __future__ import annotations

import argparse

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch import nn
from toys import Repeated

from timm_alfa import AlfaTask, UsageError
from timm_alfa.perturbation import Pgd
from timm_alfa.tasks import alfa
from timm_alfa.tasks.flags import number
from timm_alfa.tasks.registry import add_arguments, check_arguments, create_task, describe_blocks, is_enabled


def _parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def _checked(*argv: str) -> argparse.Namespace:
    args = _parse(*argv)
    check_arguments(args)
    return args


def _task(model: nn.Module, *argv: str, size: int | None = None) -> ClassificationTask:
    return create_task(
        _checked(*argv),
        model,
        nn.CrossEntropyLoss(),
        device=torch.device("cpu"),
        dtype=None,
        verbose=False,
        input_size=None if size is None else (3, size, size),
    )


@pytest.mark.parametrize(
    ("text", "value"), [("0.002", 0.002), ("0.5/255", 0.5 / 255), ("1/255", 1 / 255), ("2e-3", 0.002), ("-1", -1.0)]
)
def test_numbers_and_fractions(text: str, value: float) -> None:
    assert number(text) == value
    assert _parse("--alfa-alpha", text).alfa_alpha == value


@pytest.mark.parametrize("text", ["", "x", "1/0", "1/2/3", "0,5", "/255"])
def test_other_texts_are_refused_by_the_parser(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse("--alfa-alpha", text)
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--alfa-alpha" in message
    assert f"expected a number or a fraction such as 0.5/255, found {text!r}" in message


def test_off_by_default() -> None:
    args = _checked()
    assert args.method == "standard"
    assert not is_enabled(args)
    assert not any(getattr(args, flag.name) for flag in alfa.FLAGS)
    task = _task(timm.create_model("test_resnet"))
    assert type(task) is ClassificationTask


def test_blocks_switch_it_on_with_all_defaults() -> None:
    args = _checked("--alfa-blocks", "layer3", "layer4")
    assert is_enabled(args)
    assert args.alfa_blocks == ["layer3", "layer4"]
    others = alfa.FLAGS[1:]
    assert {flag.name: getattr(args, flag.name) for flag in others} == {flag.name: flag.default for flag in others}
    assert args.alfa_alpha == 0.5 / 255


def test_the_method_alone_takes_the_last_block() -> None:
    assert _checked("--method", "alfa").alfa_blocks == ["@last"]


def test_what_was_given_is_kept() -> None:
    args = _checked("--alfa-blocks", "@last", "--alfa-steps", "5", "--alfa-norm", "l2", "--alfa-eps", "2/255")
    assert (args.alfa_steps, args.alfa_norm, args.alfa_eps) == (5, "l2", 2 / 255)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--alfa-alpha", "0"], r"--alfa-alpha 0.0: expected a finite step size above 0, such as 0.5/255"),
        (["--alfa-alpha=-0.1"], r"--alfa-alpha -0.1: expected"),
        (["--alfa-alpha", "nan"], r"--alfa-alpha nan: expected"),
        (["--alfa-alpha", "inf"], r"--alfa-alpha inf: expected"),
        (["--alfa-steps", "0"], r"--alfa-steps 0: expected a whole number of at least 1"),
        (["--alfa-steps=-2"], r"--alfa-steps -2: expected a whole number of at least 1"),
        (["--alfa-eps=-1"], r"--alfa-eps -1.0: expected a finite bound of at least 0"),
        (["--alfa-eps", "nan"], r"--alfa-eps nan: expected"),
        (["--alfa-lambda=-1"], r"--alfa-lambda -1.0: expected a finite weight of at least 0"),
        (["--alfa-lambda", "nan"], r"--alfa-lambda nan: expected"),
        (["--alfa-init", "uniform"], r"--alfa-init uniform: starts within a bound; give one with --alfa-eps"),
    ],
)
def test_values_out_of_range(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        _checked("--alfa-blocks", "layer4", *argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--alfa-steps", "3"], r"--alfa-steps 3: has no effect without --alfa-blocks; name blocks, such as"),
        (["--alfa-alpha", "0.1"], r"--alfa-alpha 0.1: has no effect without --alfa-blocks"),
        (["--alfa-lambda", "0"], r"--alfa-lambda 0.0: has no effect without --alfa-blocks"),
        (["--alfa-bn", "shared"], r"--alfa-bn shared: has no effect without --alfa-blocks"),
        (["--method", "standard", "--alfa-blocks", "a", "b"], r"--alfa-blocks a b: has no effect with --method stand"),
    ],
)
def test_flags_without_effect(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _checked(*argv)


@pytest.mark.parametrize("flag", ["--alfa-norm", "--alfa-init", "--alfa-reduction", "--alfa-grad", "--alfa-bn"])
def test_unknown_choices(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parse("--alfa-blocks", "x", flag, "other")
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert flag in message
    assert "'other'" in message


def test_flags_reach_the_task() -> None:
    task = _task(
        timm.create_model("test_resnet"),
        "--alfa-blocks",
        "@last",
        "--alfa-alpha",
        "1/255",
        "--alfa-steps",
        "3",
        "--alfa-eps",
        "2/255",
        "--alfa-norm",
        "l2",
        "--alfa-init",
        "uniform",
        "--alfa-grad",
        "tail",
        "--alfa-bn",
        "shared",
        "--alfa-lambda",
        "0.5",
        "--alfa-reduction",
        "mean",
    )
    assert isinstance(task, AlfaTask)
    engine, loss = task.engine, task.objective
    assert engine.blocks == ["layer4"]
    assert engine.perturbation == Pgd(1 / 255, steps=3, eps=2 / 255, norm="l2", init="uniform")
    assert (engine.grad, engine.bn) == ("tail", "shared")
    assert (loss.lam, loss.reduction) == (0.5, "mean")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("layer9", r"--alfa-blocks layer9: no block is called 'layer9'; did you mean"),
        ("stages.*", r"--alfa-blocks stages.\*: 'stages.\*' matches no block"),
        ("listed", r"--alfa-blocks listed: 'listed' is a ModuleList, which has no forward"),
        ("twice", r"--alfa-blocks twice: block 'twice' runs several times per forward"),
        ("never", r"--alfa-blocks never: block 'never' did not run"),
    ],
)
def test_blocks_that_will_not_do(block: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        _task(Repeated(), "--alfa-blocks", block, size=6)
    assert "\n" not in str(caught.value)


def test_table_of_blocks() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    text = describe_blocks(_parse("--alfa-blocks", "layer4", "layer2.0.bn2"), model, (3, 32, 32), torch.device("cpu"))
    marked = [line.split()[1] for line in text.splitlines() if line.startswith("> ")]
    assert marked == ["layer2.0.bn2", "layer4"]
    assert "* a stage of the backbone" in text.splitlines()[-1]
    assert not any(
        line.startswith("> ")
        for line in describe_blocks(_parse(), model, (3, 32, 32), torch.device("cpu")).splitlines()
    )
    with pytest.raises(UsageError, match="--alfa-blocks layr4: no block is called 'layr4'"):
        describe_blocks(_parse("--alfa-blocks", "layr4"), model, (3, 32, 32), torch.device("cpu"))


def test_checked_arguments_can_be_checked_again_as_a_saved_configuration_is() -> None:
    args = _checked("--alfa-blocks", "layer4")
    filled = argparse.Namespace(**vars(args))
    check_arguments(filled)
    assert filled == args


def test_previews_can_be_left_out() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser, previews=False)
    args = vars(parser.parse_args([]))
    assert "alfa_blocks" in args
    assert not {"alfa_list_blocks", "alfa_dry_run"} & set(args)
