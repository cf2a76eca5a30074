"""The paper's recipes: found by name, true to section 4.1, and each of them trains."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from timm_alfa.errors import UsageError
from timm_alfa.recipes import find_recipe, recipe_names
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import parse_args

BASES = ("cifar10", "cifar100", "imagenet")
FINETUNE = "finetune-small-data"  # by this project's own runs
PAPER = [name for name in recipe_names() if name != FINETUNE]
ALPHAS = {  # in 1/255; captions of Tables 2, 3 and 5
    "cifar10-resnet20s": 0.5, "cifar10-resnet18": 1, "cifar10-resnet101": 1, "cifar10-resnet56s": 1.5,
    "cifar10-resnet50": 1.5, "cifar100-resnet20s": 0.5, "cifar100-resnet56s": 0.5, "imagenet-resnet18": 0.5,
    "imagenet-resnet50": 0.5, "imagenet-resnet101": 0.5, "imagenet-resnet152": 0.5, "imagenet-efficientnet_b0": 0.5,
}  # fmt: skip
QUICK = ("cifar10-resnet20s", "cifar10-resnet20s-alfa", "cifar10-resnet56s-lalfa", "cifar10-resnet56s-noise",
         "cifar10-resnet56s-moex", "cifar100-resnet20s-alfa")  # fmt: skip


def parse(name: str):
    return parse_args(["--config", name])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of 32x32 for each of two classes to train on, two to test on."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 1), ("validation", 1)):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize("name", PAPER)
def test_the_training_is_that_of_section_4_1(name: str):
    args = parse(name)
    dataset, _, rest = name.partition("-")
    assert (args.opt, args.momentum, args.lr, args.smoothing, args.decay_rate) == ("momentum", 0.9, 0.1, 0, 0.1)
    assert (args.val_fraction, args.opt_kwargs) == (0.1, {"filter_bias_and_bn": False})
    if dataset == "imagenet":
        assert (args.epochs, args.sched, args.decay_epochs, args.weight_decay) == (90, "step", 30, 1e-4)
        assert args.batch_size == (256 if "efficientnet" in name else 512)
        assert (args.num_classes, args.test_split) == (1000, "validation")
    else:
        assert (args.epochs, args.sched, args.decay_milestones) == (200, "multistep", [50, 150])
        assert (args.weight_decay, args.batch_size, args.crop_padding) == (5e-4, 128, 4)
        assert (args.sched_on_updates, args.warmup_updates, args.test_split) == (True, 200, "test")
        assert args.num_classes == {"cifar10": 10, "cifar100": 100}[dataset]
    model, _, method = rest.partition("-")
    if rest:
        assert args.model.removesuffix("_cifar") == model
        assert {"": "standard", "lalfa": "alfa"}.get(method, method) == args.method
    if method == "alfa":
        assert args.alfa_alpha == pytest.approx(ALPHAS[name.removesuffix("-alfa")] / 255)
        assert args.alfa_steps == (1 if dataset == "imagenet" else 5)
        assert (args.alfa_blocks, args.alfa_eps, args.alfa_learnable) == (["@last"], None, False)
    if method == "lalfa":
        assert (args.alfa_blocks, args.alfa_learnable, args.alfa_gamma) == (["@paper9"], True, 1)
    if method == "noise":
        assert (args.noise_blocks, args.noise_sigma) == (["@last"], pytest.approx(1 / 255))


def test_every_model_of_the_paper_has_a_plain_recipe_and_one_with_alfa():
    names = recipe_names()
    assert {name for name in names if name.endswith("-alfa")} == {f"{name}-alfa" for name in ALPHAS}
    assert set(ALPHAS) <= set(names)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PAPER if name not in BASES]
)
def test_each_recipe_trains_and_tests(name: str, images: Path, tmp_path: Path):
    small = "--batch-size 4 --epochs 1 --workers 0 --val-fraction 0.2"
    if "imagenet" in name:
        small += " --img-size 64"
    where = ["--data-dir", str(images), "--output", str(tmp_path), "--experiment", "run"]
    main(["--config", name, *small.split(), *where])
    assert (tmp_path / "run" / "test.json").exists()


def test_the_recipe_for_little_data_starts_from_weights_and_perturbs_by_a_share(images: Path, tmp_path: Path):
    args = parse(FINETUNE)
    assert (args.pretrained, args.alfa_blocks, args.alfa_alpha, args.alfa_reduction) == (
        True,
        ["blocks.2"],
        "2%",
        "mean",
    )
    assert (args.opt, args.lr, args.epochs, args.batch_size, args.img_size) == ("adamw", 1e-3, 12, 32, 112)
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model(args.model).state_dict(), weights)
    main(["--config", FINETUNE, "--pretrained-path", str(weights), "--num-classes", "2", "--data-dir", str(images),
          "--batch-size", "4", "--epochs", "1", "--img-size", "32", "--workers", "0", "--output", str(tmp_path),
          "--experiment", "run"])  # fmt: skip
    assert "delta_ratio_blocks.2" in (tmp_path / "run" / "summary.csv").read_text()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_file_goes_before_a_recipe_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert parse("cifar10").epochs == 200
    (tmp_path / "cifar100").write_text("epochs: 7")
    assert parse("cifar100").epochs == 7


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="nor a recipe of that name; nearest recipes: cifar10-resnet18,"):
        find_recipe("cifar10-resnet-18")
    with pytest.raises(UsageError, match=r"nor a recipe of that name; recipes: cifar10, cifar10-resnet101"):
        find_recipe("###")


def test_a_base_may_be_a_file_beside_or_a_recipe(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("base: cifar100\nepochs: 5\nseed: 3")
    (tmp_path / "other.yaml").write_text("base: mine.yaml\nseed: 4\nbatch-size: 32")
    args = parse(str(tmp_path / "other.yaml"))
    assert (args.epochs, args.seed, args.batch_size, args.num_classes, args.crop_padding) == (5, 4, 32, 100, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: mine.yaml", "base: mine.yaml is based on itself"),
        ("base: [cifar10]", r"base: \['cifar10'\] is not text"),
        (
            "base: cifar11",
            "mine.yaml: base: cifar11: no such file, nor a recipe of that name; nearest recipes: cifar10",
        ),
    ],
)
def test_a_base_that_cannot_be(text: str, message: str, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        parse(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("dataset", "name", "label"),
    [("cifar10", "cifar-10-batches-py", "labels"), ("cifar100", "cifar-100-python", "fine_labels")],
)
def test_torchvisions_datasets_train_too(
    dataset: str, name: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[dataset]
    folder = tmp_path / name
    folder.mkdir()
    random = np.random.default_rng(0)
    for file, _ in [*kind.train_list, *kind.test_list]:
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": pixels, label: [index % 10 for index in range(20)]}))
    names = [str(index) for index in range(100 if kind is CIFAR100 else 10)]
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # these are not the real files
    main(["--config", f"{dataset}-resnet20s", "--dataset", f"torch/{dataset}", "--data-dir", str(tmp_path), "-b", "8",
          "--val-fraction", "0.5",
          "--epochs", "1", "--workers", "0", "--output", str(tmp_path / "out"), "--experiment", "run"])  # fmt: skip
    assert json.loads((tmp_path / "out" / "run" / "test.json").read_text())["split"] == "test"
