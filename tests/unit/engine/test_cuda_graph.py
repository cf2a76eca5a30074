"""Captured steps: what can be proved without a GPU is proved with a capture that runs the step again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from toys import Small, batch

from timm_alfa import AlfaTask
from timm_alfa.engine.cuda_graph import EAGER_STEPS, CudaCapture, GraphedStep
from timm_alfa.tasks.plain import PlainTask


class Rerun:
    """Runs the function again in place of a graph, into the same tensors; a capture itself computes nothing."""

    made = 0

    def __call__(self, function: Callable[[], Any], prepared: Callable[[], Any]) -> Any:
        Rerun.made += 1
        self.function = function
        with prepared():
            function()
            self.result = function()
        return self.result

    def replay(self) -> None:
        for old, new in zip(tree_leaves(self.result), tree_leaves(self.function()), strict=True):
            if isinstance(old, Tensor):
                with torch.no_grad():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def _count() -> None:
    Rerun.made = 0


def graphed(task: Any) -> Any:
    task.graphed = GraphedStep(task, Rerun)
    return task


def train(task: Any, steps: int = 12, size: int = 8, *, accumulate: int = 1, last: int | None = None) -> list[Any]:
    """Losses of some steps; ``last`` is the size of every third batch."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(task.models.bare.parameters() if hasattr(task, "models") else task.parameters(), lr=0.1)
    found = []
    for step in range(steps):
        for _ in range(accumulate):
            count = last if last is not None and step % 3 == 2 else 6
            images = torch.randn(count, 3, size, size, generator=generator)
            target = torch.randint(10, (count,), generator=generator)
            result = task(images, target)
            (result["loss"] / accumulate).backward()
            found.append(result["loss"].item())
        optimizer.step()
        optimizer.zero_grad()
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "PGD-1": {"blocks": "block"},
    "PGD-3": {"blocks": "block", "steps": 3, "alpha": "2%"},
    "tail": {"blocks": "block", "grad": "tail", "alpha": 0.01},
    "two": {"blocks": ["stem", "block"], "steps": 2, "alpha": 0.01, "lam": 0.5, "reduction": "mean"},
    "L-ALFA": {"blocks": ["stem", "block"], "learnable": True, "gamma": 0.5, "alpha": 0.01},
    "joint": {"blocks": ["stem", "block"], "learnable": True, "joint": True, "steps": 2, "alpha": 0.01},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("accumulate", "last"), [(1, None), (2, None), (1, 4)])
