"""Which modules run, what they return, and that nothing stays on the model."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from reference.plain_alfa import plain_alfa
from rng import rng_state, set_rng_state
from torch import Tensor, nn
from toys import FAMILIES, InPlace, Nested, Repeated, Shared, Small, UNet, WritesInput, batch, family
from untouched import picture

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper, BlockError, resolve_blocks
from timm_alfa.engine.replay import Replay
from timm_alfa.perturbation import Pgd


def _count_calls(model: nn.Module) -> Counter[str]:
    """Count how often each submodule's own forward computes, from now on."""
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():

        def forward(*args: Any, _name: str = name, _forward: Any = module.forward, **kwargs: Any) -> Any:
            counts[_name] += 1
            return _forward(*args, **kwargs)

        module.forward = forward
    return counts


def _replay(model: nn.Module, *blocks: str) -> Replay:
    return Replay(model, resolve_blocks(model, list(blocks)))


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_runs_once_and_tail_once_per_pass(name: str, steps: int, device: torch.device) -> None:
    model, images, target = family(name, device=device)
    last, middle = FAMILIES[name][3:]
    order = [module for module, _ in model.named_modules()]
    counts = _count_calls(model)
    alfa = AlfaWrapper(model, F.cross_entropy, middle, steps=steps)
    for _ in range(3):
        counts.clear()
        alfa(images, target)
        leaves = {key: counts[key] for key in counts if not any(module.startswith(f"{key}.") for module in order)}
        leaves.pop("")
        before = [key for key in leaves if key.startswith(f"{middle}.")]
        assert before
        assert {leaves[key] for key in before} == {1}
        behind = [key for key in leaves if key.startswith(f"{last}.")]
        assert behind
        # the clean pass, K - 1 further steps of the attack, and the adversarial pass
        assert {leaves[key] for key in behind} == {1 + steps}
        assert set(leaves.values()) == {1, 1 + steps}
        first = next(iter(leaves))
        assert leaves[first] == 1


def test_two_blocks_have_a_tail_each(device: torch.device) -> None:
    model = Small().to(device).train()
    images, target = batch(6, dtype=torch.float32, device=device)
    counts = _count_calls(model)
    AlfaWrapper(model, F.cross_entropy, ["stem", "block"], steps=3)(images, target)
    assert counts["stem.0"] == 1
    assert counts["block.0"] == 1 + 3
    assert counts["head"] == 1 + 3 + 3


def test_a_random_start_takes_one_pass_more(device: torch.device) -> None:
    model = Small().to(device).train()
    images, target = batch(6, dtype=torch.float32, device=device)
    counts = _count_calls(model)
    AlfaWrapper(model, F.cross_entropy, "block", steps=2, init="uniform", eps=0.1)(images, target)
    assert counts["block.0"] == 1
    assert counts["head"] == 1 + 2 + 1


@pytest.mark.parametrize("name", FAMILIES)
def test_replay_of_the_feature_itself_is_the_clean_output(name: str, device: torch.device) -> None:
    model, images, _ = family(name, device=device)
    last, middle = FAMILIES[name][3:]
    replay = _replay(model, last, middle)
    for _ in range(3):
        state = rng_state(device)
        plain = copy.deepcopy(model)(images)
        set_rng_state(state, device)
        recording = replay.record((images,))
        assert torch.equal(recording.output, plain)
        assert list(recording.features) == [last, middle]
        assert recording.order[middle] < recording.order[last]
        for block, feature in recording.features.items():
            again = replay.replay(recording, block, feature.rebuild(feature.tensors))
            assert torch.equal(again, plain), block


@pytest.mark.parametrize(
    ("model", "block"), [(UNet, "middle"), (Shared, "block"), (InPlace, "block"), (InPlace, "stem"), (InPlace, "skip")]
)
def test_replay_of_awkward_models(model: type[nn.Module], block: str, device: torch.device) -> None:
    module = model().to(device).train()
    images, _ = batch(12, dtype=torch.float32, device=device)
    replay = _replay(module, block)
    for _ in range(4):
        recording = replay.record((images,))
        output = recording.output.detach().clone()
        for _ in range(3):
            feature = recording.features[block]
            assert torch.equal(replay.replay(recording, block, feature.rebuild(feature.tensors)), output)


