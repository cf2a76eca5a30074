from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision.transforms import ColorJitter, Compose, RandomCrop
from training_images import make_image_folder

from timm_alfa.errors import UsageError
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.data.check import check_data_arguments
from timm_alfa.train.data.datasets import create_datasets
from timm_alfa.train.data.digits import Digits
from timm_alfa.train.data.images import NamedImageDataset
from timm_alfa.train.data.loaders import create_loaders
from timm_alfa.train.data.split import class_indices, split_indices

CONFIG = {"input_size": (3, 40, 36), "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bilinear",
          "crop_pct": 1.0}  # fmt: skip
BASE = "--model test_resnet --img-size 32 --num-classes 3 -b 4 --workers 0 --lr 0.01 --warmup-epochs 0"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_image_folder(tmp_path_factory.mktemp("images"))
    for file in (root / "validation").rglob("*.png"):
        other = root / "test" / file.relative_to(root / "validation")
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).rotate(90, expand=True).save(other)
    return root


def parse(*flags):
    args = parse_args(["--num-classes", "3", "-b", "4", "--workers", "0", *map(str, flags)])
    args.prefetcher, args.distributed = not args.no_prefetcher, False
    return args


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.floats(0, 0.9), st.floats(0.1, 1), st.floats(0.1, 1), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_parts_are_disjoint_stratified_and_nested(classes, val_fraction, one_fraction, other_fraction, seed):
    classes = np.array(classes)
    smaller, larger = sorted((one_fraction, other_fraction))
    train, held_out = split_indices(classes, val_fraction, larger, seed)
    everything, _ = split_indices(classes, val_fraction, 1.0, seed)
    assert sorted([*everything, *held_out]) == list(range(len(classes)))
    for name in set(classes.tolist()):
        count = (classes == name).sum()
        assert (classes[held_out] == name).sum() == round(val_fraction * count)
        assert (classes[train] == name).sum() == round(larger * (count - round(val_fraction * count)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert set(split_indices(classes, val_fraction, smaller, seed)[0]) <= set(train)


def test_the_draw_is_fixed_for_all_time():
    train, held_out = split_indices(np.arange(20) % 2, 0.2, 0.5, 0)
    assert (train.tolist(), held_out.tolist()) == ([2, 3, 5, 8, 12, 17, 18, 19], [4, 7, 11, 16])
    assert split_indices(np.arange(20) % 2, 0.2, 0.5, 1)[1].tolist() != [4, 7, 11, 16]


def test_classes_as_datasets_list_them(images):
    expected = [0] * 10 + [1] * 10 + [2] * 10
    assert class_indices(create_dataset("", str(images), "train")).tolist() == expected
    assert class_indices(create_dataset("torch/image_folder", str(images), "train")).tolist() == expected
    digits = Digits("train")
    assert class_indices(digits).tolist() == digits.targets
    column = SimpleNamespace(label_key="label", dataset={"label": [2, 0]})
    several = SimpleNamespace(label_key=["label", "fine"], dataset={"label": [2, 0]})

    class Read(list):
        reader = column

    assert class_indices(Read("ab")).tolist() == [2, 0]
    Read.reader = several
    assert class_indices(Read("ab")) is None
    assert class_indices([1, 2]) is None


def test_a_dataset_without_labels_is_refused(images, monkeypatch):
    monkeypatch.setattr("timm_alfa.train.data.split.class_indices", lambda dataset: None)
    with pytest.raises(UsageError, match="--train-fraction: --dataset  does not list its labels"):
        create_datasets(parse("--data-dir", images, "--train-fraction", 0.5), CONFIG)


def test_seeds_of_runs_do_not_move_the_images(images):
    def names(*flags):
        args = parse("--data-dir", images, "--val-fraction", 0.2, "--train-fraction", 0.5, *flags)
        np.random.seed(args.seed)
        train, held_out = create_datasets(args, CONFIG)
        return [[part.dataset.filename(index) for index in part.indices] for part in (train, held_out)]

    first = names("--seed", 1)
    assert first == names("--seed", 2)
    assert first != names("--seed", 1, "--split-seed", 1)
    assert [len(part) for part in first] == [12, 6]


def test_parts_have_transforms_of_their_own_and_give_their_images(images):
    args = parse("--data-dir", images, "--val-fraction", 0.2)
    train, held_out = create_datasets(args, CONFIG)
    whole, _ = create_datasets(parse("--data-dir", images), CONFIG)
    for part in (train, held_out):
        for (image, target), index in zip(part, part.indices, strict=True):
            assert np.array_equal(image, whole[index][0])
            assert target == index // 10
    _, loader_eval, _ = create_loaders(
        args, CONFIG, train, held_out, device=torch.device("cpu"), img_dtype=None, collate_fn=None
    )
    assert isinstance(train.transform.transforms[0], RandomResizedCropAndInterpolation)
    assert not isinstance(held_out.transform.transforms[0], RandomResizedCropAndInterpolation)
    assert torch.cat([target for _, target in loader_eval]).tolist() == [0, 0, 1, 1, 2, 2]


def test_padded_crops_are_those_of_torchvision(images):
    args = parse("--data-dir", images, "--crop-padding", 3, "--color-jitter", 0, "--hflip", 0)
    train, _ = create_datasets(args, CONFIG)
    loader, *_ = create_loaders(args, CONFIG, train, None, device=torch.device("cpu"), img_dtype=None, collate_fn=None)
    expected, _ = create_datasets(parse("--data-dir", images), CONFIG)
    theirs = create_loader(expected, (3, 40, 36), 4, is_training=True, device=torch.device("cpu"),
                           mean=CONFIG["mean"], std=CONFIG["std"], num_workers=0)  # fmt: skip
    expected.transform = Compose([RandomCrop((40, 36), padding=3), ColorJitter(0, 0, 0), MaybePILToTensor()])
    torch.manual_seed(3)
    ours = list(loader)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, list(theirs), rtol=0, atol=0)


def test_the_chosen_checkpoint_is_tested_once(images, tmp_path, capsys, caplog):
    arguments = [*BASE.split(), "--data-dir", str(images), "--output", str(tmp_path), "--experiment", "run", "--epochs",
                 "3", "--val-fraction", "0.2", "--test-split", "test", "--resume", "auto", "--model-ema",
                 "--model-ema-decay", "0.5"]  # fmt: skip
    caplog.set_level("INFO")
    main([*arguments, "--stop-epoch", "1"])
    folder = tmp_path / "run"
    assert not (folder / "test.json").exists()
    assert "test" not in json.loads(capsys.readouterr().out.partition("--result\n")[2])[-1]
    assert "Not tested" in caplog.text

    main(arguments)
    tested = json.loads((folder / "test.json").read_text())
    last = json.loads(capsys.readouterr().out.partition("--result\n")[2])[-1]
    assert last["test"] == tested
    assert last["epoch"] == tested["epoch"]
    assert "*** Test split 'test': top1" in caplog.text

    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(folder / "model.safetensors")).eval()
    test_set = NamedImageDataset(create_dataset("", str(images), "test"))
    loader = create_loader(test_set, (3, 32, 32), 4, num_workers=0,
                           device=torch.device("cpu"), crop_pct=model.pretrained_cfg["crop_pct"],
                           interpolation=model.pretrained_cfg["interpolation"], mean=model.pretrained_cfg["mean"],
                           std=model.pretrained_cfg["std"])  # fmt: skip
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(batch), target, reduction="sum") for batch, target in loader]
    assert tested["loss"] == pytest.approx(float(sum(losses)) / 6, rel=1e-5)
    assert (tested["split"], tested["checkpoint"]) == ("test", "model_best.pth.tar")

    (folder / "test.json").unlink()  # as if killed between the last checkpoint and the test
    main(arguments)
    assert json.loads((folder / "test.json").read_text()) == tested

    main([*arguments, "--test-split", "validation"])  # of a run that is complete
    other = json.loads((folder / "test.json").read_text())
    assert (other["split"], other["epoch"]) == ("validation", tested["epoch"])
    assert other["loss"] != tested["loss"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--val-fraction 0", "--val-fraction 0.0: expected a share between 0 and 1"),
        ("--val-fraction 1", "--val-fraction 1.0: expected a share between 0 and 1"),
        ("--train-fraction 1.5", "--train-fraction 1.5: expected a share above 0"),
        ("--train-fraction 0.1 --dataset wds/x", "--train-fraction 0.1: --dataset wds/x is a stream"),
        ("--split-seed 4294967296", "--split-seed 4294967296: must be below"),
        ("--crop-padding 4 --train-crop-mode rkrc", "--train-crop-mode rkrc: does not go with --crop-padding"),
        ("--crop-padding 4 --scale 0.5 1", "--scale 0.5 1.0: does not go with --crop-padding"),
        ("--crop-padding 4 --use-multi-epochs-loader", "--use-multi-epochs-loader: does not go with --crop-padding"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(UsageError, match=message):
        parse(*flags.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--val-fraction 0.1 --val-split test", "--val-split test: has no effect with --val-fraction"),
        ("--test-split validation", "--test-split validation: the same images as --val-split validation"),
        ("--test-split val", "--test-split val: the same images as --val-split validation"),
        ("--test-split training", "--test-split training: the same images as --train-split train"),
        ("--test-split tset", "--test-split tset: no such folder"),
        ("--dataset digits --test-split test", "--test-split test: the same images as --val-split validation"),
        ("--dataset torch/cifar10 --test-split test", "--test-split test: the same images as --val-split validation"),
    ],
)
def test_splits_that_cannot_be(images, flags, message):
    with pytest.raises(UsageError, match=message):
        check_data_arguments(parse("--data-dir", images, *flags.split()))


@pytest.mark.parametrize(
    "flags",
    [
        "--test-split test",
        "--val-fraction 0.1 --test-split validation",
        "--dataset digits --val-fraction 0.1 --test-split val",
    ],
)
def test_splits_that_can_be(images, flags):
    check_data_arguments(parse("--data-dir", images, *flags.split()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--val-fraction 0.01", "--val-fraction 0.01: holds out none of 30 images"),
        ("--train-fraction 0.01", "--train-fraction 0.01: keeps none of 30 images"),
    ],
)
def test_parts_that_would_be_empty(images, flags, message):
    with pytest.raises(UsageError, match=message):
        create_datasets(parse("--data-dir", images, *flags.split()), CONFIG)


def test_padded_crops_need_images_of_the_input_size(images, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*BASE.split(), "--data-dir", str(images), "--output", str(tmp_path), "--crop-padding", "4"])
    assert caught.value.code == 2
    assert "--crop-padding: the images are 40x36, expected the model's input size, 32x32" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
