from __future__ import annotations

import csv
import json
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from launch import TORCHRUN, start
from PIL import Image
from timm.data import create_dataset, create_loader
from torchvision.transforms import Compose, PILToTensor, RandomCrop, RandomHorizontalFlip, RandomVerticalFlip
from training_images import make_image_folder

from timm_alfa.errors import UsageError
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.data.cache import BatchAugmentation, CachedLoader, read_images
from timm_alfa.train.data.images import NamedImageDataset

SIZE = (3, 40, 36)
RUN = ("--model test_resnet --input-size 3 40 36 --num-classes 3 -b 4 --workers 0 --lr 0.01 --warmup-epochs 0 "
       "--color-jitter 0 --crop-padding 2 --cache-images --experiment run")  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), train=7)


def timm_loader(images: Path, **kwargs):
    options = {"is_training": True, "num_workers": 0, "device": torch.device("cpu"), "no_aug": True,
               "persistent_workers": False, **kwargs}  # fmt: skip
    return create_loader(NamedImageDataset(create_dataset("", str(images), "train")), SIZE, 4, **options)


def draw(seed: int, loader) -> list:
    random.seed(seed)
    torch.manual_seed(seed)
    return [batch for _ in range(2) for batch in loader]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_training": False},
        {"re_prob": 0.9, "re_mode": "rand"},
        {"img_dtype": torch.bfloat16},
        {"num_workers": 1},
    ],
)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # python 3.12 on the loader's workers
def test_without_augmentation_batches_are_those_of_timm(images, options):
    loader = timm_loader(images, **options)
    cached = CachedLoader(timm_loader(images, **options))
    assert len(cached) == len(loader) == (5 if loader.loader.drop_last else 6)
    torch.testing.assert_close(draw(1, cached), draw(1, loader), rtol=0, atol=0)


def outcomes(crops: list[torch.Tensor]) -> dict[bytes, int]:
    counts: dict[bytes, int] = {}
    for crop in crops:
        key = crop.contiguous().numpy().tobytes()
        counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.parametrize(("padding", "hflip", "vflip"), [(1, 0.5, 0.0), (2, 0.0, 0.0), (1, 0.25, 0.25), (0, 0.5, 0.5)])
def test_augmentation_has_the_distribution_of_torchvision(padding, hflip, vflip):
    count = 6_000
    image = np.arange(1, 1 + 3 * 5 * 6, dtype=np.uint8).reshape(5, 6, 3)  # all shifts and flips differ
    transform = Compose([RandomCrop((5, 6), padding=padding), RandomHorizontalFlip(hflip), RandomVerticalFlip(vflip),
                         PILToTensor()])  # fmt: skip
    theirs = outcomes([transform(Image.fromarray(image)) for _ in range(1500)])
    batch = torch.from_numpy(image).permute(2, 0, 1).expand(count, -1, -1, -1)
    ours = outcomes(list(BatchAugmentation(padding, hflip, vflip)(batch)))
    assert ours.keys() == theirs.keys()
    # every outcome's probability is known; 6 standard deviations
    for outcome, number in ours.items():
        expected = count * theirs[outcome] / 1500
        assert abs(number - expected) < 6 * (expected + count / 1500 * expected) ** 0.5


def test_every_image_of_a_batch_is_cropped_and_flipped_as_a_whole(device: torch.device):
    batch = torch.arange(64, dtype=torch.uint8, device=device).view(64, 1, 1, 1).repeat(1, 3, 8, 8)
    batch[:, :, 0, 0] = 255
    result = BatchAugmentation(2, 0.5, 0.5)(batch)
    assert result.shape == batch.shape
    for index, image in enumerate(result):
        assert set(image.unique().tolist()) <= {0, index, 255}
        assert (image == image[:1]).all()  # the channels stay together
    corners = (result[:, 0] == 255).nonzero().tolist()
    assert len({tuple(corner[1:]) for corner in corners}) > 10


def test_images_are_read_once(images, monkeypatch):
    loader = timm_loader(images)
    reads = []
    read = NamedImageDataset._read
    monkeypatch.setattr(NamedImageDataset, "_read", lambda self, index: (reads.append(index), read(self, index))[1])
    cached = CachedLoader(loader)
    draw(0, cached)
    assert sorted(reads) == list(range(21))
    assert cached.images.dtype == torch.uint8
    assert cached.images.shape == (21, *SIZE)


def test_16_bits_are_cached_as_they_are_read(tmp_path):
    for name, value in (("a", 30_000), ("b", 60_000)):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        Image.fromarray(np.full((40, 36), value, dtype=np.uint16)).save(folder / "0.png")
    dataset = NamedImageDataset(create_dataset("", str(tmp_path), "train", transform=PILToTensor()))
    kept, _ = read_images(dataset, 0)
    assert kept.flatten(1).unique(dim=1).tolist() == [[117], [233]]


