"""The training command from end to end, in this process, on a folder of small images."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import sys
from argparse import Namespace
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import timm
import torch
import yaml
from summaries import COST, read_summary, reproducible_summary
from training_images import make_image_folder

from timm_alfa.train import loop, main, propose_alpha
from timm_alfa.train.arguments.command_line import parse_args

BASE = "--model test_resnet --img-size 32 --num-classes 3 -b 8 --workers 0 --opt adamw --lr 1e-3 --warmup-epochs 1"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


def _arguments(images: Path, output: Path, extra: str) -> list[str]:
    where = ["--data-dir", str(images), "--output", str(output), "--experiment", "run"]
    return [*BASE.split(), *where, *extra.split()]


def _checkpoint(path: Path) -> dict:
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, weights_only=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_checkpoints_records_and_a_plain_model(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    arguments = _arguments(images, tmp_path, "--epochs 2 --channels-last --amp --amp-dtype bfloat16 --save-images")
    with caplog.at_level(logging.INFO):
        main(arguments)
    folder = tmp_path / "run"
    rows = read_summary(folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert set(rows[0]) == {"epoch", "train_loss", *COST, "eval_loss", "eval_top1", "eval_top5", "lr"}
    for row in rows:
        step_time, images_per_second = (float(row[name]) for name in COST)
        assert step_time > 0
        assert step_time * images_per_second == pytest.approx(8)  # three full batches
    environment = yaml.safe_load((folder / "environment.yaml").read_text())
    assert environment["command"] == shlex.join(["train_alfa.py", *arguments])
    assert re.fullmatch(r"(1 CPU thread|\d+ CPU threads) \([\w ]+\)", environment["hardware"])
    assert environment["torch"] == torch.__version__
    assert environment["processes"] == 1
    assert {path.name for path in folder.iterdir()} >= {
        "args.yaml", "last.pth.tar", "model_best.pth.tar", "checkpoint-0.pth.tar", "checkpoint-1.pth.tar",
        "config.json", "train-batch-0.jpg"}  # fmt: skip

    assert parse_args(["--config", str(folder / "args.yaml")]) == parse_args(arguments)

    result = json.loads(capsys.readouterr().out.partition("--result\n")[2])
    assert sorted(entry["epoch"] for entry in result) == [0, 1]
    assert "Train: 1 [   2/3 (100%)]" in caplog.text
    assert "*** Best metric" in caplog.text

    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(folder / "model.safetensors"))
    best = _checkpoint(folder / "model_best.pth.tar")["state_dict"]
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())


def test_a_resumed_run_ends_like_an_uninterrupted_one(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, device: torch.device
):
    flags = f"--device {device} --epochs 3 --mixup 0.2 --aa rand-m9 --drop 0.1 --val-interval 2"
    flags += " --model-ema --model-ema-decay 0.9"
    main(_arguments(images, tmp_path / "whole", flags))

    parts = tmp_path / "parts"
    main(_arguments(images, parts, f"{flags} --resume auto --stop-epoch 1"))
    assert [row["epoch"] for row in read_summary(parts / "run")] == ["0"]
    main(_arguments(images, parts, f"{flags} --resume auto"))
    whole, resumed = (_checkpoint(folder / "run" / "last.pth.tar") for folder in (tmp_path / "whole", parts))
    for key in ("state_dict", "state_dict_ema"):
        for name, tensor in whole[key].items():
            assert torch.equal(tensor, resumed[key][name]), (key, name)
    assert [row["epoch"] for row in read_summary(parts / "run")] == ["0", "1", "2"]
    assert reproducible_summary(parts / "run")[1:] == reproducible_summary(tmp_path / "whole" / "run")
    assert len(resumed["saver"]["checkpoint_files"]) == 2  # the two that were there when the third was written

    before = _contents(parts)
    with caplog.at_level(logging.INFO):
        main(_arguments(images, parts, f"{flags} --resume auto"))
    assert "Nothing left to do" in caplog.text
    assert _contents(parts) == before

    # as if killed while the export was being written, over that of an earlier session or for the first time
    for undo in (lambda file: os.utime(file, (0, 0)), Path.unlink):
        undo(parts / "run" / "config.json")
        (parts / "run" / "config.json.tmp").touch()
        (parts / "run" / "model.safetensors").write_bytes(b"")
        main(_arguments(images, parts, f"{flags} --resume auto"))
        assert _contents(parts) == before
    (parts / "run" / "model.safetensors").unlink()
    main(_arguments(images, parts, f"{flags} --resume auto"))
    assert _contents(parts) == before


def test_a_second_run_of_the_same_name_gets_a_folder_of_its_own(images: Path, tmp_path: Path):
    main(_arguments(images, tmp_path, "--epochs 1 --val-split= --sched none"))
    before = _contents(tmp_path / "run")
    assert "eval_top1" not in read_summary(tmp_path / "run")[0]
    resume = f"--resume {tmp_path / 'run' / 'last.pth.tar'}"
    main([*_arguments(images, tmp_path, f"--epochs 1 --no-resume-opt --start-epoch 0 {resume}"), "--experiment", "two"])
    main(_arguments(images, tmp_path, "--epochs 1"))
    assert _contents(tmp_path / "run") == before
    assert (tmp_path / "two" / "last.pth.tar").exists()
    assert (tmp_path / "run-1" / "last.pth.tar").exists()


def test_milestones_are_kept_and_do_not_change_the_run(images: Path, tmp_path: Path):
    flags = "--epochs 2 --val-interval 2 --checkpoint-hist 1"
    main(_arguments(images, tmp_path / "plain", flags))
    main(_arguments(images, tmp_path / "saved", f"{flags} --save-epochs 1"))
    folder = tmp_path / "saved" / "run"
    assert _checkpoint(folder / "milestone-1.pth.tar")["epoch"] == 0
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1.pth.tar"]
    expected = _checkpoint(tmp_path / "plain" / "run" / "last.pth.tar")["state_dict"]
    actual = _checkpoint(folder / "last.pth.tar")["state_dict"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def test_an_interrupted_run_keeps_its_recovery_checkpoint_and_goes_on_from_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    save_recovery = loop.save_recovery

    def save_and_interrupt(*arguments: object) -> None:
        save_recovery(*arguments)
        raise KeyboardInterrupt

    flags = "--epochs 1 --recovery-interval 2 --resume auto"
    monkeypatch.setattr(loop, "save_recovery", save_and_interrupt)
    with pytest.raises(SystemExit) as caught:
        main(_arguments(images, tmp_path, flags))
    monkeypatch.setattr(loop, "save_recovery", save_recovery)
    assert caught.value.code == 130
    assert (tmp_path / "run" / "recovery-0-1.pth.tar").exists()
    with caplog.at_level(logging.INFO):
        main(_arguments(images, tmp_path, flags))
    assert "in the middle of epoch 0" in caplog.text
    assert [row["epoch"] for row in read_summary(tmp_path / "run")] == ["0"]


def test_batches_of_several_sizes(images: Path, tmp_path: Path):
    main(
        _arguments(
            images,
            tmp_path,
            (
                "--epochs 1 --lr-base 0.1 --lr 0 --train-img-sizes 32 48 --train-batch-sizes 8 4 "
                "--variable-batch-loss-scale linear --no-prefetcher --mixup 0.1 --log-tensorboard"
            ),
        )
    )
    row = read_summary(tmp_path / "run")[0]
    assert float(row["train_loss"]) > 0
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("--model resnet20x", "resnet20x: timm has no such model; nearest: resnet20s"),
        ("--model-kwargs no_such=1", "--model test_resnet: cannot be created"),
        ("--opt adamx", "--opt adamx"),
        ("--opt-kwargs no_such=1", "--opt adamw"),
        ("--sched cosin", "--sched cosin"),
        ("--data-dir no/such/folder", "no/such/folder"),
        ("--num-classes 2", "--num-classes 2"),
        ("--batch-size 64", "--batch-size 64"),
        ("--resume no-such-file", "no-such-file"),
        ("--resume {broken}", "--resume"),
        ("--resume {other}", "does not fit --model test_resnet"),
        ("--initial-checkpoint no-such-file", "no-such-file"),
        ("--torchcompile no-such-backend", "no-such-backend"),
        ("--device-modules no_such_module", "no_such_module"),
        ("--grad-checkpointing --model pit_ti_224", "--grad-checkpointing"),
        ("--config {broken}", "--config"),
        ("--model visformer_tiny --img-size 64", "[3, 64, 64]: --model visformer_tiny cannot take it"),
    ],
)
def test_a_run_that_cannot_start_says_so_in_one_line_and_writes_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: str, expected: str
):
    folder = tmp_path / "out" / "run"
    folder.mkdir(parents=True)
    (folder / "last.pth.tar").write_bytes(b"precious")
    other = tmp_path / "other.pth.tar"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "epoch": 0, "version": 2}, other)
    before = _contents(tmp_path / "out")
    extra = extra.format(broken=folder / "last.pth.tar", other=other)
    with pytest.raises(SystemExit) as caught:
        main(_arguments(images, tmp_path / "out", f"--epochs 1 {extra}"))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("train_alfa.py: error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert _contents(tmp_path / "out") == before


def test_metrics_go_to_wandb(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wandb.__spec__ = ModuleSpec("wandb", None)
    main(_arguments(images, tmp_path, "--epochs 1 --log-wandb --wandb-project p --wandb-tags a b"))
    settings = wandb.init.call_args.kwargs
    assert settings["project"] == "p"
    assert settings["tags"] == ["a", "b"]
    assert settings["name"] == "run"
    assert settings["resume"] is None
    assert settings["config"]["epochs"] == 1
    logged = wandb.init.return_value.log.call_args.args[0]
    assert {name: str(value) for name, value in logged.items()} == read_summary(tmp_path / "run")[0]
    wandb.init.return_value.finish.assert_called_once()


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_was_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    main(_arguments(images, tmp_path, "--epochs 2 --stop-epoch 1"))
    before = _checkpoint(tmp_path / "run" / "last.pth.tar")

    def fail(state: object, file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(SystemExit) as caught:
        main(_arguments(images, tmp_path, "--epochs 2 --resume auto"))
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("train_alfa.py: error: cannot write checkpoint")
    assert error.count("\n") == 1
    after = _checkpoint(tmp_path / "run" / "last.pth.tar")
    assert after["epoch"] == before["epoch"]


def test_on_a_terminal_a_bar_replaces_the_lines_between_the_last_ones(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO):
        main(_arguments(images, tmp_path, "--epochs 1 --log-interval 1"))
    assert "Train: 0:" in capsys.readouterr().err
    assert [message[:14] for message in caplog.messages if message.startswith("Train: 0")] == ["Train: 0 [   2"]


def test_blocks_are_listed_without_data(capsys: pytest.CaptureFixture[str]):
    main(["--model", "test_resnet", "--alfa-list-blocks"])
    assert capsys.readouterr().out


@pytest.mark.parametrize("extra", ["", "--alfa-blocks layer4 --no-prefetcher --mixup 0.2"])
def test_a_dry_run_writes_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: str, device: torch.device
):
    main(_arguments(images, tmp_path / "out", f"--device {device} --alfa-dry-run {extra}"))
    assert capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_from_trained_weights_proposes_sizes(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(propose_alpha, "STEPS", 3)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "weights.pth")
    flags = f"--alfa-dry-run --initial-checkpoint {tmp_path}/weights.pth --alfa-blocks layer2 layer4"
    main(_arguments(images, tmp_path / "out", flags))
    printed = capsys.readouterr().out
    assert "after 3 plain steps, on 4 batches" in printed
    assert re.search(r"layer2: delta \S+% of the feature, loss [+-]\S+%; layer4: ", printed)
    rows = [line.split() for line in printed.splitlines() if re.match(r" *[\d.]+% ", line)]
    assert [row[0] for row in rows] == ["0.1%", "0.2%", "0.5%", "1%", "2%", "5%", "10%", "20%", "50%"]
    assert all(
        re.search(rf"^{block}: (try --alfa-alpha|no size)", printed, re.MULTILINE) for block in ("layer2", "layer4")
    )
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["alfa-sizes.png"]


@pytest.mark.parametrize("half", ["--amp --amp-dtype bfloat16", "--model-dtype bfloat16"])
def test_a_dry_run_in_half_precision_says_what_it_leaves(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, half: str
):
    monkeypatch.setattr(propose_alpha, "STEPS", 1)
    torch.save(timm.create_model("test_efficientnet", num_classes=3).state_dict(), tmp_path / "weights.pth")
    flags = f"--model test_efficientnet --initial-checkpoint {tmp_path}/weights.pth --alfa-blocks blocks.2"
    main(_arguments(images, tmp_path / "out", f"{flags} --alfa-alpha 0.12% {half} --alfa-dry-run"))
    printed = capsys.readouterr().out
    assert re.search(r"blocks.2: delta 0.12% of the feature, \d+% of it survives bfloat16, loss [+-]\S+%", printed)
    assert re.search(r"blocks.2: delta is .*, of which \d+% survives bfloat16, .*; try --alfa-alpha 2%, or ", printed)
    assert "(rise of the loss / predictions that change / delta that survives bfloat16):" in printed
    rows = [line.split(" / ") for line in printed.splitlines() if re.match(r" *[\d.]+% ", line)]
    assert len(rows) == 9
    assert all(len(row) == 3 for row in rows)
    shares = [float(row[2].rstrip("%")) for row in rows]
    assert shares[0] < 80 < 95 < shares[-1] <= 100


FEW_BITS = "--model test_convnext --alfa-blocks stages.2.blocks.0 @last --alfa-alpha 0.12%"


@pytest.mark.parametrize("half", ["", "--amp --amp-dtype bfloat16"])
def test_half_precision_adds_a_column(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, half: str):
    with caplog.at_level(logging.INFO):
        main(_arguments(images, tmp_path, f"--epochs 2 {FEW_BITS} {half}"))
    rows = read_summary(tmp_path / "run")
    names = [name for name in rows[0] if "survives" in name]
    blocks = ("stages.2.blocks.0", "stages.3")
    assert names == ([f"train_delta_survives_{block}" for block in blocks] if half else [])
    assert ("survives" in caplog.text) == bool(half)
    for row in rows:
        assert all(0 < float(row[name]) <= 1 for name in names)
    warnings = [record.message for record in caplog.records if "survives bfloat16, and" in record.message]
    assert len(warnings) == len(names[:1])  # of the first, once; pooling takes the last in float32


def test_alfa_is_logged_recorded_and_leaves_a_plain_model(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, device: torch.device
):
    flags = f"--device {device} --epochs 1 --alfa-blocks layer3 @last --alfa-steps 2 --model-ema"
    with caplog.at_level(logging.INFO):
        main(_arguments(images, tmp_path, flags))
    assert "192x2x2" in caplog.text  # layer3's output at the size that is trained at
    assert "Adv:" in caplog.text
    row = read_summary(tmp_path / "run")[0]
    assert float(row["train_loss"]) == pytest.approx(
        sum(float(row[f"train_loss_{part}"]) for part in ("clean", "adv_layer3", "adv_layer4"))
    )
    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(tmp_path / "run/model.safetensors"))
    average = _checkpoint(tmp_path / "run" / "model_best.pth.tar")["state_dict_ema"]
    assert all(torch.equal(tensor, average[name].cpu()) for name, tensor in model.state_dict().items())


def test_alfa_of_weight_zero_is_plain_training(images: Path, tmp_path: Path, device: torch.device):
    flags = f"--device {device} --epochs 2 --drop 0.1 --drop-path 0.1 --mixup 0.2 --aa rand-m9"
    flags += " --model-ema --model-ema-decay 0.9"
    main(_arguments(images, tmp_path / "plain", flags))
    main(_arguments(images, tmp_path / "alfa", f"{flags} --alfa-blocks layer3 --alfa-steps 2 --alfa-lambda 0"))
    plain, alfa = (_checkpoint(tmp_path / name / "run" / "last.pth.tar") for name in ("plain", "alfa"))
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(tensor, alfa[key][name]) for name, tensor in plain[key].items())


def test_the_saved_configuration_holds_what_was_asked_for(images: Path, tmp_path: Path):
    main(_arguments(images, tmp_path, "--epochs 1 --lr-base 0.05 --seed 3"))
    saved = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert saved["lr_base"] == 0.05
    assert saved["seed"] == 3
    assert saved["device"] == "cuda"
    assert "world_size" not in saved


# Advice of PyTorch on memory, which goes with create_graph.
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_an_optimizer_that_differentiates_twice_goes_with_methods_that_allow_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = "--epochs 1 --opt adahessian --lr 0.01"
    main(_arguments(images, tmp_path, f"{flags} --moex-block layer1"))
    assert (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(SystemExit) as caught:
        main(_arguments(images, tmp_path / "other", f"{flags} --alfa-blocks layer4"))
    assert caught.value.code == 2
    assert "--opt adahessian: needs second derivatives, which --method alfa does not give" in capsys.readouterr().err
