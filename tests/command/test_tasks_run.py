"""The training command with independent labels and with a teacher: timm's own weights at ALFA off, exact resume."""

from __future__ import annotations

import csv
import gc
import io
import json
import logging
import tarfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from summaries import read_summary, reproducible_summary
from timm.loss import BinaryCrossEntropy
from timm.task import (
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from training_images import make_image_folder

from timm_alfa.export import export_model
from timm_alfa.export.command import export_run
from timm_alfa.report.page import write_report
from timm_alfa.train import main
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.build import assemble, check_inputs
from timm_alfa.train.data.datasets import create_datasets
from timm_alfa.train.loop import train_one_epoch

BASE = "--model test_resnet --img-size 32 -b 4 --workers 0 --opt adamw --lr 1e-3 --warmup-epochs 1 --experiment run "
LABELS = ("red", "green", "dark")
ALFA = "--alfa-blocks @last --alfa-alpha 2%"
# the flags, and what of the summary they add
RUNS = {
    "labels": ("--task multilabel", ()),
    "labels, alfa": (f"--task multilabel {ALFA} --drop 0.2 --mixup 0.2 --cutmix 1", ("loss_adv",)),
    "labels, kl": (f"--task multilabel {ALFA} --alfa-objective kl --smoothing 0.1", ("loss_adv",)),
    "labels, noise": ("--task multilabel --method noise --noise-sigma 2%", ("loss_adv",)),
    "labels, advprop": ("--task multilabel --method advprop", ("loss_adv",)),
    "labels, cached": (f"--task multilabel {ALFA} --cache-images --crop-padding 2 --color-jitter 0", ("loss_adv",)),
    "logit": ("--kd", ()),
    "logit, alfa": (f"--kd {ALFA} --alfa-objective kl --mixup 0.2", ("loss_adv", "loss_task", "loss_distill")),
    "feature": ("--kd --kd-distill-type feature --kd-student-feature-dim 96", ()),
    "feature, lalfa": (
        "--kd --kd-distill-type feature --model test_efficientnet --alfa-blocks @stages --alfa-learnable",
        ("loss_adv", "loss_task", "loss_distill"),
    ),
    "token, noise": ("--kd --kd-distill-type token --method noise", ("loss_adv", "loss_task", "loss_distill")),
}
TOKEN = (
    "--model deit_tiny_distilled_patch16_224 --model-kwargs img_size=32 patch_size=16 embed_dim=12 depth=1 num_heads=2"
)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("classes"), train=6, validation=3, size=(32, 32))


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose labels one can see, in folders and as shards."""
    root, random = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    for split, count in (("train", 18), ("validation", 9)):
        (root / split).mkdir()
        with (
            open(root / split / "metadata.csv", "w", newline="") as file,
            tarfile.open(root / f"{split}.tar", "w") as tar,
        ):
            rows = csv.writer(file)
            rows.writerow(["file_name", *LABELS])
            for index in range(count):
                present = random.integers(0, 2, 3)
                pixels = random.integers(0, 100, (32, 32, 3), dtype=np.uint8)
                pixels[..., :2] += (100 * present[:2]).astype(np.uint8)
                Image.fromarray(pixels // (1 + present[2]).astype(np.uint8)).save(root / split / f"{index}.png")
                rows.writerow([f"{index}.png", *present])
                parts = {"png": (root / split / f"{index}.png").read_bytes(),
                         "json": json.dumps({"labels": np.flatnonzero(present).tolist()}).encode()}  # fmt: skip
                for ending, content in parts.items():
                    info = tarfile.TarInfo(f"{index:03d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    export_model(timm.create_model("test_resnet", num_classes=3), folder)
    return f"local-dir:{folder}"


@pytest.fixture
def arguments(classes: Path, labels: Path, taught: str) -> Callable[[str, Path], list[str]]:
    def words(flags: str, output: Path) -> list[str]:
        data = labels if "multilabel" in flags else classes
        flags = flags.replace("--kd ", f"--kd-model-name {taught} ") if "--kd " in flags else flags
        flags = flags.replace("--kd", f"--kd-model-name {taught}") if flags == "--kd" else flags
        model = TOKEN if "token" in flags else ""
        given = f"{BASE} {model} --num-classes 3 {flags}"
        return [*given.split(), "--data-dir", str(data), "--output", str(output)]

    return words


def _checkpoint(folder: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([Namespace]):
        found: dict[str, Any] = torch.load(folder / "run" / "last.pth.tar", weights_only=True)
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    name: str, arguments: Callable[[str, Path], list[str]], tmp_path: Path
):
    flags, columns = RUNS[name]
    flags += " --epochs 2 --model-ema --model-ema-decay 0.9"
    main(arguments(flags, tmp_path / "whole"))
    main(arguments(f"{flags} --stop-epoch 1 --resume auto", tmp_path / "parts"))
    main(arguments(f"{flags} --resume auto", tmp_path / "parts"))
    whole, parts = _checkpoint(tmp_path / "whole"), _checkpoint(tmp_path / "parts")
    kept = ("state_dict", "state_dict_ema", "task_state", "task_state_ema", "optimizer")
    assert [key for key in kept if key in whole] == [key for key in kept if key in parts]
    assert all(_same(whole[key], parts[key]) for key in kept if key in whole)
    rows = reproducible_summary(tmp_path / "whole" / "run")
    assert rows[1] == reproducible_summary(tmp_path / "parts" / "run")[1]
    scores = ("map", "micro_f1", "macro_f1", "sample_f1") if "labels" in name else ("top1", "top5")
    assert {f"train_{column}" for column in columns} | {f"eval_{score}" for score in scores} <= rows[0].keys()
    assert "loss_task" in columns or "train_loss_task" not in rows[0]

    args = parse_args(["--config", str(tmp_path / "whole" / "run" / "args.yaml")])
    model = timm.create_model(f"local-dir:{tmp_path / 'whole' / 'run'}", pretrained=True)
    best = torch.load(tmp_path / "whole" / "run" / "model_best.pth.tar", weights_only=False)["state_dict_ema"]
    assert list(model.state_dict()) == list(best)
    assert all(torch.equal(value, best[key]) for key, value in model.state_dict().items())
    assert args.eval_metric == scores[0]


def _own_task(name: str, model: torch.nn.Module, criterion: Any, taught: str) -> TrainingTask:
    if name == "labels":
        return MultiLabelClassificationTask(model, criterion, verbose=False)
    kinds: dict[str, Callable[..., TrainingTask]] = {
        "logit": LogitDistillationTask, "feature": FeatureDistillationTask, "token": TokenDistillationTask
    }  # fmt: skip
    given = {} if name == "feature" else {"temperature": 4.0}
    return kinds[name](model, taught, criterion, verbose=False, **given)


@pytest.mark.parametrize("method", ["standard", "alfa", "noise"])
@pytest.mark.parametrize("name", ["labels", "logit", "feature", "token"])
def test_with_alfa_off_it_ends_with_the_weights_of_timms_own_task(
    name: str, method: str, arguments: Callable[[str, Path], list[str]], taught: str, tmp_path: Path
):
    """The images in the order of the command, everything else an own loop around timm's task."""
    flags = {"labels": "--task multilabel", "logit": "--kd"}.get(name, f"--kd --kd-distill-type {name}")
    flags += {"standard": "", "alfa": " --alfa-blocks @last --alfa-lambda 0",
              "noise": " --method noise --noise-lambda 0"}[method]  # fmt: skip
    words = arguments(f"{flags} --epochs 2 --device cpu --val-split= --sched none --no-aug", tmp_path)
    args = parse_args(words)
    args.prefetcher, args.rank, args.world_size, args.distributed = True, 0, 1, False
    plan = assemble(args, *check_inputs(args))
    run, student = plan.run, plan.run.task.get_eval_model()
    assert student is not None
    before = {key: value.clone() for key, value in student.state_dict().items()}
    batches = [[(images.clone(), target.clone()) for images, target in run.loader] for _ in range(2)]

    class Again:
        """What the command trains on, too."""

        def __init__(self, epoch: int) -> None:
            self.batches, self.dataset, self.mixup_enabled = batches[epoch], None, False

        def __iter__(self) -> Any:
            return iter(self.batches)

        def __len__(self) -> int:
            return len(self.batches)

    model = timm.create_model(args.model, num_classes=3, **args.model_kwargs)
    model.load_state_dict(before)
    criterion = BinaryCrossEntropy(smoothing=0.0) if name == "labels" else None
    own = _own_task(name, model, criterion or timm.loss.LabelSmoothingCrossEntropy(0.1), taught)
    if name == "feature" and own.trainable_module.projection is not None:
        own.trainable_module.projection.load_state_dict(run.task.get_task_state()["projection"])
    optimizer = timm.optim.create_optimizer_v2(own.get_trainable_module(), "adamw", lr=1e-3, weight_decay=2e-5)
    random = torch.get_rng_state()
    for epoch in range(2):
        own.get_trainable_module().train()
        for images, target in batches[epoch]:
            own(images, target)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.set_rng_state(random)
    for epoch in range(2):
        run.loader = Again(epoch)
        train_one_epoch(run, epoch)
    assert not _same(before, dict(student.state_dict()))
    for key, value in own.get_eval_model().state_dict().items():
        assert torch.equal(student.state_dict()[key], value), key


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:unclosed file:ResourceWarning")
def test_labels_in_shards_are_those_in_the_folder(labels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pytest.importorskip("webdataset")  # the test extra has it
    common = [*f"{BASE} --epochs 1 --task multilabel --num-classes 3 --data-dir {labels} {ALFA}".split()]
    shards = ["--dataset", "wds/labels", "--train-split", "train.tar|18", "--val-split", "validation.tar|9",
              "--target-key", "labels"]  # fmt: skip
    config = {"input_size": (3, 32, 32)}
    streamed, listed = (create_datasets(parse_args([*common, *extra]), config)[1] for extra in (shards, []))
    pairs = list(zip(streamed, [listed[index] for index in range(9)], strict=True))  # type: ignore[index]
    for (image, target), (other_image, other_target) in pairs:
        assert np.array_equal(np.asarray(image), np.asarray(other_image))
        assert torch.equal(target, other_target)
    with caplog.at_level(logging.INFO):
        main([*common, *shards, "--output", str(tmp_path)])
    (row,) = read_summary(tmp_path / "run")
    assert 0 < float(row["eval_map"]) <= 100
    assert f"map: {float(row['eval_map']):.3f}  micro_f1: {float(row['eval_micro_f1']):.3f}" in caplog.text
    del streamed
    gc.collect()  # webdataset leaves its files to it


def test_a_final_test_report_and_card_speak_of_labels(
    arguments: Callable[[str, Path], list[str]], labels: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    test = labels / "test"
    if not test.exists():
        test.symlink_to(labels / "validation")
    flags = f"--task multilabel {ALFA} --epochs 1 --val-fraction 0.3 --test-split test --eval-metric macro_f1"
    with caplog.at_level(logging.INFO):
        main(arguments(flags, tmp_path))
    folder = tmp_path / "run"
    result = json.loads((folder / "test.json").read_text())
    assert result.keys() >= {"map", "micro_f1", "macro_f1", "sample_f1", "loss"}
    assert f"map {result['map']:.3f}, micro_f1 {result['micro_f1']:.3f}" in caplog.text
    page = write_report([folder]).read_text()
    assert "validation mAP and F1 (%)" in page
    assert "best macro F1" in page
    export_run(folder, onnx=False, license="mit")
    card = (folder / "export" / "README.md").read_text()
    assert f"mean average precision: {result['map']:.2f} % on the `test` split" in card
    assert "type: mAP" in card
    assert "--task=multilabel" in card
    assert "--smoothing" not in card
    assert "sigmoid" in card
    assert json.loads((folder / "config.json").read_text())["label_names"] == list(LABELS)


def test_a_card_tells_of_the_teacher_without_its_path(
    arguments: Callable[[str, Path], list[str]], taught: str, tmp_path: Path
):
    main(arguments(f"--kd {ALFA} --epochs 1", tmp_path))
    export_run(tmp_path / "run", onnx=False, license="mit")
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    name = Path(taught.partition(":")[2]).name
    assert f"- Distilled from `local-dir:{name}` (logit)" in card
    assert f"--kd-model-name=local-dir:{name}" in card
    assert str(Path(taught.partition(":")[2]).parent) not in card


@pytest.mark.parametrize("flags", ["--task multilabel", "--kd --kd-distill-type feature", "--kd"])
def test_a_dry_run_compares_with_timms_own_step(
    flags: str, arguments: Callable[[str, Path], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "trained.pth")
    words = arguments(f"{flags} {ALFA} --alfa-dry-run --initial-checkpoint {tmp_path / 'trained.pth'}", tmp_path)
    main(words)
    shown = capsys.readouterr().out
    assert "plain step" in shown
    assert "What alpha does after" in shown


CHANGES = {
    "--task multilabel": "--task multilabel, but the run was started with --task classification",
    "--kd-distill-type feature": "--kd-distill-type feature, but the run was started with --kd-distill-type logit",
    "--no-teacher": "no --kd-model-name, but the run was started with --kd-model-name",
    "--kd-temperature 2 --distill-loss-weight 3": "",
    "--other-teacher": "",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_flags_that_are_changed(
    change: str, arguments: Callable[[str, Path], list[str]], labels: Path, taught: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    main(arguments("--kd --epochs 2 --stop-epoch 1", tmp_path))
    words = arguments("--kd --epochs 2 --resume auto", tmp_path)
    if change == "--task multilabel":
        words = [*arguments("--epochs 2 --resume auto --task multilabel", tmp_path)]
    elif change == "--no-teacher":
        words = arguments("--epochs 2 --resume auto", tmp_path)
    elif change == "--other-teacher":
        moved = tmp_path / "moved"
        moved.symlink_to(taught.partition(":")[2])
        words[words.index("--kd-model-name") + 1] = f"local-dir:{moved}"
    else:
        words += change.split()
    if not CHANGES[change]:
        with caplog.at_level(logging.INFO):
            main(words)
        assert "from here on --kd-model-name" in caplog.text or "from here on --distill-loss-weight 3.0" in caplog.text
        return
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert CHANGES[change] in capsys.readouterr().err


@pytest.mark.parametrize(("metric", "refused"), [("map", False), ("micro_f1", True)])
def test_the_threshold_of_f1_is_kept_where_it_ranks_checkpoints(
    metric: str, refused: bool, arguments: Callable[[str, Path], list[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    flags = f"--task multilabel --epochs 2 --eval-metric {metric}"
    main(arguments(f"{flags} --stop-epoch 1", tmp_path))
    words = arguments(f"{flags} --resume auto --multilabel-threshold 0.3", tmp_path)
    if not refused:
        main(words)
        return
    with pytest.raises(SystemExit):
        main(words)
    assert "checkpoints could not be ranked with the earlier ones" in capsys.readouterr().err
