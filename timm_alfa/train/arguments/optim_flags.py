"""timm's flags for the optimizer, the schedule, augmentation and regularization: same names, defaults and meaning."""

from __future__ import annotations

import argparse

from .parser import ParseKeyValues


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the optimizer group."""
    group = parser.add_argument_group("Optimizer parameters")
    add = group.add_argument
    add("--opt", default="sgd", type=str, metavar="NAME", help="timm optimizer")
    add("--opt-eps", default=None, type=float, metavar="EPS", help="its epsilon")
    add("--opt-betas", default=None, type=float, nargs="+", metavar="BETA", help="its betas")
    add("--momentum", type=float, default=0.9, metavar="M", help="its momentum")
    add("--weight-decay", type=float, default=2e-5, metavar="W", help="weight decay")
    add("--clip-grad", type=float, default=None, metavar="X", help="clip gradients at this value")
    add("--clip-mode", type=str, default="norm", metavar="MODE", help="by what: norm, value or agc")
    add("--layer-decay", type=float, default=None, metavar="D", help="learning rate decay from layer to layer")
    add("--layer-decay-min-scale", type=float, default=0, metavar="S", help="smallest scale that --layer-decay gives")
    add(
        "--layer-decay-no-opt-scale",
        type=float,
        default=None,
        metavar="S",
        help="layers scaled below this are not trained at all",
    )
    add(
        "--opt-kwargs",
        nargs="*",
        default={},
        action=ParseKeyValues,
        metavar="KEY=VALUE",
        help="further arguments of the optimizer",
    )


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the learning rate schedule group, epochs included."""
    group = parser.add_argument_group("Learning rate schedule parameters")
    add = group.add_argument
    add(
        "--sched",
        type=str,
        default="cosine",
        metavar="NAME",
        help="cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, plateau or none",
    )
    add("--sched-on-updates", action="store_true", help="step the schedule after every update, not every epoch")
    add("--lr", type=float, default=None, metavar="LR", help="learning rate; left out: from --lr-base")
    add("--lr-base", type=float, default=0.1, metavar="LR", help="learning rate for a global batch of --lr-base-size")
    add("--lr-base-size", type=int, default=256, metavar="N", help="batch size that --lr-base is meant for")
    add(
        "--lr-base-scale",
        type=str,
        default="",
        metavar="HOW",
        help="how the rate follows the batch size: linear or sqrt; empty: sqrt for Adam-like optimizers, else linear",
    )
    add("--lr-noise", type=float, nargs="+", default=None, metavar="SHARE", help="noise from (to) this share of epochs")
    add("--lr-noise-pct", type=float, default=0.67, metavar="SHARE", help="largest relative noise")
    add("--lr-noise-std", type=float, default=1.0, metavar="S", help="standard deviation of the noise")
    add("--lr-cycle-mul", type=float, default=1.0, metavar="X", help="each cycle is this much longer")
    add("--lr-cycle-decay", type=float, default=0.5, metavar="X", help="each cycle starts this much lower")
    add("--lr-cycle-limit", type=int, default=1, metavar="N", help="number of cycles")
    add("--lr-k-decay", type=float, default=1.0, metavar="K", help="k of cosine and poly schedules")
    add("--warmup-lr", type=float, default=1e-5, metavar="LR", help="learning rate that warm-up starts from")
    add("--min-lr", type=float, default=0, metavar="LR", help="lowest learning rate of cyclic schedules")
    add("--epochs", type=int, default=300, metavar="N", help="epochs of the schedule")
    add(
        "--stop-epoch",
        type=int,
        default=None,
        metavar="N",
        help="stop when this many epochs are done, however long the schedule is",
    )
    add("--epoch-repeats", type=float, default=0.0, metavar="X", help="go through the data this often per epoch")
    add("--start-epoch", default=None, type=int, metavar="N", help="first epoch, whatever a checkpoint says")
    add(
        "--decay-milestones",
        default=[90, 180, 270],
        type=int,
        nargs="+",
        metavar="N",
        help="epochs at which the multistep schedule decays, increasing",
    )
    add("--decay-epochs", type=float, default=90, metavar="N", help="epochs between decays of the step schedule")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="warm-up epochs")
    add(
        "--warmup-updates",
        type=int,
        default=None,
        metavar="N",
        help="warm-up in updates instead of epochs; needs --sched-on-updates",
    )
    add("--warmup-prefix", action="store_true", help="warm-up comes before the schedule, not out of its epochs")
    add("--cooldown-epochs", type=int, default=0, metavar="N", help="further epochs at the lowest rate")
    add("--patience-epochs", type=int, default=10, metavar="N", help="patience of the plateau schedule")
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="X", help="factor of each decay")


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the augmentation and regularization group."""
    group = parser.add_argument_group("Augmentation and regularization parameters")
    add = group.add_argument
    add("--no-aug", action="store_true", help="no training augmentation, whatever other flags say")
    add("--train-crop-mode", type=str, default=None, metavar="MODE", help="training crop: rrc, rkrc or rkrr")
    add(
        "--crop-padding",
        type=int,
        default=None,
        metavar="N",
        help="training crops of the input's size from the image with N black pixels around it, without resizing",
    )
    add("--scale", type=float, nargs="+", default=[0.08, 1.0], metavar="SHARE", help="area range of random crops")
    add("--ratio", type=float, nargs="+", default=[3.0 / 4.0, 4.0 / 3.0], metavar="R", help="aspect range of crops")
    add("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--vflip", type=float, default=0.0, metavar="P", help="probability of a vertical flip")
    add("--color-jitter", type=float, default=0.4, metavar="X", help="strength of colour jitter")
    add("--color-jitter-prob", type=float, default=None, metavar="P", help="probability of colour jitter")
    add("--grayscale-prob", type=float, default=None, metavar="P", help="probability of grey images")
    add("--gaussian-blur-prob", type=float, default=None, metavar="P", help="probability of blur")
    add("--aa", type=str, default=None, metavar="POLICY", help="AutoAugment, RandAugment, ... as timm names them")
    add("--aug-repeats", type=float, default=0, metavar="N", help="repeated augmentation (distributed training)")
    add("--bce-loss", action="store_true", help="binary cross-entropy instead of cross-entropy")
    add("--bce-sum", action="store_true", help="sum it over classes instead of averaging")
    add("--bce-target-thresh", type=float, default=None, metavar="T", help="make its soft targets hard at this value")
    add("--bce-pos-weight", type=float, default=None, metavar="W", help="weight of its positive targets")
    add("--reprob", type=float, default=0.0, metavar="P", help="probability of random erasing")
    add("--remode", type=str, default="pixel", metavar="MODE", help="what erased areas hold: const, rand or pixel")
    add("--recount", type=int, default=1, metavar="N", help="largest number of erased areas")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="Mixup strength; 0: off")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="CutMix strength; 0: off")
    add(
        "--cutmix-minmax",
        type=float,
        nargs="+",
        default=None,
        metavar="SHARE",
        help="smallest and largest share of a CutMix area; switches CutMix on",
    )
    add("--mixup-prob", type=float, default=1.0, metavar="P", help="probability that a batch is mixed")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="probability of CutMix where both are on")
    add("--mixup-mode", type=str, default="batch", metavar="MODE", help="draw per batch, pair or elem")
    add("--mixup-off-epoch", default=0, type=int, metavar="N", help="no mixing from this epoch on; 0: never off")
    add(
        "--smoothing",
        type=float,
        default=None,
        metavar="X",
        help="label smoothing; left out: 0.1, or 0 with --task multilabel, whose labels it moves towards 0.5",
    )
    add("--train-interpolation", type=str, default="random", metavar="NAME", help="interpolation of training crops")
    add("--drop", type=float, default=0.0, metavar="P", help="dropout rate")
    add("--drop-connect", type=float, default=None, metavar="P", help="accepted as timm does, without effect")
    add("--drop-path", type=float, default=None, metavar="P", help="stochastic depth rate")
    add("--drop-block", type=float, default=None, metavar="P", help="DropBlock rate")


def add_resolution_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the scheduled-resolution group."""
    group = parser.add_argument_group("Scheduled resolution parameters")
    add = group.add_argument
    add("--train-img-sizes", type=int, nargs="+", default=None, metavar="N", help="sides of square training batches")
    add("--train-batch-sizes", type=int, nargs="+", default=None, metavar="N", help="batch size for each of them")
    add("--train-size-probs", type=float, nargs="+", default=None, metavar="P", help="weight of each of them")
    add(
        "--train-size-schedule",
        type=str,
        default="constant",
        choices=("constant", "progressive"),
        help="mix all sizes all the time, or move from the first to the last",
    )
    add(
        "--train-size-schedule-spread",
        type=float,
        default=0.65,
        metavar="X",
        help="width of the moving window, in sizes",
    )
    add(
        "--train-size-random-mix",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of batches that a progressive schedule draws from all sizes",
    )
    add(
        "--train-batches-per-epoch",
        "--train-steps-per-epoch",
        type=int,
        default=None,
        metavar="N",
        help="fixed number of batches per epoch",
    )
    add(
        "--variable-batch-loss-scale",
        default="none",
        type=str,
        choices=("none", "sqrt", "linear"),
        help="scale gradients by the batch's size against the average one",
    )
