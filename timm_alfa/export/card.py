"""The model card of a run: ``README.md`` in the form that the Hugging Face hub reads."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import model_entrypoint

import timm_alfa

from ..blocks.resolve import resolve_blocks
from ..tasks import alfa
from ..tasks.flags import spell_flags
from ..train.arguments.command_line import build_parser
from ..train.arguments.task_flags import task_defaults
from ..train.data.check import data_root, dataset_kind
from .onnx_file import ONNX_FILE
from .trained import BEST, TrainedRun

__all__ = ["CARD_FILE", "command_line", "model_card"]

CARD_FILE = "README.md"
_HUB_NAMES = {"imagenet": "imagenet-1k"} | {name: name for name in ("cifar10", "cifar100", "mnist", "fashion_mnist")}
_MEASURES = {  # what the hub calls it, and a reader
    "top1": ("accuracy", "top-1 accuracy"),
    "top5": ("accuracy", "top-5 accuracy"),
    "map": ("mAP", "mean average precision"),
    "micro_f1": ("f1", "micro F1"),
    "macro_f1": ("f1", "macro F1"),
    "sample_f1": ("f1", "sample F1"),
}
_PATHS = ("data_dir", "class_map", "initial_checkpoint", "pretrained_path")
_OF_THIS_MACHINE = ("output", "experiment", "resume", "local_rank", "wandb_resume_id")


def model_card(run: TrainedRun, *, name: str, license: str | None = None, onnx: bool = False) -> str:
    """The text of a model card: front matter for the hub, then results, training, and how to load the model.

    Args:
        run: What is exported.
        name: Of the model, on the hub the repository's.
        license: Identifier such as ``apache-2.0``; None leaves it out.
        onnx: Whether ``model.onnx`` lies beside the card.
    """
    front = yaml.safe_dump(_front_matter(run, name, license), sort_keys=False, allow_unicode=True)
    sections = [f"---\n{front}---\n\n# {name}", _summary(run), _results(run), _training(run), _use(run, onnx)]
    return "\n\n".join(section for section in sections if section) + "\n"


def command_line(args: argparse.Namespace) -> str:
    """The training command that a run's flags amount to; of paths the last part, and nothing of where records went.

    Args:
        args: As in the run's ``args.yaml``.
    """
    shown = argparse.Namespace(**vars(args))
    shown.data_dir = data_root(args)
    if args.kd_model_name is not None:
        shown.kd_model_name = _teacher(args)
    for path in _PATHS:
        if getattr(shown, path):
            setattr(shown, path, Path(getattr(shown, path)).name)
    parser = build_parser()
    for left_out in _OF_THIS_MACHINE:
        setattr(shown, left_out, parser.get_default(left_out))
    for name, value in task_defaults(args.task).items():  # filled in by the run, where the parser has None
        if getattr(shown, name) == value:
            setattr(shown, name, None)
    for flag in alfa.FLAGS:  # so are these
        if flag.name != "alfa_blocks" and getattr(shown, flag.name) == flag.default:
            setattr(shown, flag.name, parser.get_default(flag.name))
    if shown.method == "standard" or (shown.method == "alfa" and shown.alfa_blocks):
        shown.method = None  # what leaving it out means
    return shlex.join(["timm-alfa-train", *spell_flags(parser, shown)])


def _front_matter(run: TrainedRun, name: str, license: str | None) -> dict[str, Any]:
    shown, hub_name = _dataset(run.args)
    accuracies = _accuracies(run)
    front: dict[str, Any] = {
        "tags": ["image-classification", "timm", "timm-alfa"],
        "pipeline_tag": "image-classification",
        "library_name": "timm",
    }
    if license is not None:
        front["license"] = license
    if hub_name is not None:
        front["datasets"] = [hub_name]
    if accuracies:
        front["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": shown, "type": hub_name or "imagefolder", "split": split},
                        "metrics": [
                            {"type": kind, "name": label, "value": round(measured[key], 3)}
                            for key, (kind, label) in _MEASURES.items()
                            if key in measured
                        ],
                    }
                    for split, measured in accuracies.items()
                ],
            }
        ]
    return front


def _dataset(args: argparse.Namespace) -> tuple[str, str | None]:
    """What to call the data, and its name on the hub if it has one that we know."""
    kind, rest = dataset_kind(args), args.dataset.partition("/")[2]
    if kind in ("hfds", "hfids"):
        return rest, rest
    if kind == "torch":
        return rest, _HUB_NAMES.get(rest)
    return args.dataset or Path(data_root(args) or "images").name, None


def _accuracies(run: TrainedRun) -> dict[str, dict[str, float]]:
    """What was measured of these weights, by split and metric: that of ``--test-split`` first."""
    validation = {key.removeprefix("eval_"): value for key, value in run.metrics.items() if key.startswith("eval_")}
    found = {str(run.test.get("split")): run.test, _validation_split(run.args): validation}
    return {
        split: {key: float(values[key]) for key in _MEASURES if key in values}
        for split, values in found.items()
        if _MEASURES.keys() & values.keys()
    }


def _validation_split(args: argparse.Namespace) -> str:
    return f"{args.val_fraction:.3g} of {args.train_split}" if args.val_fraction else args.val_split


def _summary(run: TrainedRun) -> str:
    data = _dataset(run.args)[0]
    return (
        f"A plain timm `{_architecture(run)}`, trained on {data} with {_method(run)} by timm-alfa. These "
        "are the weights of the bare network: nothing of the training method is left in them."
    )


def _architecture(run: TrainedRun) -> str:
    model: Any = run.model
    return str(model.pretrained_cfg["architecture"])


def _teacher(args: argparse.Namespace) -> str:
    """The teacher's name; of a folder the last part."""
    source, colon, path = str(args.kd_model_name).partition(":")
    return f"{source}:{Path(path).name}" if colon and source.lower() == "local-dir" else str(args.kd_model_name)


