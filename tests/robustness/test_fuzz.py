"""Whatever the command line and the configuration file say: a step is trained, or one line says what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import set_fast_norm
from training_images import make_image_folder

from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import build_parser

# what a flag left out would be too expensive to try, or says where the test's own files are
BASE = (
    "--model resnet20s --img-size 16 --num-classes 3 -b 4 --epochs 1 --stop-epoch 1 --warmup-epochs 0 --workers 0 "
    "--lr 0.01 --experiment run"
)
LEFT_OUT = {
    "help": "prints and exits",
    "config": "the test's own file",
    "output": "the test's own folder",
    "data": "the test's own images",
    "pretrained": "asks the network for weights",
    "dataset_download": "asks the network for images",
    "torchcompile": "compiles for minutes",
}

# Values that mean something, for flags that take more than a number.
TEXTS: dict[str, tuple[str, ...]] = {
    "model": ("resnet20s", "test_resnet", "test_vit", "resnet18_cifar", "local-dir:nowhere"),
    "dataset": ("digits", "torch/cifar10", "hfds/x", "wds/x", "imagenet"),
    "train_split": ("train", "validation"),
    "val_split": ("validation", "train", ""),
    "test_split": ("validation", ""),
    "opt": ("sgd", "adamw", "lamb", "lookahead_adam", "rmsprop", "lbfgs", "adahessian", "muon"),
    "sched": ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none"),
    "aa": ("rand-m9-mstd0.5-inc1", "original", "augmix-m5", "3a", "v0r-x", "rand-n-m"),
    "interpolation": ("bilinear", "bicubic", "random"),
    "train_interpolation": ("bilinear", "random"),
    "gp": ("avg", "max", "catavgmax", "fast"),
    "input_img_mode": ("RGB", "L", "1"),
    "device": ("cpu", "cuda", "meta", "cpu:7"),
    "device_modules": ("math", "no.such"),
    "clip_mode": ("norm", "value", "agc"),
    "eval_metric": ("top1", "top5", "loss"),
    "dist_bn": ("", "reduce", "broadcast"),
    "amp_dtype": ("bfloat16", "float16"),
    "model_dtype": ("float32", "bfloat16"),
    "train_crop_mode": ("rrc", "rkrc", "rkrr"),
    "remode": ("const", "rand", "pixel"),
    "mixup_mode": ("batch", "pair", "elem"),
    "worker_seeding": ("all", "part"),
    "lr_base_scale": ("linear", "sqrt", ""),
    "resume": ("auto", "nowhere.pth.tar"),
    "alfa_blocks": ("layer3", "@last", "@stages", "layer*.0", "layer2", "conv1", "bn1", "nowhere", "fc", "@paper9"),
    "noise_blocks": ("layer3", "@last", "@stages"),
    "moex_block": ("layer1", "maxpool", "fc"),
    "model_kwargs": ("drop_rate=0.1", "nothing=1", "norm_layer=x", "act_layer=relu"),
    "opt_kwargs": ("foreach=False", "nothing=1", "momentum=0.5"),
}
WHOLE = (0, 1, 2, 3, 16, -1)
REAL = (0.0, 0.1, 0.5, 1.0, 2.0, -1.0, 1e30)
WRONG = ("x", "", "nan", "inf", "-inf", "1e400", "0/0", "--", "é", "2.5", "none", "1" * 30)


def actions() -> list[argparse.Action]:
    """Every flag of the parser, whichever it gets in time."""
    return [action for action in build_parser()._actions if action.dest not in LEFT_OUT]


def _values(action: argparse.Action) -> st.SearchStrategy[Any]:
    """One value of a flag: mostly one that could be right."""
    if action.choices:
        likely: tuple[Any, ...] = tuple(action.choices)
    elif action.dest in TEXTS:
        likely = TEXTS[action.dest]
    elif action.type is int:
        likely = WHOLE
    elif action.type in (None, str):
        likely = ("", "x")
    else:
        likely = REAL
    return st.sampled_from([*likely] * 4 + [*WRONG])


@st.composite
def flags(draw: st.DrawFn) -> tuple[list[str], dict[str, Any]]:
    """Words of a command line, and what a configuration file holds."""
    words: list[str] = []
    config: dict[str, Any] = {}
    for action in draw(st.lists(st.sampled_from(actions()), min_size=1, max_size=6)):
        several = action.nargs in ("+", "*") or isinstance(action.nargs, int)
        if action.nargs == 0:
            value: Any = True
        elif several:
            value = draw(st.lists(_values(action), max_size=3))
        else:
            value = draw(_values(action))
        if draw(st.integers(0, 3)) == 0:  # one in four through the file, where a type can be wrong too
            config[action.dest] = draw(st.sampled_from([value, value, value, value, None, [value], {"a": value}, "x"]))
        else:
            words.append(action.option_strings[-1])
            words += [] if action.nargs == 0 else map(str, value) if several else [str(value)]
    return words, config


def run(images: Path, words: list[str], config: dict[str, Any]) -> int:
    """The command's exit code.

    Raises:
        AssertionError: It failed without the one line, or wrote something before it did.
    """
    errors = io.StringIO()
    code: Any = 0
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "output")
        command = [*BASE.split(), "--data-dir", str(images), "--output", str(output), *words]
        if config:
            Path(scratch, "config.yaml").write_text(yaml.safe_dump(config))
            command += ["--config", str(Path(scratch, "config.yaml"))]
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                main(command)
        except SystemExit as error:
            code = error.code
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("train_alfa.py: error: ")]
        assert (code == 0 and not lines) or (code in (1, 2) and len(lines) == 1), (code, errors.getvalue())
        if code == 1:  # numbers that no training survives
            assert "not finite" in lines[0], lines
        if code == 2:
            assert not output.exists()
    return int(code or 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=3, validation=2)


@pytest.fixture(autouse=True)
def _global_settings() -> Iterator[None]:
    yield
    set_fast_norm(False)  # --fast-norm


FEW, MANY = 25, 600
WITHOUT_CLOCK = settings(
    max_examples=FEW, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], print_blob=False
)


@pytest.mark.filterwarnings("default")  # a warning, of whatever library, is no traceback
@WITHOUT_CLOCK
@given(case=flags())
def test_any_flags_train_or_end_in_one_line(images: Path, case: tuple[list[str], dict[str, Any]]) -> None:
    run(images, *case)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@settings(WITHOUT_CLOCK, max_examples=MANY)
@given(case=flags())
def test_very_many_flags_train_or_end_in_one_line(images: Path, case: tuple[list[str], dict[str, Any]]) -> None:
    run(images, *case)
