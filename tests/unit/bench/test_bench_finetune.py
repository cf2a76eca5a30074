"""The fine-tuning benchmark: draws, arms, resuming, and weights that recognise real photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from training_images import make_image_folder

from timm_alfa.bench.finetune import command as finetune
from timm_alfa.bench.finetune.data import Images, draw, read_folder
from timm_alfa.bench.finetune.plots import draw as draw_pictures
from timm_alfa.bench.finetune.report import render
from timm_alfa.bench.finetune.run import BINS, METHODS, Arm, Batches, Setting, Trainer, evaluate
from timm_alfa.errors import UsageError


@pytest.mark.parametrize(("name", "label"), [("china.jpg", 698), ("flower.jpg", 985)])  # palace, daisy
def test_the_published_weights_see_what_is_there(name: str, label: int) -> None:
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(finetune.load_weights("tf_efficientnet_lite0", ""))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        logits = model(transform(Image.fromarray(load_sample_image(name)))[None])
    assert int(logits.argmax()) == label


def test_draws_are_stratified_disjoint_and_by_seed() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 30)
    chosen, others = draw(labels, 40, seed=3)
    assert np.bincount(labels.numpy()[chosen]).tolist() == [20, 10, 10]
    assert sorted([*chosen, *others]) == list(range(120))
    again, spare = draw(labels, 40, seed=3, spare=20)
    assert (again == chosen).all()
    assert np.bincount(labels.numpy()[spare]).tolist() == [7, 3, 3]  # 20 of 120
    assert set(spare) <= set(others)
    assert (draw(labels, 40, seed=4)[0] != chosen).any()


def test_arms() -> None:
    arm = Arm.parse("alfa:block=blocks.4,alpha=5%,steps=3,norm=l2,ema=1,lr=2e-3")
    assert (arm.method, arm.block, arm.alpha, arm.steps, arm.norm, arm.ema, arm.lr) == (
        "alfa",
        "blocks.4",
        "5%",
        3,
        "l2",
        1,
        2e-3,
    )
    assert Arm.parse("noise:alpha=0.5/255").alpha == 0.5 / 255
    assert Arm.parse("plain") == Arm(name="plain")


def test_arms_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "arms.txt").write_text("plain\nalfa:block=@last,alpha=2%\n")
    args = finetune.build_parser().parse_args(["--arms", f"@{tmp_path}/arms.txt", "--n", "250"])
    assert (args.arms, args.n) == (["plain", "alfa:block=@last,alpha=2%"], [250])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("advprop", "expected plain, alfa"),
        ("alfa:blok=x", "'blok=x' is none of block="),
        ("alfa:block", "none of"),
        ("alfa:alpha=2 %", "2 %"),
        ("alfa:steps=two", "two"),
        ("plain:name=x", "'name=x' is none of"),
    ],
)
def test_arms_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"--arms {text}: .*{message}"):
        Arm.parse(text)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, 3, 16, 16), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.arange(48) % 3, ["a", "b", "c"])
    torch.manual_seed(0)
    weights = timm.create_model("test_efficientnet").state_dict()
    return Trainer(Setting("test_efficientnet", 32, 8, 1, 2, "validation"), weights, images, None, torch.device("cpu"))


@pytest.mark.parametrize(
    "settings",
    [*METHODS, "alfa:steps=2,norm=l2,reduction=sum", "plain:smoothing=0.1,mixup=0.2,ema=1", "plain:epochs=2"],
)
def test_every_kind_of_arm_trains(trainer: Trainer, settings: str) -> None:
    run = trainer.run(Arm.parse(settings), seed=0, count=21)
    assert run["n"] == 21
    assert run["images"] == 27
    assert 0 <= run["top1"] <= 100
    assert run["nll"] > 0
    assert len(run["bins"]) == BINS
    assert sum(row[0] for row in run["bins"]) == 27
    again = trainer.run(Arm.parse(settings), seed=0, count=21)
    assert {**run, "seconds": 0} == {**again, "seconds": 0}


def test_a_perturbation_of_nothing_is_plain_training(trainer: Trainer) -> None:
    plain = trainer.run(Arm.parse("plain"), seed=1, count=21)
    for text in ("alfa:alpha=1e-30", "noise:alpha=0%", "sam:rho=0"):
        run = trainer.run(Arm.parse(text), seed=1, count=21)
        assert (run["top1"], run["nll"]) == (plain["top1"], pytest.approx(plain["nll"], rel=1e-6)), text


def test_calibration_by_hand() -> None:
    class Sure(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(torch.tensor([[0.8, 0.2]])).expand(len(x), 2)

    pixels = torch.zeros(10, 3, 8, 8, dtype=torch.uint8)
    batches = Batches(pixels, torch.zeros(10), 8, (0.5,) * 3, (0.5,) * 3)
    labels = torch.tensor([0] * 6 + [1] * 4)
    found = evaluate(Sure(), batches, pixels, labels)
    assert found["top1"] == 60
    assert found["ece"] == pytest.approx(20, rel=1e-6)
    assert found["nll"] == pytest.approx(-0.6 * np.log(0.8) - 0.4 * np.log(0.2), rel=1e-6)


def test_the_command_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "images", train=8)
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
    command = [
        "--data-dir",
        str(tmp_path / "images"),
        "--train-split",
        "train",
        "--test-split",
        "validation",
        "--n",
        "12",
        "--model",
        "test_efficientnet",
        "--pretrained-path",
        str(weights),
        "--epochs",
        "1",
        "--img-size",
        "32",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        "1",
    ]
    finetune.main([*command, "--arms", "plain"])
    path = tmp_path / "out/runs.jsonl"
    first = path.read_text()
    path.write_text(first + '{"arm": "alfa", "se')  # a kill in the middle of a line
    finetune.main([*command, "--arms", "plain", "alfa"])
    runs = finetune.read_runs(path)
    assert [(run["arm"], run["seed"]) for run in runs[:2]] == [("plain", 0), ("plain", 1)]
    assert {(run["arm"], run["seed"]) for run in runs} >= {("plain", 0), ("plain", 1), ("alfa", 1)}
    capsys.readouterr()
    finetune.main(["--output", str(tmp_path / "out"), "--report"])
    printed = capsys.readouterr().out
    assert printed.startswith("n = 12, validation images, differences to `plain`")
    assert "| `plain` | 2 |" in printed


def test_the_report_by_hand() -> None:
    def run(arm: str, seed: int, top1: float, **other: Any) -> dict[str, Any]:
        return {
            "arm": arm,
            "seed": seed,
            "asked": 500,
            "evaluated_on": "test",
            "top1": top1,
            "nll": 1.0 - top1 / 100,
            "ece": 5.0,
            "seconds": 2.0,
            **other,
        }

    runs = [run("plain", 0, 60.0), run("plain", 1, 62.0), run("alfa", 0, 63.0), run("alfa", 1, 64.0)]
    text = render(json.loads(json.dumps(runs)), "plain")
    assert "| `alfa` | 2 | 63.50 ± 0.71 | +2.50 (-3.85 to +8.85) | 0.365 | -0.025 (-0.089 to +0.039) | 5.0 |" in text
    assert "| `plain` | 2 | 61.00 ± 1.41 |  | 0.390 |  | 5.0 | 2.0 |" in text


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_folder(tmp_path / "none")
    for name, width in (("a", 8), ("b", 10)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (width, 8 if width == 8 else 10)).save(tmp_path / name / "0.png")
    with pytest.raises(UsageError, match="is 10 pixels wide, the first image 8; expected one size"):
        read_folder(tmp_path)


def test_pictures_of_what_the_runs_have_enough_of(tmp_path: Path) -> None:
    def run(arm: str, seed: int, asked: int, top1: float) -> dict[str, Any]:
        bins = [[30.0, 15.0 + place, 10.0 + place] for place in range(BINS)]
        return {"arm": arm, "seed": seed, "asked": asked, "top1": top1, "nll": 1.0 - top1 / 1000, "bins": bins}

    arms = {"plain": 0, "alfa:block=blocks.2,alpha=2%": 2, "noise": 1}
    runs = [run(arm, seed, 500, 60 + seed + gain) for seed in range(3) for arm, gain in arms.items()]
    assert [path.name for path in draw_pictures(tmp_path, runs, "plain")] == ["gains.png", "reliability.png"]
    runs += [run("alfa:block=blocks.2,alpha=5%", seed, 500, 64) for seed in range(3)]
    runs += [run("alfa:block=blocks.2,alpha=5%,steps=3", seed, 500, 99) for seed in range(3)]  # not a point of the line
    runs += [run("plain", 0, 250, 50)]
    names = ["gains.png", "gain-against-alpha.png", "accuracy-against-n.png", "reliability.png"]
    assert [path.name for path in draw_pictures(tmp_path, runs, "plain")] == names
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--output .*: has no runs\.jsonl with a finished run"):
        finetune.main(["--report", "--output", str(tmp_path)])