def _method(run: TrainedRun) -> str:
    if run.args.method == "alfa":
        return "L-ALFA" if run.args.alfa_learnable else "ALFA"
    return "no added method" if run.args.method in (None, "standard") else run.args.method


def _results(run: TrainedRun) -> str:
    weights = f"`{run.source}`, after {run.epoch} of {run.args.epochs} epochs"
    weights += ", averaged weights (EMA)." if run.averaged else "."
    lines = [
        f"- {_MEASURES[key][1]}: {value:.2f} % on the `{split}` split"
        + (", which chose the epoch too" if run.source == BEST and split == _validation_split(run.args) else "")
        for split, measured in _accuracies(run).items()
        for key, value in measured.items()
    ]
    return "\n".join(["## Results", "", *(lines or ["- Not measured for these weights."]), f"- Weights: {weights}"])


def _training(run: TrainedRun) -> str:
    args, lines = run.args, []
    if args.method == "alfa":
        values = [
            (flag.name.removeprefix("alfa_").replace("_", " "), getattr(args, flag.name))
            for flag in alfa.FLAGS
            if flag.name not in ("alfa_blocks", "alfa_learnable")
            and (args.alfa_learnable or flag.only_with != "alfa_learnable")
        ]
        shown = ", ".join(
            f"{name} {f'{value:.4g}' if isinstance(value, float) else value}"
            for name, value in values
            if value is not None
        )
        blocks = ", ".join(f"`{block}`" for block in resolve_blocks(run.model, args.alfa_blocks))
        lines.append(f"- {_method(run)} at {blocks}: {shown}")
    if args.kd_model_name is not None:
        lines.append(f"- Distilled from `{_teacher(args)}` ({args.kd_distill_type})")
    recorded = run.environment
    if recorded:
        known = ", ".join(f"{name} {recorded[name]}" for name in ("timm-alfa", "timm", "torch") if name in recorded)
        lines.append(f"- Trained with {known} on {recorded.get('hardware', 'unknown hardware')}")
    versions = f"timm-alfa {timm_alfa.__version__}, timm {timm.__version__}, torch {torch.__version__}"
    lines.append(f"- Exported with {versions}")
    return "\n".join(["## Training", "", *lines, "", "```bash", command_line(args), "```"])


def _use(run: TrainedRun, onnx: bool) -> str:
    architecture = _architecture(run)
    ours = model_entrypoint(architecture).__module__.startswith("timm_alfa.")
    channels, height, width = run.data_config["input_size"]
    lines = [
        "## Use",
        "",
        "```python",
        "import timm",
        *([f"import timm_alfa  # gives timm the architecture {architecture}"] if ours else []),
        "",
        'model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # here: "local-dir:FOLDER"',
        "config = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**config, is_training=False)",
        "```",
    ]
    if run.args.task == "multilabel":
        lines += ["", "The outputs are logits of independent labels: their sigmoid gives the probability of each."]
    if onnx:
        lines += [
            "",
            f"`{ONNX_FILE}` takes `image` [B, {channels}, {height}, {width}] for any B, normalised as the "
            "transform does, and gives `logits` [B, classes].",
        ]
    return "\n".join(lines)