def test_in_place_writing_behind_modules_that_pass_their_input_on(device: torch.device) -> None:
    # What bn2 returned goes through an identity, and into an addition in place.
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.same, self.two, self.act = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4), nn.ReLU(True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            y = self.act(self.same(x))
            return self.two(y) + y

    torch.manual_seed(5)
    model, images = Model().to(device), torch.randn(3, 4).to(device)
    replay = _replay(model, "one")
    for _ in range(3):
        recording = replay.record((images,))
        assert torch.equal(recording.features["one"].tensors[0], model.one(images))
        value = recording.features["one"].tensors[0] + 1
        before = value.clone()
        expected = copy.deepcopy(model)
        expected.one = nn.Identity()
        assert torch.equal(replay.replay(recording, "one", value), expected(before.clone()))


def test_keyword_arguments_reach_the_replay(device: torch.device) -> None:
    class Model(Small):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    model = Model(drop=0.0).to(device)
    images, _ = batch(6, dtype=torch.float32, device=device)
    replay = _replay(model, "block")
    recording = replay.record((images,), {"scale": 3.0})
    feature = recording.features["block"]
    assert torch.equal(replay.replay(recording, "block", feature.rebuild(feature.tensors)), recording.output)


def test_hooks_of_the_user_run_where_their_module_runs(device: torch.device) -> None:
    model = Small().to(device).train()
    images, target = batch(6, dtype=torch.float32, device=device)
    calls: Counter[str] = Counter()
    model.stem.register_forward_hook(lambda *_: calls.update(["stem"]))
    model.head.register_forward_hook(lambda *_: calls.update(["head"]))
    AlfaWrapper(model, F.cross_entropy, "block")(images, target)
    assert calls == {"stem": 1, "head": 2}


def test_layers_that_are_dropped_at_random(device: torch.device) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
            self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                if torch.rand(()) < 0.5:
                    x = x + torch.tanh(layer(x))
            return self.head(torch.tanh(self.block(x)) + x)

    model, images = Model().to(device), torch.randn(3, 4).to(device)
    replay = _replay(model, "block")
    for seed in range(12):
        torch.manual_seed(seed)
        recording = replay.record((images,))
        feature = recording.features["block"]
        again = replay.replay(recording, "block", feature.rebuild(feature.tensors))
        torch.manual_seed(seed)
        assert torch.equal(recording.output, model(images))
        assert torch.equal(again, recording.output)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("twice", "'twice' runs several times per forward"),
        ("never", "'never' did not run in the model's forward"),
        ("integers", "'integers' returns no floating-point tensor"),
    ],
)
def test_blocks_that_cannot_be_replayed(block: str, message: str, device: torch.device) -> None:
    model = Repeated().to(device).train()
    images, _ = batch(6, dtype=torch.float32, device=device)
    before = picture(model)
    with pytest.raises(BlockError, match=message):
        _replay(model, block).record((images,))
    assert picture(model) == before


def test_reentrant_checkpointing_is_refused(device: torch.device) -> None:
    class Model(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.utils.checkpoint.checkpoint(lambda y: self.block(self.stem(y)), x, use_reentrant=True)
            return self.head(self.neck(x.mean(dim=(2, 3))))

    images, _ = batch(6, dtype=torch.float32, device=device)
    with pytest.raises(BlockError, match="'block' runs without gradient tracking"):
        _replay(Model().to(device).train(), "block").record((images.requires_grad_(),))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_gradient_checkpointing_changes_no_gradient(name: str, device: torch.device) -> None:
    model, images, target = family(name, device=device)
    last, middle = FAMILIES[name][3:]
    gradients = []
    for enable in (False, True):
        one = copy.deepcopy(model)
        one.set_grad_checkpointing(enable)
        torch.manual_seed(4)
        output = AlfaWrapper(one, F.cross_entropy, [last, middle], steps=2)(images, target)
        loss = sum(F.cross_entropy(part, target) for part in (output.output, *output.adv_outputs.values()))
        loss.backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fail_in", ["clean pass", "replay"])
def test_nothing_is_left_after_an_error_in_a_module(fail_in: str, device: torch.device) -> None:
    model = timm.create_model("test_resnet", num_classes=10).to(device).train()
    images, target = batch(32, dtype=torch.float32, device=device)
    alfa = AlfaWrapper(model, F.cross_entropy, "@last", steps=2)
    before = picture(model)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == (1 if fail_in == "clean pass" else 2):
            raise KeyError("from the tail")

    handle = model.global_pool.register_forward_hook(fail)
    state = rng_state(device)
    with pytest.raises(KeyError, match="from the tail"):
        alfa(images, target)
    handle.remove()
    assert picture(model) == before
    if fail_in == "replay":
        assert torch.equal(rng_state(device), state)  # no dropout: the clean pass draws nothing
    # and the next step works as if nothing had happened
    other = copy.deepcopy(model)
    found, expected = alfa(images, target), AlfaWrapper(other, F.cross_entropy, "@last", steps=2)(images, target)
    assert torch.equal(found.adv_outputs["layer4"], expected.adv_outputs["layer4"])


def test_nested_features_are_rebuilt(device: torch.device) -> None:
    model = Nested().to(device)
    images, _ = batch(8, dtype=torch.float32, device=device)
    recording = _replay(model, "branches").record((images,))
    feature = recording.features["branches"]
    assert [tuple(tensor.shape) for tensor in feature.tensors] == [(4, 4, 4, 4), (4, 5)]
    rebuilt = feature.rebuild([tensor + 1 for tensor in feature.tensors])
    assert rebuilt["scale"] == 2.0
    assert rebuilt["index"].tolist() == [0, 1, 2, 3]
    assert torch.equal(rebuilt["maps"][1], feature.tensors[1] + 1)


def test_copies_made_during_a_step_are_clean(device: torch.device) -> None:
    model = Small().to(device).train()
    images, target = batch(6, dtype=torch.float32, device=device)
    copies: list[nn.Module] = []
    before = picture(model)
    handle = model.head.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model)))
    AlfaWrapper(model, F.cross_entropy, "block", steps=2)(images, target)
    handle.remove()
    assert len(copies) == 3
    for one in copies:
        assert all("_compiled_call_impl" not in module.__dict__ for module in one.modules())
        assert list(one.state_dict()) == before["state"]
        one.head._forward_pre_hooks.clear()
        assert one.eval()(images).shape == (4, 10)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at its inputs
