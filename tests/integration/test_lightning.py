"""ALFA in a LightningModule, with the real package: the weights and eta of a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from own_loops import (
    assert_trained_alike,
    free_port,
    join_group,
    make_alfa,
    make_batches,
    make_model,
    make_optimizer,
    train_plainly,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning", reason="an optional extra, part of the test extra")
# Lightning's own: a function of torch that was renamed, and advice that does not fit four batches in memory.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """As in the README, with eta learned and saved."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.alfa, self.loss_fn = make_alfa(model)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, target = batch
        return self.loss_fn(self.alfa(images, target), target).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = make_optimizer(self.alfa.module)
        self.alfa.follow(optimizer, getattr(self.trainer.precision_plugin, "scaler", None))
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["eta"] = self.alfa.eta.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.alfa.eta.load_state_dict(checkpoint["eta"])


def trainer(folder: Path, *, epochs: int = 1, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_plain_loops_weights(accumulate: int, tmp_path: Path) -> None:
    batches, model = make_batches(), make_model()
    module = Classifier(model)
    run = trainer(tmp_path, accumulate_grad_batches=accumulate)
    run.fit(module, DataLoader(batches, batch_size=None))
    assert_trained_alike(model, module.alfa.eta.values, train_plainly(batches, accumulate=accumulate))
    assert {name.partition("alfa.module.")[2] for name in module.state_dict()} == model.state_dict().keys()
    make_model().load_state_dict(model.state_dict())


def test_a_run_is_resumed_with_its_eta(tmp_path: Path) -> None:
    batches = make_batches()
    first = trainer(tmp_path)
    first.fit(Classifier(make_model()), DataLoader(batches, batch_size=None))
    first.save_checkpoint(tmp_path / "one.ckpt")
    model = make_model()
    module = Classifier(model)
    trainer(tmp_path, epochs=2).fit(module, DataLoader(batches, batch_size=None), ckpt_path=tmp_path / "one.ckpt")
    assert_trained_alike(model, module.alfa.eta.values, train_plainly([*batches, *batches]))


def test_a_loss_scaler_does_not_reach_eta(tmp_path: Path) -> None:
    batches, model = make_batches(), make_model()
    module = Classifier(model)
    plugin = lightning.pytorch.plugins.MixedPrecision("bf16-mixed", "cpu")
    plugin.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
    run = trainer(tmp_path, plugins=[plugin])
    run.fit(module, DataLoader(batches, batch_size=None))
    assert_trained_alike(model, module.alfa.eta.values, train_plainly(batches))


def _rank(rank: int, port: int, folder: str) -> None:
    join_group(rank, port)
    model = make_model()
    module = Classifier(model)
    run = trainer(Path(folder), strategy="ddp", devices=2, use_distributed_sampler=False)
    run.fit(module, DataLoader(make_batches()[rank::2], batch_size=None))
    assert run.world_size == 2
    torch.save((model.state_dict(), module.alfa.eta.values.detach()), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates(tmp_path: Path) -> None:
    """Gradients of weights and eta are averaged over processes, as over the batches of an update."""
    torch.multiprocessing.spawn(_rank, (free_port(), str(tmp_path)), nprocs=2)
    expected = train_plainly(make_batches(), accumulate=2)
    for rank in (0, 1):
        weights, eta = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        model = make_model()
        model.load_state_dict(weights)
        assert_trained_alike(model, eta, expected)
