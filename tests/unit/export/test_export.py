"""``timm-alfa-export``: what it writes is the run's model, and timm reads it offline as it reads the hub."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from timm.models import save_for_hf
from training_images import make_image_folder

import timm_alfa
from timm_alfa.errors import UsageError
from timm_alfa.export.command import export_run, main
from timm_alfa.export.onnx_file import largest_difference, missing_packages
from timm_alfa.export.trained import read_trained_run
from timm_alfa.tasks.flags import spell_flags
from timm_alfa.train import main as train
from timm_alfa.train.arguments.command_line import build_parser, parse_args


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an architecture of this package, with ALFA and an average of the weights."""
    folder = tmp_path_factory.mktemp("runs")
    flags = (
        "--dataset digits --img-size 8 --model resnet20s --alfa-blocks @last --alfa-alpha 1/255 --epochs 2"
        " --lr 0.01 --batch-size 256 --warmup-epochs 0 --workers 0"
        " --model-ema --model-ema-decay 0.5 --val-fraction 0.2 --test-split validation --experiment a-run"
    )
    train([*flags.split(), "--output", str(folder)])
    return folder / "a-run"


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one of timm's architectures, in a bfloat16 of its own, without validation."""
    images = make_image_folder(tmp_path_factory.mktemp("images") / "flowers", train=4)
    folder = tmp_path_factory.mktemp("runs")
    flags = (
        "--model test_resnet --num-classes 3 --img-size 32 --epochs 1 --batch-size 4 --lr 0.01 --workers 0"
        " --model-dtype bfloat16 --drop 0.1 --experiment plain"
    )
    train([*flags.split(), "--val-split", "", "--output", str(folder), "--data-dir", str(images)])
    return folder / "plain"


def weights_of(checkpoint: Path, key: str = "state_dict") -> dict[str, torch.Tensor]:
    stored: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=False)[key]
    return stored


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def test_the_default_is_the_best_average(digits_run: Path):
    written = export_run(digits_run, onnx=False)
    assert [path.name for path in written] == ["model.safetensors", "config.json", "README.md"]
    assert {path.parent for path in written} == {digits_run / "export"}
    assert sorted(os.listdir(digits_run / "export")) == sorted(path.name for path in written)
    stored = load_file(digits_run / "export" / "model.safetensors")
    assert_equal(stored, weights_of(digits_run / "model_best.pth.tar", "state_dict_ema"))
    assert_equal(stored, load_file(digits_run / "model.safetensors"))  # which the run itself left
    model = timm.create_model(f"local-dir:{digits_run / 'export'}", pretrained=True)
    assert_equal(model.state_dict(), stored)
    assert model.pretrained_cfg["input_size"] == (3, 8, 8)


def test_the_export_says_which_classes_the_run_saw(folder_run: Path, tmp_path: Path):
    export_run(folder_run, tmp_path, onnx=False)
    for folder in (folder_run, tmp_path):
        assert json.loads((folder / "config.json").read_text())["label_names"] == ["a", "b", "c"]
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]
    for name in ("last.pth.tar", "model_best.pth.tar", "checkpoint-0.pth.tar"):
        with torch.serialization.safe_globals([Namespace]):
            assert torch.load(folder_run / name, weights_only=True)["label_names"] == ["a", "b", "c"]
        timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(folder_run / name))


@pytest.mark.parametrize("name", ["last.pth.tar", "checkpoint-0.pth.tar"])
def test_other_weights(digits_run: Path, tmp_path: Path, name: str):
    path = digits_run / name
    checkpoint = "last" if name == "last.pth.tar" else str(path)
    export_run(digits_run, tmp_path, checkpoint=checkpoint, ema=False, onnx=False)
    stored = load_file(tmp_path / "model.safetensors")
    assert_equal(stored, weights_of(path))
    assert not torch.equal(stored["fc.weight"], weights_of(path, "state_dict_ema")["fc.weight"])


def test_weights_keep_their_type(folder_run: Path, tmp_path: Path):
    export_run(folder_run, tmp_path, onnx=False)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["fc.weight"].dtype == torch.bfloat16
    assert_equal(stored, weights_of(folder_run / "model_best.pth.tar"))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert_equal(model.bfloat16().state_dict(), stored)
    assert (model.num_classes, model.drop_rate, model.pretrained_cfg["input_size"]) == (3, 0.0, (3, 32, 32))


