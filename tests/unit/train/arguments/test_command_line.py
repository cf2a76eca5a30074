from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from timm_alfa.errors import UsageError
from timm_alfa.train.arguments.command_line import build_parser, parse_args


def _load_oracle(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("timm_train_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif("TIMM_TRAIN_PY" not in os.environ, reason="TIMM_TRAIN_PY names no copy of timm's train.py")
def test_every_flag_of_timm_is_there_with_its_default_type_and_choices():
    theirs = _load_oracle(os.environ["TIMM_TRAIN_PY"])
    ours = {action.dest: action for action in build_parser()._actions}
    for action in [*theirs.parser._actions, *theirs.config_parser._actions]:
        if action.dest == "help":
            continue
        mine = ours[action.dest]
        assert set(mine.option_strings) == set(action.option_strings)
        for attribute in ("default", "const", "nargs", "required"):
            assert getattr(mine, attribute) == getattr(action, attribute), (action.dest, attribute)
        assert (mine.type or str) is (action.type or str), action.dest
        assert tuple(mine.choices or ()) == tuple(action.choices or ()), action.dest


@pytest.mark.skipif("TIMM_TRAIN_PY" not in os.environ, reason="TIMM_TRAIN_PY names no copy of timm's train.py")
def test_a_configuration_that_timm_saved_is_read_without_complaint(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    saved = vars(_load_oracle(os.environ["TIMM_TRAIN_PY"]).parser.parse_args(["--lr", "0.3", "--model-ema"]))
    args = parse_args(["--config", _write(tmp_path, yaml.safe_dump(saved))])
    assert {name: getattr(args, name) for name in saved} == saved
    assert not caplog.records


def test_each_flag_that_is_not_refused_has_a_help_sentence():
    for action in build_parser()._actions:
        assert action.help, action.dest
    assert "--epochs N" in build_parser().format_help()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--model-emaa"], "nearest: --model-ema"),
        (["--epochs", "x"], "'x'"),
        (["--epochs", "0"], "--epochs 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--opt-betas", "0.9", "inf"], "--opt-betas inf"),
        (["--seed", "4294967296"], "--seed 4294967296"),
        (["--hflip", "1.5"], "--hflip 1.5"),
        (["--amp-dtype", "float8"], "float16, bfloat16"),
        (["--eval-metric", "map"], "top1, top5, loss"),
        (["--amp", "--model-dtype", "bfloat16"], "--model-dtype bfloat16"),
        (["--mixup", "0.2", "--batch-size", "7"], "--batch-size 7"),
        (["--decay-milestones", "20", "10"], "--decay-milestones"),
        (["--resume", "auto"], "--experiment"),
        (["--wandb-resume-id", "a"], "--resume"),
        (["--save-epochs", "0"], "--save-epochs"),
        (["--train-batch-sizes", "4"], "--train-img-sizes"),
        (["--train-img-sizes", "8", "16", "--train-batch-sizes", "4"], "--train-batch-sizes [4]"),
        (["--model-kwargs", "depth"], "KEY=VALUE"),
        (["--device", "gpu"], "--device gpu"),
        (["--naflex-loader"], "--naflex-loader: not supported"),
        (["--torchscript"], "--torchscript"),
        (["--jsd-loss"], "--jsd-loss"),
        (["--aug-splits", "3"], "--aug-splits 3"),
        (["--split-bn"], "patches/"),
        (["--aug-splits", "2", "--kd-model-name", "resnet50"], "--aug-splits 2"),
        (["--log-wandb"], "wandb"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(argv: list[str], expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no optional package
    with pytest.raises(UsageError) as caught:
        parse_args(argv)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_explicit_cuda_device_must_exist_and_the_default_need_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_args([]).device == "cuda"
    for argv in (["--device", "cuda"], ["--device=cuda"], ["--device", "cuda:1"]):
        with pytest.raises(UsageError, match="no CUDA device"):
            parse_args(argv)


def _write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_config_replaces_defaults_and_the_command_line_goes_before_it(tmp_path: Path):
    lines = ["lr: 3e-4", "weight-decay: 1", "model_ema: true", "epochs: 7", "model_kwargs: {depth: 3}",
             "scale: [0.5, 1]", "drop_path: null"]  # fmt: skip
    args = parse_args(["--config", _write(tmp_path, "\n".join(lines)), "--epochs", "9"])
    assert args.lr == 3e-4
    assert args.weight_decay == 1.0
    assert args.model_ema is True
    assert args.epochs == 9
    assert args.model_kwargs == {"depth": 3}
    assert args.scale == [0.5, 1.0]
    assert args.drop_path is None
    assert not hasattr(args, "config")


def test_parsed_flags_come_back_from_a_saved_configuration(tmp_path: Path):
    first = parse_args(
        ["--opt-kwargs", "foreach=True", "--lr", "1e-3", "--torchcompile", "--input-size", "3", "8", "8"]
    )
    path = _write(tmp_path, yaml.safe_dump(vars(first)))
    assert parse_args(["-c", path]) == first


def test_an_unknown_key_in_a_config_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        args = parse_args(["--config", _write(tmp_path, "epoch: 3\nworkers: 2")])
    assert args.workers == 2
    assert "'epoch' ignored (nearest: epochs)" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: many", "epochs: 'many' is not a whole number"),
        ("epochs: 2.5", "a whole number"),
        ("epochs: true", "a whole number"),
        ("lr: fast", "a number"),
        ("amp: 1", "true or false"),
        ("amp: 'no'", "true or false"),
        ("model: 18", "quotes"),
        ("hflip: null", "a number"),
        ("scale: 0.5", "a list"),
        ("input_size: [3, 8]", "a list of 3 values"),
        ("model_kwargs: [1]", "a mapping"),
        ("train_size_schedule: random", "one of constant, progressive"),
        ("naflex_loader: true", "--naflex-loader: not supported"),
        ("- lr\n- 3", "found a list"),
        ("lr: [", "not plain YAML"),
        ("lr: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("lr: \x00", "not plain YAML"),
    ],
)
def test_a_bad_config_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, expected: str):
    with pytest.raises(UsageError) as caught:
        parse_args(["--config", _write(tmp_path, text)])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_missing_or_no_text_is_a_mistake(tmp_path: Path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    for name in ("missing.yaml", "binary", "."):
        with pytest.raises(UsageError, match="--config"):
            parse_args(["--config", str(tmp_path / name)])


def test_an_empty_config_changes_nothing(tmp_path: Path):
    assert parse_args(["--config", _write(tmp_path, "")]) == parse_args([])
