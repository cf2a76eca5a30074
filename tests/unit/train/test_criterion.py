"""The loss and the mixing that flags ask for: timm's, with what timm takes and does not use told by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from summaries import read_summary
from timm.data import IterableImageDataset
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from training_images import make_image_folder

from timm_alfa.errors import UsageError
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.build import assemble
from timm_alfa.train.criterion import check_cut, create_criterion
from timm_alfa.train.loop import train_one_epoch

RUN = "--model test_resnet --img-size 32 --num-classes 3 -b 4 --workers 0 --lr 0.01 --epochs 1 --experiment run"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 training images, 5 batches of 4 and an odd one."""
    return make_image_folder(tmp_path_factory.mktemp("images"), train=7, validation=1, size=(32, 32))


def _arguments(images: Path, output: Path, extra: str) -> list[str]:
    return [*RUN.split(), "--data-dir", str(images), "--output", str(output), *extra.split()]


MIXING = ("--mixup 0.2", "--cutmix 1", "--cutmix-minmax 0.2 0.8", "--mixup 0.2 --mixup-prob 0",
          "--mixup 0.2 --mixup-off-epoch 1")  # fmt: skip
ODD = {
    "-b 7": "--batch-size 7",
    "-b 7 --mixup-mode pair": "--batch-size 7",
    "-b 7 --mixup-mode elem --no-prefetcher": "--batch-size 7",
    "--train-img-sizes 32 48 --train-batch-sizes 4 3": "--train-batch-sizes 3",
    "-b 3 --train-img-sizes 32 48": "--batch-size 3",
}