def test_the_layout_is_what_timm_pushes_to_the_hub(digits_run: Path, tmp_path: Path):
    export_run(digits_run, tmp_path / "ours", onnx=False)
    run = read_trained_run(digits_run)
    names = {"label_names": [str(digit) for digit in range(10)]}
    save_for_hf(run.model, str(tmp_path / "timm"), model_config=names, safe_serialization=True,
                data_config=run.data_config)  # fmt: skip
    assert {*os.listdir(tmp_path / "timm"), "README.md"} == set(os.listdir(tmp_path / "ours"))
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "timm"))
    assert ours == theirs
    assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), load_file(tmp_path / "timm" / "model.safetensors"))


def test_grey_images_are_exported_with_the_mean_they_were_trained_with(tmp_path: Path):
    flags = (
        "--dataset digits --img-size 8 --in-chans 1 --model resnet20s --epochs 1 --lr 0.01 --batch-size 256"
        " --workers 0 --experiment grey"
    )
    train([*flags.split(), "--output", str(tmp_path)])
    export_run(tmp_path / "grey", tmp_path / "out")
    trained, exported = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("grey", "out"))
    assert exported == trained
    assert exported["pretrained_cfg"]["input_size"] == [1, 8, 8]
    assert len(exported["pretrained_cfg"]["mean"]) == len(exported["pretrained_cfg"]["std"]) == 1