def test_same_as_eager_to_the_bit(name: str, accumulate: int, last: int | None) -> None:
    torch.manual_seed(1)
    start = Small(drop=0.0).train()
    results = []
    for how in (graphed, lambda task: task):
        model = copy.deepcopy(start)
        task = how(AlfaTask(model, nn.CrossEntropyLoss(), verbose=False, **OPTIONS[name]))
        losses = train(task, accumulate=accumulate, last=last)
        state = [*model.state_dict().values(), task.engine.eta.values.detach()]
        results.append((losses, state, task.engine.passes, task.epoch_metrics()))
    assert Rerun.made == 2  # with norms and without
    (one, other) = results
    assert one[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert one[2] == other[2]
    assert one[3] == other[3]


def test_plain_training_is_timms() -> None:
    torch.manual_seed(1)
    start = Small(drop=0.0).train()
    models = [copy.deepcopy(start), copy.deepcopy(start)]
    losses = [
        train(graphed(PlainTask(models[0], nn.CrossEntropyLoss(), verbose=False))),
        train(ClassificationTask(models[1], nn.CrossEntropyLoss(), verbose=False)),
    ]
    assert Rerun.made == 1
    assert losses[0] == losses[1]
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_results_are_not_overwritten() -> None:
    task = graphed(AlfaTask(Small(drop=0.0).train(), nn.CrossEntropyLoss(), "block", verbose=False))
    train(task, EAGER_STEPS)
    images, target = batch(6)
    first = task(images.float(), target)
    first["loss"].backward()
    gradients = [parameter.grad for parameter in task.models.bare.parameters()]
    kept = [leaf.clone() for leaf in [*gradients, first["output"], first["loss_adv"]]]
    task.models.bare.zero_grad()
    task(images.float() + 1, target)["loss"].backward()
    for one, other in zip(kept, [*gradients, first["output"], first["loss_adv"]], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="graph behind the output"):
        first["output"].sum().backward()


def test_a_change_is_noticed() -> None:
    model = Small(drop=0.0).train()
    task = graphed(AlfaTask(model, nn.CrossEntropyLoss(), "block", verbose=False))

    def captures(change: Callable[[], Any]) -> int:
        change()
        before = Rerun.made
        train(task, EAGER_STEPS + 2)
        return Rerun.made - before

    assert captures(lambda: None) > 0
    for change in (
        lambda: model.stem.requires_grad_(False),
        lambda: model.stem.requires_grad_(True),
        lambda: model.stem.eval(),
        lambda: setattr(model.head, "weight", nn.Parameter(model.head.weight.detach().clone())),
        lambda: setattr(model, "head", nn.Linear(8, 10)),
    ):
        assert captures(change) > 0


EXTRA = torch.ones(1, requires_grad=True)


@pytest.mark.parametrize(
    ("drop", "criterion", "reason"),
    [
        (0.2, nn.CrossEntropyLoss(), "draws random numbers"),
        (0.0, lambda output, target: F.cross_entropy(output * EXTRA, target), "outside of the model"),
    ],
)
def test_what_stays_eager(drop: float, criterion: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    task = graphed(AlfaTask(Small(drop=drop).train(), criterion, "block", verbose=False))
    train(task, 6)
    assert Rerun.made == 0
    assert sum(reason in record.getMessage() for record in caplog.records) == 1


def test_refusals() -> None:
    model, criterion = Small(drop=0.0), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="cuda_graph: needs a CUDA device, found cpu"):
        AlfaTask(model, criterion, "block", cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: needs a CUDA device, found cpu"):
        PlainTask(model, criterion, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: sample_blocks"):
        AlfaTask(model, criterion, ["stem", "block"], cuda_graph=True, sample_blocks=1)
    with pytest.raises(ValueError, match="cuda_graph: would repeat the attack's random start"):
        AlfaTask(model, criterion, "block", cuda_graph=True, init="uniform", eps=0.1)
    with pytest.raises(ValueError, match=r"cuda_graph: does not go with torch\.compile"):
        graphed(AlfaTask(model, criterion, "block")).compile()


def test_a_failed_capture_is_told() -> None:
    class Failing(Rerun):
        def __call__(self, function: Any, prepared: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    task: Any = AlfaTask(Small(drop=0.0).train(), nn.CrossEntropyLoss(), "block", verbose=False)
    task.graphed = GraphedStep(task, Failing)
    with pytest.raises(RuntimeError, match=r"CUDA graph \(operation not permitted when stream is capturing\); leave"):
        train(task, EAGER_STEPS + 1)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["small", "resnet20s", "test_vit", "test_efficientnet"])
def test_a_captured_step_asks_the_device_nothing(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to be read: whatever the host asked for would raise."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # it does not know that device
    options = dict(OPTIONS[name])
    size, model = 8, Small(drop=0.0)
    if kind != "small":
        size = {"resnet20s": 32, "test_vit": 160, "test_efficientnet": 160}[kind]
        model = timm.create_model(kind, num_classes=10)
        options["blocks"] = "@stages" if isinstance(options["blocks"], list) else "@last"
    task = AlfaTask(model.train(), nn.CrossEntropyLoss(), verbose=False, **options)
    for _ in range(2):  # looks at how the model is called
        task(torch.randn(2, 3, size, size), torch.arange(2))["loss"].backward()
    model.to("meta")
    task.engine.eta.to(torch.device("meta"))
    images, target = torch.empty(2, 3, size, size, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    with task.graph_mode():
        result = task.compute(images, target)
        leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(result["loss"], leaves, allow_unused=True)
    assert all(gradient.device.type == "meta" for gradient in gradients if gradient is not None)
    assert sum(gradient is not None for gradient in gradients) > len(leaves) // 2


@pytest.mark.parametrize("name", OPTIONS)
def test_capture(name: str, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("there are no CUDA graphs without --device cuda")
    torch.manual_seed(1)
    start = Small(drop=0.0).train().to(device)
    results = []
    for graph in (True, False):
        model = copy.deepcopy(start)
        task = AlfaTask(model, nn.CrossEntropyLoss(), verbose=False, cuda_graph=graph, device=device, **OPTIONS[name])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        generator = torch.Generator().manual_seed(3)
        losses = []
        for step in range(12):
            count = 4 if step % 3 == 2 else 6
            images = torch.randn(count, 3, 8, 8, generator=generator).to(device)
            target = torch.randint(10, (count,), generator=generator).to(device)
            result = task(images, target)
            result["loss"].backward()
            losses.append(result["loss"].detach())
            optimizer.step()
            optimizer.zero_grad()
        results.append((torch.stack(losses), list(model.state_dict().values())))
        if graph:
            assert task.graphed is not None
            assert all(isinstance(c.capture, CudaCapture) for c in task.graphed._captured.values())
            assert task.graphed._captured
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
