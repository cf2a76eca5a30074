"""A small training script that is arranged as timm's own is, for the tests of the patch."""
import argparse
import os
from functools import partial

import torch
import yaml
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import (
    ClassificationTask,
    LogitDistillationTask,
)

config_parser = parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--config", default="")

parser = argparse.ArgumentParser(description="stand-in")
group = parser.add_argument_group("data and model")
group.add_argument("--data-dir")
group.add_argument("--model", default="test_resnet")
group.add_argument("--img-size", type=int, default=32)
group.add_argument("--num-classes", type=int, default=3)
group.add_argument("--drop-path", type=float, default=None)
group = parser.add_argument_group("training")
for switch in ("--no-aug", "--torchscript", "--model-ema"):
    group.add_argument(switch, action="store_true")
for flag, kind, default in (
    ("--batch-size", int, 8), ("--epochs", int, 2), ("--seed", int, 42), ("--workers", int, 0), ("--lr", float, 0.1),
    ("--weight-decay", float, 2e-5), ("--model-ema-decay", float, 0.9998), ("--opt", str, "sgd"),
    ("--sched", str, "none"), ("--device", str, "cpu"), ("--output", str, ""), ("--experiment", str, "run"),
    ("--val-split", str, ""),
):  # fmt: skip
    group.add_argument(flag, type=kind, default=default)
parser.add_argument("--kd-model-name", default=None)


def _parse_args():
    config, remaining = config_parser.parse_known_args()
    if config.config:
        with open(config.config) as file:
            parser.set_defaults(**yaml.safe_load(file))

    args = parser.parse_args(remaining)  # the rest

    return args, yaml.safe_dump(args.__dict__)


def main():
    args, args_text = _parse_args()
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = create_model(args.model, num_classes=args.num_classes, drop_path_rate=args.drop_path)
    data_config = resolve_data_config(vars(args), model=model)
    model.to(device)
    task = None

    loader_of = partial(
        create_loader, input_size=data_config["input_size"], batch_size=args.batch_size, mean=data_config["mean"],
        std=data_config["std"], num_workers=args.workers, device=device)
    dataset = create_dataset("", root=args.data_dir, split="train", is_training=True)
    loader_train = loader_of(dataset, is_training=True, no_aug=True, interpolation=data_config["interpolation"])

    train_loss_fn = LabelSmoothingCrossEntropy(smoothing=0.1)
    if args.kd_model_name is not None:
        if args.kd_model_name:
            task = LogitDistillationTask(model, args.kd_model_name, train_loss_fn, device=device)
        else:
            raise ValueError("no teacher")
    else:
        # the ordinary task
        task = ClassificationTask(
            model=model,
            criterion=train_loss_fn,
            device=device,
            verbose=utils.is_primary(args),
        )

    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay)

    output_dir = None
    if utils.is_primary(args):
        output_dir = utils.get_outdir(args.output, args.experiment)
        with open(os.path.join(output_dir, "args.yaml"), "w") as file:
            file.write(args_text)

    for epoch in range(args.epochs):
        train_metrics = train_one_epoch(epoch, loader_train, optimizer, task)
        if output_dir is not None:
            utils.update_summary(
                epoch, train_metrics, None, os.path.join(output_dir, "summary.csv"), write_header=epoch == 0)
            state = task.get_checkpoint_state() | task.get_checkpoint_state(ema=True) | {"args": args}
            torch.save(state, os.path.join(output_dir, "last.pth.tar"))


def train_one_epoch(epoch, loader, optimizer, task):
    task.get_trainable_module().train()
    losses = utils.AverageMeter()
    for index, (input, target) in enumerate(loader):
        optimizer.zero_grad()
        loss = task(input, target)["loss"]
        loss.backward()
        optimizer.step()
        task.update_ema(step=epoch * len(loader) + index + 1)
        losses.update(loss.item(), input.shape[0])
    return {"loss": losses.avg}


if __name__ == "__main__":
    main()
