"""What half precision leaves of a perturbation: by hand on the grid, and at the first consumers of real models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Nested, Small, batch

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper
from timm_alfa.engine import half_precision
from timm_alfa.engine.half_precision import FirstConsumer, Rounding, survival
from timm_alfa.engine.replay import Replay
from timm_alfa.engine.tail_by_tail import StepResult, TailByTailStep

BF16, FP16 = torch.bfloat16, torch.float16

# bfloat16 keeps 8 binary digits: from 1 to 2 it is 2^-7 apart, from 0.5 to 1 2^-8, from 64 to 128 1/2.
BY_HAND = [  # feature, delta, whether the sum rounds to another number
    (1.0, 0.003, False),
    (1.0, 0.0045, True),
    (1.0, 2.0**-8, False),  # half way: to the even one
    (1 + 2.0**-7, 2.0**-8, True),  # the same, from the odd one
    (1.0, -0.0015, False),  # below 1 it is finer
    (1.0, -0.003, True),
    (0.5, 0.0015, False),
    (0.5, 0.0025, True),
    (100.0, 0.2, False),
    (100.0, -0.3, True),
    (0.0, 1e-9, True),
    (-1.0, -0.003, False),
]


def rounded(values: np.ndarray) -> np.ndarray:
    """Float32 to bfloat16 and back, to the nearest, half way to the even one: by the bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def share_by_bits(feature: Tensor, delta: Tensor) -> float:
    f, d = feature.detach().float().numpy(), delta.numpy()
    return float((d.astype(np.float64) ** 2)[rounded(f + d) != rounded(f)].sum() / (d.astype(np.float64) ** 2).sum())


def test_by_hand_on_the_grid() -> None:
    for feature, delta, moves in BY_HAND:
        assert survival([torch.tensor([feature])], [torch.tensor([delta])], [BF16]) == moves, (feature, delta)
    features, deltas, moves = (torch.tensor(column) for column in zip(*BY_HAND, strict=True))
    expected = deltas[moves].square().sum() / deltas.square().sum()
    torch.testing.assert_close(survival([features.to(BF16)], [deltas], [BF16]), expected)


def test_in_linf_it_is_the_share_of_entries_that_move() -> None:
    feature = torch.tensor([[1.0, 0.5], [0.25, 3.0]], dtype=BF16)
    assert survival([feature], [torch.full((2, 2), 0.0025)], [BF16]) == 0.5


