"""timm's flags for the data, the model, the device and the run itself: same names, defaults and meaning."""

from __future__ import annotations

import argparse

from .parser import ParseKeyValues


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where images and labels come from."""
    parser.add_argument("data", nargs="?", metavar="DIR", help="dataset root; old form of --data-dir")
    group = parser.add_argument_group("Dataset parameters")
    add = group.add_argument
    add("--data-dir", metavar="DIR", help="dataset root")
    add(
        "--dataset",
        metavar="NAME",
        default="",
        help="'digits' (built in), or a timm dataset such as torch/cifar10, hfds/..., wds/...; empty: image folders",
    )
    add("--train-split", metavar="NAME", default="train", help="split to train on")
    add("--val-split", metavar="NAME", default="validation", help="split to validate on; empty: no validation")
    add(
        "--val-fraction",
        default=None,
        type=float,
        metavar="SHARE",
        help="validate on this share of every class of the training split, instead of on --val-split",
    )
    add(
        "--train-fraction",
        default=None,
        type=float,
        metavar="SHARE",
        help="train on this share of every class of what is left of the training split",
    )
    add(
        "--split-seed",
        default=0,
        type=int,
        metavar="N",
        help="which images these two pick; the same ones whatever --seed is",
    )
    add(
        "--test-split",
        default="",
        metavar="NAME",
        help="evaluate the best checkpoint on this split once training is complete",
    )
    add(
        "--unlabeled-dir",
        default="",
        metavar="DIR",
        help="images without labels, as many of which join every batch; with --alfa-objective kl",
    )
    add("--train-num-samples", default=None, type=int, metavar="N", help="training samples of an iterable dataset")
    add("--val-num-samples", default=None, type=int, metavar="N", help="validation samples of an iterable dataset")
    add("--dataset-download", action="store_true", help="let torch/ and tfds/ datasets download themselves")
    add(
        "--class-map",
        default="",
        metavar="FILE",
        help="class names in the order of their indices (.txt), or a dict (.pkl)",
    )
    add(
        "--input-img-mode",
        default=None,
        type=str,
        metavar="MODE",
        help="8-bit PIL mode that images are converted to; left out: RGB, or L for one channel",
    )
    add("--input-key", default=None, type=str, metavar="KEY", help="name of the image field in a dataset's records")
    add(
        "--target-key",
        default=None,
        type=str,
        metavar="KEY",
        help="name of the label field in a dataset's records; "
        "with --task multilabel also several, a,b,c, one per label",
    )
    add("--dataset-trust-remote-code", action="store_true", help="let a Hugging Face dataset run the code it ships")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model is built, from which weights, for which input."""
    group = parser.add_argument_group("Model parameters")
    add = group.add_argument
    add("--model", default="resnet50", type=str, metavar="NAME", help="timm model to train")
    add("--pretrained", action="store_true", help="start from the model's published weights")
    add(
        "--pretrained-path",
        default=None,
        type=str,
        metavar="FILE",
        help="use this file as the published weights, the classifier adapted",
    )
    add("--initial-checkpoint", default="", type=str, metavar="FILE", help="load these weights into the new model")
    add(
        "--resume",
        default="",
        type=str,
        metavar="FILE",
        help="continue this checkpoint; 'auto': the newest of --output/--experiment, if there is one",
    )
    add("--no-resume-opt", action="store_true", help="resume without the optimizer's and the loss scaler's state")
    add("--num-classes", type=int, default=None, metavar="N", help="number of classes; left out: the model's own")
    add("--gp", default=None, type=str, metavar="POOL", help="global pooling: fast, avg, max, avgmax or catavgmax")
    add("--img-size", type=int, default=None, metavar="N", help="side of a square input in pixels")
    add("--in-chans", type=int, default=None, metavar="N", help="input channels; left out: 3")
    add("--input-size", default=None, nargs=3, type=int, metavar=("C", "H", "W"), help="whole input shape")
    add("--crop-pct", default=None, type=float, metavar="SHARE", help="centre crop of validation images, as a share")
    add("--mean", type=float, nargs="+", default=None, metavar="M", help="pixel means, in 0..1")
    add("--std", type=float, nargs="+", default=None, metavar="S", help="pixel standard deviations, in 0..1")
    add("--interpolation", default="", type=str, metavar="NAME", help="resize interpolation, instead of the model's")
    add("-b", "--batch-size", type=int, default=128, metavar="N", help="training batch size per process")
    add(
        "-vb",
        "--validation-batch-size",
        type=int,
        default=None,
        metavar="N",
        help="validation batch size per process; left out: --batch-size",
    )
    add("--channels-last", action="store_true", help="channels-last memory layout")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="batches whose gradients make one update")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass to save memory")
    add("--fast-norm", action="store_true", help="timm's faster low-precision norm layers")
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKeyValues,
        metavar="KEY=VALUE",
        help="further arguments of the model's constructor",
    )
    add("--head-init-scale", default=None, type=float, metavar="X", help="multiply the classifier's first weights")
    add("--head-init-bias", default=None, type=float, metavar="X", help="set the classifier's first bias")
    add(
        "--torchcompile",
        nargs="?",
        type=str,
        default=None,
        const="inductor",
        metavar="BACKEND",
        help="compile with torch.compile; without a value: inductor",
    )
    add("--torchcompile-mode", type=str, default=None, metavar="MODE", help="torch.compile mode")
    add("--cuda-graph", action="store_true", help="launch each step as one CUDA graph (plain training and ALFA)")