@pytest.mark.parametrize("extra", ODD)
@pytest.mark.parametrize("mixing", MIXING)
def test_a_batch_that_cannot_be_mixed_is_refused_before_anything_is_written(
    images: Path, tmp_path: Path, extra: str, mixing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(_arguments(images, tmp_path / "out", f"{extra} {mixing}"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"train_alfa.py: error: {ODD[extra]}: Mixup and CutMix need an even batch size\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "extra",
    [
        "-b 7",
        "-b 7 --mixup 0.2 --train-img-sizes 32 48 --train-batch-sizes 4 6",  # -b is not used
        "--mixup 0.2 --train-img-sizes 32 48 --train-batch-sizes 4 3 --train-size-probs 1 0",
    ],
)
def test_an_odd_size_that_is_not_mixed_is_not_refused(extra: str) -> None:
    parse_args(extra.split())


LOADERS = (
    "",
    "--workers 1",
    "--no-prefetcher",
    "--no-prefetcher --alfa-blocks @last",
    "--cache-images --crop-padding 2 --color-jitter 0",
    "--use-multi-epochs-loader --workers 1",
    "--train-img-sizes 32 48 --train-batch-sizes 6 4",
    "--grad-accum-steps 2",
    "-b 20",
)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("extra", LOADERS)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # python 3.12 on the loader's workers
def test_an_odd_last_batch_is_left_out(images: Path, tmp_path: Path, extra: str, mode: str) -> None:
    arguments = _arguments(images, tmp_path, f"{extra} --mixup 0.5 --cutmix 1 --mixup-mode {mode}")
    if "--workers 1" in extra:  # workers that persist, and the threads that feed them, end with their process
        assert processes.wait(processes.start(arguments, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    else:
        main(arguments)
    assert float(read_summary(tmp_path / "run")[0]["train_loss"]) > 0


def test_an_odd_last_batch_of_each_rank_is_left_out(images: Path, tmp_path: Path) -> None:
    """11 images for each of two."""
    children = processes.start_ranks(_arguments(images, tmp_path, "--mixup 0.5"), tmp_path / "log", 2)
    assert [processes.wait(child) for child in children] == [0, 0], (tmp_path / "log-0").read_text()


class Stream:
    """A reader as timm's for datasets that are read in order."""

    def __len__(self) -> int:
        return 21

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for index in range(21):
            yield Image.fromarray(np.full((32, 32, 3), index, dtype=np.uint8)), index % 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_an_odd_last_batch_of_a_stream_is_left_out(images: Path, tmp_path: Path, workers: int) -> None:
    args = parse_args(_arguments(images, tmp_path, f"--mixup 0.5 --val-split= --workers {workers}"))
    args.prefetcher = True
    plan = assemble(args, "", None, datasets=(IterableImageDataset("", reader=Stream()), None))
    assert [len(target) for _, target in plan.run.loader] == [4] * 5
    assert train_one_epoch(plan.run, 0)["loss"] > 0


def test_a_set_smaller_than_a_batch_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(_arguments(images, tmp_path, "-b 22 --mixup 0.5"))
    assert caught.value.code == 2


WRONG = {
    "--smoothing 1": "--smoothing 1: must be below 1",
    "--smoothing 1 --bce-loss": "--smoothing 1: must be below 1",
    "--cutmix-minmax 0.3": "--cutmix-minmax 0.3: must be two shares",
    "--cutmix-minmax 0.5 0.5": "--cutmix-minmax 0.5 0.5: must be two shares",
    "--cutmix-minmax 0.8 0.2": "--cutmix-minmax 0.8 0.2: must be two shares",
    "--cutmix-minmax 0.2 1.5": "--cutmix-minmax 0.2 1.5: must be two shares",
    "--cutmix-minmax -0.2 0.5": "--cutmix-minmax -0.2 0.5: must be two shares",
}


@pytest.mark.parametrize("extra", WRONG)
def test_what_makes_timm_fail_is_refused(extra: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_args(extra.split())
    assert str(caught.value).startswith(WRONG[extra])


def test_an_area_without_a_whole_pixel_is_refused(images: Path, tmp_path: Path) -> None:
    args = parse_args(["--cutmix-minmax", "0.5", "0.51"])
    check_cut(args, (3, 224, 224))
    with pytest.raises(UsageError, match=r"^--cutmix-minmax 0\.5 0\.51: no whole number of pixels .* of 32;"):
        check_cut(args, (3, 224, 32))
    args.train_img_sizes = [224, 32]
    with pytest.raises(UsageError, match="of 32;"):
        check_cut(args, (3, 224, 224))
    with pytest.raises(SystemExit) as caught:
        main(_arguments(images, tmp_path / "out", "--cutmix-minmax 0.5 0.51"))
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()


UNUSED = {
    "--bce-loss --smoothing 0": ["--bce-loss: has no effect with --smoothing 0"],
    "--bce-loss --smoothing 0 --bce-sum": ["--bce-loss: has no effect", "--bce-sum: has no effect"],
    "--bce-sum": ["--bce-sum: has no effect"],
    "--bce-target-thresh 0": ["--bce-target-thresh 0.0: has no effect"],
    "--bce-pos-weight 2": ["--bce-pos-weight 2.0: has no effect"],
    "--mixup-prob 0.5": ["--mixup-prob 0.5: has no effect without --mixup or --cutmix"],
    "--mixup-mode elem": ["--mixup-mode elem: has no effect without --mixup or --cutmix"],
    "--mixup-off-epoch 3": ["--mixup-off-epoch 3: has no effect without --mixup or --cutmix"],
    "--mixup-switch-prob 0.1": ["--mixup-switch-prob 0.1: has no effect without --mixup or --cutmix"],
    "--mixup 1 --mixup-switch-prob 0.1": ["--mixup-switch-prob 0.1: has no effect unless both"],
    "--mixup 1 --mixup-prob 0": ["--mixup-prob 0.0: no batch is mixed"],
    "--cutmix 0.3 --cutmix-minmax 0.2 0.8": ["--cutmix 0.3: has no effect with --cutmix-minmax"],
    "--mixup 1 --mixup-off-epoch 3 --use-multi-epochs-loader": ["--mixup-off-epoch 3: has no effect with --use-multi"],
    "--drop-connect 0.1": ["--drop-connect 0.1: has no effect"],
    "--variable-batch-loss-scale sqrt": ["--variable-batch-loss-scale sqrt: has no effect without --train-img-sizes"],
    "--train-batches-per-epoch 3": ["--train-batches-per-epoch 3: has no effect without --train-img-sizes"],
    # all of it is used
    "": [],
    "--bce-loss --bce-sum --bce-target-thresh 0.2 --bce-pos-weight 2": [],
    "--bce-loss --smoothing 0 --mixup 1 --cutmix 1 --mixup-switch-prob 0.1 --mixup-off-epoch 3": [],
    "--mixup 1 --mixup-off-epoch 3 --use-multi-epochs-loader --workers 0": [],
    "--train-img-sizes 32 48 --variable-batch-loss-scale sqrt --train-batches-per-epoch 3": [],
}


@pytest.mark.parametrize("extra", UNUSED)
def test_flags_without_effect_are_warned_of_by_name(extra: str, caplog: pytest.LogCaptureFixture) -> None:
    parse_args(extra.split())
    assert len(caplog.messages) == len(UNUSED[extra])
    for message, expected in zip(caplog.messages, UNUSED[extra], strict=True):
        assert message.startswith(expected)


def test_of_several_processes_one_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    parse_args(["--bce-sum"])
    assert not caplog.messages


LOSSES: dict[str, type[nn.Module]] = {
    "": LabelSmoothingCrossEntropy,
    "--smoothing 0": nn.CrossEntropyLoss,
    "--bce-loss": BinaryCrossEntropy,
    "--bce-loss --smoothing 0": nn.CrossEntropyLoss,
    "--bce-loss --smoothing 1e-6": BinaryCrossEntropy,
    "--bce-loss --smoothing 0 --mixup 1": BinaryCrossEntropy,
    "--mixup 1": SoftTargetCrossEntropy,
}


@pytest.mark.parametrize("extra", LOSSES)
def test_the_loss_is_that_of_timms_script(extra: str) -> None:
    assert type(create_criterion(parse_args([*extra.split(), "--num-classes", "3"]))) is LOSSES[extra]


@pytest.mark.parametrize(
    ("extra", "said"),
    [("0.5", ""), ("0.05", ""), ("0.95", "every class as absent"), ("0.01", "every class as present"), ("1", "absent")],
)
def test_a_threshold_outside_the_targets_is_told(extra: str, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """Smoothed targets are 0.0333 and 0.9333."""
    args = parse_args(["--bce-loss", "--num-classes", "3", "--bce-target-thresh", extra])
    criterion = create_criterion(args)
    targets = (torch.tensor([[0.1 / 3, 0.9 + 0.1 / 3]]) > args.bce_target_thresh).float()
    output = torch.randn(1, 3)
    expected = nn.functional.binary_cross_entropy_with_logits(output, targets[:, [1, 0, 0]])
    torch.testing.assert_close(criterion(output, torch.tensor([0])), expected)
    assert bool(said) == bool(caplog.messages)
    assert said in caplog.text