@pytest.mark.parametrize("size", [0.5 / 255, 0.005])
def test_against_rounding_by_the_bits(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(64, 100, generator=generator)
    delta = size * torch.randn(64, 100, generator=generator)
    for f in (feature, feature.to(BF16)):  # off the grid, and on it
        found = survival([f], [delta], [BF16])
        assert found.shape == ()
        assert float(found) == pytest.approx(share_by_bits(f, delta), rel=1e-5)
        assert 0.05 < found < 0.98


def test_float16() -> None:
    feature, delta = torch.tensor([1.0, 0.25]), torch.full((2,), 2.0**-12)  # from 1 to 2 it is 2^-10 apart
    assert survival([feature], [delta], [FP16]) == 0.5


def test_several_tensors_count_together_each_with_its_own_rounding() -> None:
    feature, delta = [torch.ones(1), torch.ones(3), torch.ones(2)], [torch.full((n,), 0.002) for n in (1, 3, 2)]
    assert survival(feature, delta, [BF16, BF16, BF16]) == 0
    assert survival(feature, delta, [BF16, FP16, None]).item() == pytest.approx(5 / 6)


def test_nothing_and_no_number() -> None:
    assert survival([torch.ones(2)], [torch.zeros(2)], [BF16]) == 1
    assert survival([torch.ones(2)], [torch.tensor([torch.nan, 1.0])], [BF16]).isnan()


def test_no_host_read() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    with Watch(), pytest.raises(AssertionError):
        torch.ones(1).item()
    with Watch():
        survival([torch.ones(2)], [torch.full((2,), 0.002)], [BF16])


conv = nn.Conv2d(4, 4, 3)


@pytest.mark.parametrize(
    ("use", "dtype"),
    [
        (conv, BF16),
        (lambda x: conv(x[:, :, 1:].permute(0, 1, 3, 2)), BF16),
        (lambda x: conv(F.relu(x)), BF16),
        (lambda x: conv(F.relu_(x)), BF16),
        (lambda x: conv(F.relu6(x.clone(), inplace=True)), BF16),
        (lambda x: conv(F.max_pool2d(F.pad(x, (1, 1)), 2)), BF16),
        (lambda x: conv(torch.cat([x, x])), BF16),
        (lambda x: conv(x.double().float()), BF16),
        (lambda x: x.half(), FP16),
        (lambda x: F.linear(x, torch.ones(5, 8)), BF16),
        (lambda x: F.layer_norm(x, (8,)), None),
        (lambda x: conv(F.layer_norm(x, (8,))), None),
        (lambda x: conv(x + 1), None),
        (lambda x: conv(x.add_(1)), None),
        (lambda x: conv(torch.ones_like(x).add_(x)), None),
        (lambda x: x.mean(), None),
        (lambda x: conv(torch.ones(2, 4, 8, 8)), None),  # not used at all
        (lambda x: (x.mean(), conv(x)), None),  # the first counts
        (lambda x: (conv(x), x.mean()), BF16),
    ],
)
def test_the_first_consumer(use: Callable[[Tensor], Any], dtype: torch.dtype | None) -> None:
    value = torch.randn(2, 4, 8, 8)
    watch = FirstConsumer([value])
    with torch.autocast("cpu", BF16), watch:
        use(value)
    assert watch.dtypes == [dtype]


def test_the_first_consumer_of_each_tensor() -> None:
    wide, narrow, unused = torch.randn(2, 4, 8, 8), torch.randn(2, 4), torch.randn(2)
    watch = FirstConsumer([wide, narrow, unused])
    with torch.autocast("cpu", BF16), watch:
        conv(wide + narrow[:, :, None, None])
        F.linear(narrow, torch.ones(5, 4))
    assert watch.dtypes == [None, None, None]
    watch = FirstConsumer([wide, narrow, unused])
    with torch.autocast("cpu", BF16), watch:
        F.linear(narrow, torch.ones(5, 4))
        conv(wide + narrow[:, :, None, None])
    assert watch.dtypes == [None, BF16, None]


# What follows a block: a convolution casts; a layer norm, a residual addition and pooling take float32 as it is.
MODELS = [
    ("resnet20s", 32, {"layer1": BF16, "layer2.1": BF16, "layer3": None}),
    ("test_vit", 160, {"blocks.1": None, "blocks.5": None}),
    ("convnext_atto", 64, {"stages.1": None, "stages.2.blocks.1": BF16, "stages.3": None}),
    ("efficientnet_b0", 64, {"blocks.2": BF16, "blocks.6": BF16}),
]


def step_of(model: nn.Module, blocks: list[str], **options: Any) -> TailByTailStep:
    alfa = AlfaWrapper(model, F.cross_entropy, blocks, **options)
    return TailByTailStep(alfa.engine, AlfaLoss(F.cross_entropy))


def run(step: TailByTailStep, images: Tensor, dtype: torch.dtype | None, *, observed: bool = True) -> StepResult:
    """One step under autocast; None is without."""
    target = torch.arange(len(images)) % 10
    weights = dict.fromkeys(step.engine.blocks, 1.0)
    with torch.autocast("cpu", dtype or BF16, enabled=dtype is not None):
        result = step(images, target, 1.0, weights, (lambda *seen: seen) if observed else None)
    result.loss.backward()
    return result


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("name", "size", "expected"), MODELS, ids=[name for name, *_ in MODELS])
def test_consumers_and_shares_of_real_models(
    name: str, size: int, expected: dict[str, torch.dtype | None], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    step = step_of(model, list(expected), alpha="0.5%")
    found = run(step, torch.randn(4, 3, size, size), dtype)
    assert step.rounding.consumers == {block: [other and dtype] for block, other in expected.items()}
    assert step.rounding.dtype == dtype
    assert found.survives.keys() == expected.keys()
    for block, share in found.survives.items():
        (delta,), (feature,) = found.observed[block]
        assert delta.dtype == torch.float32
        if expected[block] is None:
            assert share == 1
        elif dtype is BF16:
            assert float(share) == pytest.approx(share_by_bits(feature, delta), rel=1e-5)
            assert 0.1 < share < 0.995


@pytest.mark.parametrize(("name", "size", "block"), [("resnet20s", 32, "layer3"), ("test_vit", 160, "blocks.1")])
def test_a_model_in_bfloat16_rounds_the_sum_itself(name: str, size: int, block: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train().to(BF16)
    step = step_of(model, [block], alpha="0.5%")
    found = run(step, torch.randn(4, 3, size, size, dtype=BF16), None)
    (delta,), (feature,) = found.observed[block]
    assert step.rounding.consumers == {block: [BF16]}
    assert float(found.survives[block]) == pytest.approx(share_by_bits(feature, delta), rel=1e-5)
    assert found.survives[block] < 1


def test_what_counts_is_what_is_added() -> None:
    """eta_i * delta_i of L-ALFA: a twentieth of the size survives less."""
    torch.manual_seed(0)
    model = timm.create_model("resnet20s", num_classes=10).train()
    step = step_of(model, ["layer1", "layer2"], alpha="1%", learnable=True)
    step.engine.eta.values.data = torch.tensor([0.95, 0.05], dtype=torch.float64)
    found = run(step, torch.randn(4, 3, 32, 32), BF16)
    for block, eta in zip(("layer1", "layer2"), (0.95, 0.05), strict=True):
        (delta,), (feature,) = found.observed[block]
        expected = share_by_bits(feature, torch.tensor(eta, dtype=torch.float64).float() * delta)
        assert float(found.survives[block]) == pytest.approx(expected, rel=1e-5)
    assert found.survives["layer2"] < 0.5 < found.survives["layer1"]


def test_several_tensors_of_a_feature() -> None:
    torch.manual_seed(0)
    model = Nested().train()
    alfa = AlfaWrapper(model, Nested.criterion, ["branches"], alpha=0.002)
    step = TailByTailStep(alfa.engine, AlfaLoss(Nested.criterion))
    found = run(step, batch(8, dtype=torch.float32)[0], BF16)
    assert step.rounding.consumers == {"branches": [None, None]}  # a mean, and a product behind a concatenation
    assert found.survives["branches"] == 1
    alfa = AlfaWrapper(model.to(BF16), Nested.criterion, ["branches"], alpha=0.0003)
    step = TailByTailStep(alfa.engine, AlfaLoss(Nested.criterion))
    found = run(step, batch(8, dtype=BF16)[0], None)
    assert step.rounding.consumers == {"branches": [BF16, BF16]}
    delta, feature = (
        torch.cat([part.detach().float().flatten() for part in parts]) for parts in found.observed["branches"]
    )
    assert float(found.survives["branches"]) == pytest.approx(share_by_bits(feature, delta), rel=1e-5)
    assert 0.1 < found.survives["branches"] < 0.9


def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Blocks of all replays from now on."""
    seen: list[str] = []
    replay = Replay.replay

    def noted(self: Replay, recording: Any, block: str, value: Any, **options: Any) -> Any:
        seen.append(block)
        return replay(self, recording, block, value, **options)

    monkeypatch.setattr(Replay, "replay", noted)
    return seen


def test_the_consumer_is_found_once_per_block_and_only_where_it_is_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(Small(drop=0.0).train(), ["stem", "block"])
    images = batch(8, dtype=torch.float32)[0]
    seen = replays(monkeypatch)
    assert run(step, images, BF16, observed=False).survives == {}
    assert seen == ["block", "stem"]
    seen.clear()
    assert len(run(step, images, BF16).survives) == 2
    assert seen == ["block", "block", "stem", "stem"]
    seen.clear()
    assert len(run(step, images, BF16).survives) == 2
    assert seen == ["block", "stem"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_happens_in_full_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(Small(drop=0.0).train().to(dtype), ["stem", "block"])
    seen = replays(monkeypatch)
    monkeypatch.setattr(half_precision, "survival", None)
    assert run(step, batch(8, dtype=dtype)[0], None).survives == {}
    assert seen == ["block", "stem"]
    assert step.rounding.dtype is None
    assert step.rounding.consumers == {}


@pytest.mark.parametrize("bn", ["clean", "shared", "aux"])
@pytest.mark.parametrize("model_dtype", [torch.float32, BF16])
def test_training_is_the_same_bit_for_bit(bn: Any, model_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, statistics, eta and what is drawn next, with dropout, whether the share is measured or not."""
    torch.manual_seed(0)
    first = Small().train().to(model_dtype)
    models = [first, copy.deepcopy(first)]
    images, target = batch(8, dtype=model_dtype)
    drawn, states = [], []
    for model, measured in zip(models, (True, False), strict=True):
        task = AlfaTask(model, F.cross_entropy, ["stem", "block"], bn=bn, learnable=True, steps=2, verbose=False)
        if not measured:
            monkeypatch.setattr(Rounding, "survival", lambda *args: None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            with torch.autocast("cpu", BF16, enabled=model_dtype == torch.float32):
                loss = task(images, target)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert ("delta_survives_stem" in task.epoch_metrics()) == measured
        drawn.append(torch.rand(3))
        aux = task.engine.aux
        states.append([
            *model.state_dict().values(), task.engine.eta.values.detach(),
            *(aux.state_dict().values() if aux is not None else ()),
        ])  # fmt: skip
    assert torch.equal(*drawn)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_parts_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code casts inside of its graphs: the replay that looks is eager."""
    torch.manual_seed(0)
    model = timm.create_model("resnet20s", num_classes=10).train()
    task = AlfaTask(model, F.cross_entropy, ["layer1", "layer3"], verbose=False)
    task.compile(backend="eager")
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    calls: list[bool] = []
    replay = Replay.replay
    monkeypatch.setattr(
        Replay, "replay", lambda self, *args, **options: (calls.append(_eager()), replay(self, *args, **options))[1]
    )
    with torch.autocast("cpu", BF16):
        task(images, target)["loss"].backward()
    assert task.step.rounding.consumers == {"layer1": [BF16], "layer3": [None]}
    assert calls == [False, True, False, True]


def _eager() -> bool:
    return torch._dynamo.eval_frame._stance.stance == "force_eager"