def test_timm_reads_it_from_the_hub(digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a cache of the hub, as a download would leave it."""
    repository = tmp_path / "models--me--a-model"
    export_run(digits_run, repository / "snapshots" / "0123abc", onnx=False)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = timm.create_model("hf-hub:me/a-model", pretrained=True, cache_dir=str(tmp_path))
    assert_equal(model.state_dict(), load_file(digits_run / "model.safetensors"))


def test_the_card(digits_run: Path, tmp_path: Path):
    export_run(digits_run, tmp_path, license="mit", name="small", onnx=False)
    text = (tmp_path / "README.md").read_text()
    card = ModelCard(text)  # the hub's own reader
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    assert {"timm", card.data.pipeline_tag} <= set(card.data.tags)
    tested, _, top1, _ = card.data.eval_results
    assert [result.dataset_split for result in (tested, top1)] == ["validation", "0.2 of train"]
    final = json.loads((digits_run / "test.json").read_text())
    assert tested.metric_value == pytest.approx(final["top1"], abs=1e-3)
    assert f"top-1 accuracy: {final['top1']:.2f} % on the `validation` split\n" in text
    assert top1.metric_type == "accuracy"
    epoch = torch.load(digits_run / "model_best.pth.tar", weights_only=False)["epoch"]
    row = (digits_run / "summary.csv").read_text().splitlines()[1 + epoch].split(",")
    header = (digits_run / "summary.csv").read_text().splitlines()[0].split(",")
    assert top1.metric_value == pytest.approx(float(row[header.index("eval_top1")]), abs=1e-3)
    assert f"top-1 accuracy: {float(row[header.index('eval_top1')]):.2f} % on the `0.2 of train` split, which" in text
    versions = f"timm-alfa {timm_alfa.__version__}, timm {timm.__version__}, torch {torch.__version__}"
    assert f"Trained with {versions} on" in text
    assert f"Exported with {versions}" in text
    assert "ALFA at `layer3`: alpha 0.003922, steps 1" in text
    assert f"after {epoch + 1} of 2 epochs, averaged weights (EMA)" in text
    assert "import timm_alfa" in text
    assert not {"onnx", str(digits_run.parent)} & set(re.split(r"[\s`]", text))
    (command,) = re.findall(r"^timm-alfa-train (.*)$", text, flags=re.MULTILINE)
    again, before = parse_args(shlex.split(command)), yaml.safe_load((digits_run / "args.yaml").read_text())
    assert {name for name, value in vars(again).items() if value != before[name]} == {"output", "experiment"}


def test_the_card_claims_no_accuracy_of_other_weights(digits_run: Path, folder_run: Path, tmp_path: Path):
    export_run(digits_run, tmp_path / "a", ema=False, onnx=False)
    export_run(folder_run, tmp_path / "b", onnx=False)
    for name in ("a", "b"):
        text = (tmp_path / name / "README.md").read_text()
        assert "Not measured for these weights" in text
        assert not {"license", "model-index"} & yaml.safe_load(text.split("---")[1]).keys()
    assert "trained on flowers with no added method" in text
    assert "--data-dir=flowers" in text
    assert "import timm_alfa" not in text


@pytest.mark.parametrize(
    "line",
    [
        "--dataset torch/cifar10 --data-dir x --model-kwargs a=1 b=two --opt-betas 0.9 0.95 --input-size 3 8 8",
        "--data-dir x --alfa-blocks a 'b.*' --alfa-learnable --alfa-gamma 1 --amp --lr 3e-4 --torchcompile eager",
        "--torchcompile --data-dir x --no-prefetcher",
    ],
)
def test_flags_are_spelled_as_they_are_read(line: str):
    parser = build_parser()
    args = parser.parse_args(shlex.split(line))
    assert parser.parse_args(spell_flags(parser, args)) == args


@pytest.mark.skipif(bool(missing_packages()), reason="needs torch 2.7, and the export extra, which the test extra has")
def test_onnx_gives_what_the_model_gives(digits_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    onnxruntime = pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx.data").write_text("of an earlier export")
    main([str(digits_run), "--output", str(tmp_path), "--license", "mit"])
    captured = capfd.readouterr()
    assert captured.out.splitlines() == [
        str(tmp_path / name) for name in ("model.safetensors", "config.json", "model.onnx", "README.md")
    ]
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.onnx", "model.safetensors"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(item.name, item.shape[1:]) for item in session.get_inputs()] == [("image", [3, 8, 8])]
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for count in (1, 5):
        images = torch.randn(count, 3, 8, 8)
        (found,) = session.run(["logits"], {"image": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-5)
    torch.nn.init.zeros_(model.fc.weight)
    assert largest_difference(tmp_path / "model.onnx", model, (3, 8, 8)) > 0.1
    assert "`model.onnx` takes `image` [B, 3, 8, 8]" in (tmp_path / "README.md").read_text()


def test_without_the_packages_for_onnx_the_rest_is_written(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("timm_alfa.export.command.missing_packages", lambda: ["onnxscript", "torch>=2.7"])
    (tmp_path / "model.onnx").write_text("of other weights")
    export_run(digits_run, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    (left_out,) = (message for message in caplog.messages if "left out" in message)
    assert left_out.endswith("it needs onnxscript and torch>=2.7: pip install onnxscript 'torch>=2.7'")


@pytest.mark.parametrize(("version", "old"), [("2.6.0+cpu", True), ("2.7.0", False), ("2.10.1+cu126", False)])
def test_a_torch_too_old_for_onnx_is_named(version: str, old: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert ("torch>=2.7" in missing_packages()) == old


def test_a_model_that_torch_cannot_export_leaves_the_rest(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*args: object, **kwargs: object) -> None:
        raise TypeError("no such\noperator")

    monkeypatch.setattr("timm_alfa.export.command.missing_packages", list)
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(SystemExit) as exit:
        main([str(digits_run), "--output", str(tmp_path)])
    assert exit.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "timm-alfa-export: error: model.onnx: torch cannot export this model: no such operator"
    )
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]


def test_mistakes_end_in_one_line_and_nothing_is_written(
    digits_run: Path, folder_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "args.yaml").write_text("model: resnet20s\nepochs: many\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(digits_run / "args.yaml", empty)
    cut = tmp_path / "cut.pth.tar"
    cut.write_bytes((digits_run / "last.pth.tar").read_bytes()[:3000])
    out = tmp_path / "out"
    for words, expected in (
        ([str(tmp_path)], f"RUN_DIR {tmp_path}: no args.yaml in it, expected the folder of a training run"),
        ([str(broken)], f"RUN_DIR {broken / 'args.yaml'}: epochs: 'many' is not a whole number"),
        ([str(empty)], "neither model_best.pth.tar nor last.pth.tar in it, expected a run with a finished epoch"),
        ([str(digits_run), "--checkpoint", "nowhere"], "--checkpoint nowhere: no such file"),
        ([str(empty), "--checkpoint", "best"], f"{empty / 'model_best.pth.tar'}: no such file"),
        ([str(digits_run), "--checkpoint", str(cut)], "cut.pth.tar: truncated, damaged or no checkpoint"),
        ([str(folder_run), "--ema"], "has no averaged weights, expected a run with --model-ema; use --no-ema"),
        (
            [str(digits_run), "--checkpoint", str(folder_run / "last.pth.tar"), "--no-ema"],
            "not of the model in args.yaml, resnet20s: state_dict:",
        ),
    ):
        with pytest.raises(SystemExit) as exit:
            main([*words, "--output", str(out)])
        error = capsys.readouterr().err.splitlines()[-1]
        assert exit.value.code == 2
        assert error.startswith("timm-alfa-export: error: ")
        assert expected in error
        assert not out.exists()
    (tmp_path / "a-file").touch()
    with pytest.raises(UsageError, match=r"--output .*a-file: cannot be written"):
        export_run(digits_run, tmp_path / "a-file", onnx=False)
