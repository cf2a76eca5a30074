"""``--warmup-updates``: warm-up that does not end with an epoch, as in the paper's CIFAR recipe."""

from __future__ import annotations

import pytest
import torch

from timm_alfa.errors import UsageError
from timm_alfa.train.arguments.command_line import parse_args
from timm_alfa.train.optim import create_schedule

PER_EPOCH = 351
PAPER = ("--lr 0.1 --warmup-lr 0 --epochs 200 --sched multistep --decay-milestones 50 150 --sched-on-updates "
         "--warmup-updates 200")  # fmt: skip


def _schedule(flags: str):
    args = parse_args(flags.split())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, epochs = create_schedule(
        args, optimizer, updates_per_epoch=PER_EPOCH, start_epoch=0, decreasing_metric=False
    )
    return scheduler, epochs, optimizer.param_groups[0]


def test_the_papers_learning_rates():
    scheduler, epochs, group = _schedule(PAPER)
    assert epochs == 200
    assert group["lr"] == 0
    # timm decays with the update before the milestone
    fifty, hundred_fifty = 50 * PER_EPOCH, 150 * PER_EPOCH
    for update, rate in (
        (1, 0.0005),
        (100, 0.05),
        (199, 0.0995),
        (200, 0.1),
        (fifty - 2, 0.1),
        (fifty - 1, 0.01),
        (hundred_fifty - 2, 0.01),
        (hundred_fifty, 0.001),
    ):
        scheduler.step_update(update)
        assert group["lr"] == pytest.approx(rate, rel=1e-12), update


@pytest.mark.parametrize(
    ("flags", "expected"), [("--sched cosine", 200), ("--sched wsd", 200), ("--sched multistep --warmup-prefix", 201)]
)
def test_the_number_of_epochs_stays_whole(flags, expected):
    _, epochs, _ = _schedule(f"{PAPER} {flags}")
    assert (type(epochs), epochs) == (int, expected)


def test_it_needs_a_schedule_by_updates():
    with pytest.raises(UsageError, match="--warmup-updates 200: needs --sched-on-updates"):
        parse_args(["--warmup-updates", "200"])