def test_compiled_parts_stay_compiled_and_agree(device: torch.device) -> None:
    model, images, target = family("vit", device=device)
    alfa = AlfaWrapper(model, F.cross_entropy, "blocks.1", steps=2)
    eager = copy.deepcopy(alfa)
    alfa.compile(backend="eager")
    before = {name: module._compiled_call_impl for name, module in model.named_modules()}
    assert before["blocks.1"] is not None
    for _ in range(2):
        state = rng_state(device)
        found = alfa(images, target)
        set_rng_state(state, device)
        expected = eager(images, target)
        torch.testing.assert_close(found.adv_outputs["blocks.1"], expected.adv_outputs["blocks.1"], rtol=1e-9, atol=0)
        assert {name: module._compiled_call_impl for name, module in model.named_modules()} == before


class _Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def test_a_model_that_writes_into_its_input_does_so_once(device: torch.device) -> None:
    images, target = batch(8, device=device)
    torch.manual_seed(3)
    model = WritesInput().double().to(device).train()
    safe = nn.Sequential(_Copy(), copy.deepcopy(model))
    alfa = AlfaWrapper(model, F.cross_entropy, "block", steps=3, norm="l2")
    task = AlfaTask(copy.deepcopy(model), F.cross_entropy, "block", steps=3, norm="l2", alpha=Pgd.alpha, verbose=False)
    expected = plain_alfa(safe, F.cross_entropy, images, target, ["1.block"], alpha=Pgd.alpha, steps=3, norm="l2")
    for _ in range(3):
        given, others = images.clone(), images.clone()
        result = AlfaLoss(F.cross_entropy)(alfa(given, target), target)
        assert torch.equal(given, images.clone().sub_(0.5).mul_(1.7))
        model.zero_grad()
        result.loss.backward()
        task.engine.model.zero_grad()
        found = task(others, target)["loss"]
        assert torch.equal(others, given)
        found.backward()
        for loss, of in ((result.loss, model), (found, task.engine.model)):
            torch.testing.assert_close(loss.detach(), expected.loss.detach(), rtol=1e-12, atol=0)
            for name, parameter in of.named_parameters():
                torch.testing.assert_close(parameter.grad, expected.gradients[f"1.{name}"], rtol=1e-9, atol=1e-14)


def test_a_model_that_begins_to_write_into_its_input_is_refused(device: torch.device) -> None:
    model = Small().to(device).train()
    alfa = AlfaWrapper(model, F.cross_entropy, "block")
    images, target = batch(8, dtype=torch.float32, device=device)
    alfa(images, target)
    model.stem.register_forward_pre_hook(lambda module, args: args[0].mul_(2) * 1)
    with pytest.raises(RuntimeError, match="wrote into its input in place, which it did not in the first step"):
        alfa(images, target)