def test_an_image_without_a_known_range_is_named(tmp_path, capsys):
    make_image_folder(tmp_path / "images", train=2)
    path = tmp_path / "images" / "train" / "b" / "9.tif"
    Image.fromarray(np.full((40, 36), 70_000, dtype=np.int32)).save(path)
    with pytest.raises(SystemExit) as caught:
        main([*RUN.split(), "--data-dir", str(tmp_path / "images"), "--input-key", ".png;.tif", "--output",
              str(tmp_path / "out")])  # fmt: skip
    assert caught.value.code == 1
    assert f"error: {path}: a 32-bit image with values from 70000 to 70000, expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_of_different_sizes(images, tmp_path):
    make_image_folder(tmp_path, train=2)
    Image.new("RGB", (20, 40)).save(tmp_path / "train" / "b" / "0.png")
    dataset = NamedImageDataset(create_dataset("", str(tmp_path), "train", transform=PILToTensor()))
    with pytest.raises(UsageError, match=r"--cache-images: the images must have one size, found 40x36 and 40x20"):
        read_images(dataset, 0)


def test_more_images_than_memory(images, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1}[name])
    with pytest.raises(UsageError, match="--cache-images: the images need 0 GiB, this machine has 0 GiB of memory"):
        CachedLoader(timm_loader(images))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--cache-images: cannot resize images anew each time; add --crop-padding, or --no-aug"),
        ("--crop-padding 4", "--color-jitter 0.4: does not go with --cache-images; add --color-jitter 0"),
        ("--crop-padding 4 --color-jitter 0 --aa rand-m9", "--aa rand-m9: does not go with --cache-images"),
        ("--crop-padding 4 --color-jitter 0 --grayscale-prob 0.1", "--grayscale-prob 0.1: does not go with"),
        ("--crop-padding 4 --color-jitter 0 --gaussian-blur-prob 0.1", "--gaussian-blur-prob 0.1: does not go with"),
        ("--no-aug --aug-repeats 3", "--aug-repeats 3.0: does not go with --cache-images"),
        ("--no-aug --train-img-sizes 32 64", "--train-img-sizes 32 64: does not go with --cache-images"),
        ("--no-aug --no-prefetcher", "--no-prefetcher: does not go with --cache-images"),
        ("--no-aug --use-multi-epochs-loader", "--use-multi-epochs-loader: does not go with --cache-images"),
        ("--no-aug --dataset wds/x", "--cache-images: --dataset wds/x is a stream"),
    ],
)
def test_flags_that_do_not_go_with_it(flags, message):
    with pytest.raises(UsageError) as caught:
        parse_args(["--cache-images", *flags.split()])
    assert str(caught.value).startswith(message)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(folder / "run" / "last.pth.tar", weights_only=True)["state_dict"]


def test_a_resumed_run_ends_like_an_uninterrupted_one(images, tmp_path, device: torch.device):
    flags = [*RUN.split(), "--device", str(device),
             "--data-dir", str(images), "--epochs", "3", "--mixup", "0.2", "--cutmix", "1", "--reprob",
             "0.3", "--mixup-off-epoch", "2", "--val-fraction", "0.2", "--resume", "auto"]  # fmt: skip
    main([*flags, "--output", str(tmp_path / "whole")])
    main([*flags, "--output", str(tmp_path / "parts"), "--stop-epoch", "1"])
    main([*flags, "--output", str(tmp_path / "parts")])
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    main([*flags, "--output", str(tmp_path / "other"), "--seed", "1"])
    assert not torch.equal(weights(tmp_path / "other")["fc.weight"], whole["fc.weight"])


def test_digits_are_cached_too(tmp_path):
    main(["--dataset", "digits", "--model", "test_resnet", "--img-size", "32", "-b", "64", "--workers", "0", "--epochs",
          "1", "--lr", "0.01", "--no-aug", "--cache-images", "--train-fraction", "0.2", "--in-chans", "1", "--mean",
          "0.5", "--std", "0.5", "--output", str(tmp_path), "--experiment", "run"])  # fmt: skip
    with open(tmp_path / "run" / "summary.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 1


def test_two_processes_share_the_images_of_an_epoch_and_test_together(images, tmp_path):
    flags = [*RUN.split(), "--data-dir", str(images), "--epochs", "1", "--val-fraction", "0.3", "--test-split",
             "validation", "--output", str(tmp_path), "--alfa-blocks", "layer4"]  # fmt: skip
    done = start([*TORCHRUN, "-m", "timm_alfa.train", *flags])
    assert done.returncode == 0, done.stderr
    assert "Train: 0 [   1/2 (100%)]" in done.stderr  # 15 images and one twice, in two processes, four at a time
    tested = json.loads((tmp_path / "run" / "test.json").read_text())
    model = timm.create_model("test_resnet", num_classes=3,
                              checkpoint_path=str(tmp_path / "run" / "model.safetensors")).eval()  # fmt: skip
    loader = create_loader(NamedImageDataset(create_dataset("", str(images), "validation")), SIZE, 6, num_workers=0,
                           crop_pct=model.pretrained_cfg["crop_pct"], device=torch.device("cpu"),
                           interpolation=model.pretrained_cfg["interpolation"], mean=model.pretrained_cfg["mean"],
                           std=model.pretrained_cfg["std"])  # fmt: skip
    ((batch, target),) = loader
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(batch), target)
    assert tested["loss"] == pytest.approx(loss.item(), rel=1e-5)