def add_batchnorm_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the batch norm group."""
    group = parser.add_argument_group("Batch norm parameters")
    add = group.add_argument
    add("--bn-momentum", type=float, default=None, metavar="M", help="momentum of batch norms, where a model takes it")
    add("--bn-eps", type=float, default=None, metavar="EPS", help="epsilon of batch norms, where a model takes it")
    add("--sync-bn", action="store_true", help="synchronize batch norm over all processes")
    add(
        "--dist-bn",
        type=str,
        default="reduce",
        metavar="HOW",
        help="running statistics after each epoch: 'reduce' (average), 'broadcast' (the first rank's) or ''",
    )


def add_ema_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the weight averaging group."""
    group = parser.add_argument_group("Model exponential moving average parameters")
    add = group.add_argument
    add("--model-ema", action="store_true", help="keep a moving average of the weights; validation then uses it")
    add("--model-ema-force-cpu", action="store_true", help="keep the average on the CPU; it is not validated")
    add("--model-ema-decay", type=float, default=0.9998, metavar="D", help="decay of the average")
    add("--model-ema-warmup", action="store_true", help="let the decay grow to its value")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the device and precision group."""
    group = parser.add_argument_group("Device parameters")
    add = group.add_argument
    add(
        "--device",
        default="cuda",
        type=str,
        metavar="NAME",
        help="device to train on; if left out on a machine without CUDA: the CPU",
    )
    add("--amp", action="store_true", help="automatic mixed precision")
    add("--amp-dtype", default="float16", type=str, metavar="TYPE", help="its low precision: float16 or bfloat16")
    add(
        "--model-dtype",
        default=None,
        type=str,
        metavar="TYPE",
        help="type of weights and input without AMP: float32, float16 or bfloat16",
    )
    add("--no-ddp-bb", action="store_true", help="do not broadcast buffers in DistributedDataParallel")
    add("--synchronize-step", action="store_true", help="wait for the device after each update (for timing)")
    add("--local_rank", default=0, type=int, metavar="N", help="accepted for old launchers; the environment decides")
    add(
        "--device-modules",
        default=None,
        type=str,
        nargs="+",
        metavar="MODULE",
        help="Python modules to import for a device's back end",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the miscellaneous group: seeds, intervals, output, logging."""
    group = parser.add_argument_group("Miscellaneous parameters")
    add = group.add_argument
    add("--seed", type=int, default=42, metavar="N", help="random seed; each rank adds its number")
    add("--worker-seeding", type=str, default="all", metavar="MODE", help="how data workers are seeded: all or part")
    add("--log-interval", type=int, default=50, metavar="N", help="updates between log lines")
    add("--val-interval", type=int, default=1, metavar="N", help="epochs between validations and checkpoints")
    add("--recovery-interval", type=int, default=0, metavar="N", help="updates between recovery checkpoints; 0: none")
    add("--checkpoint-hist", type=int, default=10, metavar="N", help="checkpoints to keep, the best ones")
    add(
        "--save-epochs",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="keep a milestone checkpoint after so many epochs, whatever its rank",
    )
    add("-j", "--workers", type=int, default=4, metavar="N", help="data loading processes; 0: load in this one")
    add(
        "--cache-images",
        action="store_true",
        help="keep decoded images in memory and augment whole batches on the device (small images; --crop-padding)",
    )
    add("--save-images", action="store_true", help="save the input batch at each log line")
    add("--pin-mem", action="store_true", help="pin memory in the data loader")
    add("--no-prefetcher", action="store_true", help="normalise in the data loader, not on the device")
    add("--output", default="", type=str, metavar="DIR", help="where run folders go; empty: ./output/train")
    add("--experiment", default="", type=str, metavar="NAME", help="name of the run's folder; empty: date and model")
    add(
        "--eval-metric",
        default=None,
        type=str,
        metavar="NAME",
        help="what 'best' means: top1 (left out), top5 or loss; with --task multilabel: map (left out), micro_f1, "
        "macro_f1, sample_f1 or loss",
    )
    add("--tta", type=int, default=0, metavar="N", help="validation views per image that the loader yields; 0: one")
    add("--use-multi-epochs-loader", action="store_true", help="keep data workers alive between epochs")
    add("--log-tensorboard", action="store_true", help="log metrics for TensorBoard into the run's folder")
    add("--log-wandb", action="store_true", help="log metrics to Weights & Biases")
    add("--wandb-project", default=None, type=str, metavar="NAME", help="its project")
    add("--wandb-tags", default=[], type=str, nargs="+", metavar="TAG", help="its tags")
    add("--wandb-resume-id", default="", type=str, metavar="ID", help="continue this wandb run; needs --resume")
