"""The CIFAR ResNets: sizes by arithmetic, outputs against independent references, and timm's whole model interface."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from timm_alfa.models import CifarResNet, PadShortcut, SmallCifarResNet

SMALL = {"resnet20s": 3, "resnet32s": 5, "resnet44s": 7, "resnet56s": 9, "resnet110s": 18}
LARGE = {
    "resnet18_cifar": 11_173_962,
    "resnet34_cifar": 21_282_122,
    "resnet50_cifar": 23_520_842,
    "resnet101_cifar": 42_512_970,
    "resnet152_cifar": 58_156_618,
}
BOTH = ["resnet20s", "resnet18_cifar"]  # one per class


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def randomise(model: nn.Module) -> nn.Module:
    """Give norms statistics and affine parameters that a wrong graph cannot hide behind."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model


def reference_small(state: dict[str, torch.Tensor], x: torch.Tensor, blocks: int) -> torch.Tensor:
    """Section 4.2 of He et al. from plain functions: evaluation logits of the network with these weights."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, scale, shift = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, scale, shift)

    x = norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1").relu()
    for stage, width in enumerate((16, 32, 64), start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(norm(y, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"], padding=1)
            shortcut = torch.zeros_like(y)
            start = (width - x.shape[1]) // 2
            for channel in range(x.shape[1]):
                shortcut[:, start + channel] = x[:, channel, ::stride, ::stride]
            x = (norm(y, f"{name}.bn2") + shortcut).relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize(("name", "blocks"), SMALL.items())
def test_small_networks_have_the_size_of_the_paper(name: str, blocks: int) -> None:
    model = timm.create_model(name)
    convs = 27 * 16 + 2 * blocks * 9 * (16**2 + 32**2 + 64**2) - 9 * 16 * 32 - 9 * 32 * 64  # each widening halves one
    norms = 2 * (16 + 2 * blocks * (16 + 32 + 64))
    assert count(model) == convs + norms + 64 * 10 + 10
    layers = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    assert name == f"resnet{layers}s"


@pytest.mark.parametrize(("name", "millions"), [("resnet20s", 0.27), ("resnet56s", 0.85), ("resnet110s", 1.73)])
def test_sizes_as_quoted(name: str, millions: float) -> None:
    assert round(count(timm.create_model(name)) / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "parameters"), LARGE.items())
def test_large_networks_differ_from_timm_in_stem_and_classes_only(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        original = timm.create_model(name.removesuffix("_cifar"), num_classes=10)
    assert count(model) == parameters == count(original) - 64 * 3 * (7 * 7 - 3 * 3)
    shapes, theirs = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (model, original))
    assert list(shapes) == list(theirs)
    assert {k for k in shapes if shapes[k] != theirs[k]} == {"conv1.weight"}
    assert [n for n, _ in model.named_children()] == [n for n, _ in original.named_children()]


def test_option_a_by_hand() -> None:
    x = torch.arange(1.0, 19).view(1, 2, 3, 3)
    zero, first, second = [[0, 0], [0, 0]], [[1, 3], [7, 9]], [[10, 12], [16, 18]]
    assert PadShortcut(2, 4, stride=2)(x).tolist() == [[zero, first, second, zero]]
    assert PadShortcut(2, 5, stride=2)(x).tolist() == [[zero, first, second, zero, zero]]
    assert torch.equal(PadShortcut(2, 2)(x), x)


def test_option_a_cannot_narrow() -> None:
    with pytest.raises(ValueError, match=r"out_chs must be at least in_chs \(4\).* got 2"):
        PadShortcut(4, 2)


def test_small_network_against_reference() -> None:
    torch.manual_seed(0)
    model = randomise(timm.create_model("resnet20s")).double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference_small(model.state_dict(), x, blocks=3), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet50_cifar"])
def test_large_network_against_timm_with_another_stem(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(timm.create_model(name)).eval()
    original = timm.create_model(name.removesuffix("_cifar"), num_classes=10).eval()
    original.conv1, original.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    original.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), original(x))


def test_blocks_that_the_paper_perturbs_exist() -> None:
    small, large = timm.create_model("resnet56s"), timm.create_model("resnet18_cifar")
    names = ["act1", "layer1.3", "layer1.6", "layer2.0", "layer2.4", "layer2.7", "layer3.1", "layer3.5", "layer3.8"]
    for name in names:
        assert small.get_submodule(name)
    assert sum(len(getattr(small, f"layer{i}")) for i in (1, 2, 3)) == 27
    assert [len(getattr(large, f"layer{i}")) for i in (1, 2, 3, 4)] == [2, 2, 2, 2]


@pytest.mark.parametrize("output_stride", [2, 4, 8])
@pytest.mark.parametrize("name", [*BOTH, "resnet50_cifar"])
def test_feature_info_tells_the_truth(name: str, output_stride: int) -> None:
    model = timm.create_model(name, output_stride=output_stride).eval()
    outputs: dict[str, torch.Tensor] = {}
    for info in model.feature_info:
        hook = lambda _m, _i, y, key=info["module"]: outputs.update({key: y})  # noqa: E731
        model.get_submodule(info["module"]).register_forward_hook(hook)
    final = model.forward_features(torch.randn(1, 3, 32, 32))
    for info in model.feature_info:
        size = 32 // info["reduction"]
        assert outputs[info["module"]].shape == (1, info["num_chs"], size, size)
    last = model.feature_info[-1]
    assert last["num_chs"] == model.num_features
    assert last["reduction"] == min(output_stride, 4 if name == "resnet20s" else 8)
    assert torch.equal(final, outputs[last["module"]])


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
@pytest.mark.parametrize("name", BOTH)
def test_features_only_equals_forward_intermediates(name: str, feature_cls: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    final, expected = model.forward_intermediates(x)
    assert len(expected) == len(model.feature_info)
    assert torch.equal(final, model.forward_features(x))
    torch.manual_seed(0)  # the same weights again
    features = timm.create_model(name, features_only=True, feature_cls=feature_cls).eval()
    found = features(x)
    found = list(found.values()) if isinstance(found, dict) else found
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert features.feature_info.channels() == [f.shape[1] for f in expected]
    assert features.feature_info.reduction() == [32 // f.shape[2] for f in expected]


CHOICES = [(1, [3]), (2, [2, 3]), ([0], [0]), ([1], [1]), ([1, 3], [1, 3]), ([-2], [2]), (None, [0, 1, 2, 3])]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("indices", "chosen"), CHOICES)
def test_chosen_intermediates(indices: int | list[int] | None, chosen: list[int], checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet20s").eval()
    x = torch.randn(2, 3, 32, 32)
    everything = model.forward_intermediates(x, intermediates_only=True)
    model.set_grad_checkpointing(checkpointing)
    ran = set()
    for name in ("layer1", "layer2", "layer3"):
        model.get_submodule(name)[0].register_forward_hook(lambda _m, _i, _o, name=name: ran.add(name))
    final, found = model.forward_intermediates(x, indices, stop_early=True)
    assert len(found) == len(chosen)
    assert all(torch.equal(feature, everything[i]) for feature, i in zip(found, chosen, strict=True))
    assert torch.equal(final, found[-1])
    assert ran == {"layer1", "layer2", "layer3"} - {f"layer{i}" for i in range(chosen[-1] + 1, 4)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("indices", "chosen"), CHOICES)
def test_pruning(indices: int | list[int] | None, chosen: list[int], checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet20s").eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model.forward_intermediates(x, intermediates_only=True)[chosen[-1]]
    model.set_grad_checkpointing(checkpointing)
    assert model.prune_intermediate_layers(indices) == chosen
    assert [len(model.get_submodule(f"layer{i}")) for i in (1, 2, 3)] == [3 * (i <= chosen[-1]) for i in (1, 2, 3)]
    assert torch.equal(model(x), expected)
    assert model.num_features == model.head_hidden_size == expected.shape[1]
    assert model.num_classes == 0


def test_pruning_keeps_the_classifier_if_asked_and_if_it_fits() -> None:
    model = timm.create_model("resnet20s").eval()
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    assert model.prune_intermediate_layers([3], prune_head=False) == [3]
    assert torch.equal(model(x), before)
    assert model.prune_intermediate_layers([1], prune_head=False) == [1]
    assert model.num_classes == 0
    assert model(x).shape == (1, 16, 32, 32)


@pytest.mark.parametrize("name", BOTH)
def test_timm_arguments(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.1, global_pool="max").eval()
    x = torch.randn(4, 1, 32, 32)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, features.amax((2, 3)))
    assert torch.equal(model(x), model.fc(pooled))
    assert model(x).shape == (4, 7)
    assert (model.num_classes, model.in_chans, model.drop_rate) == (7, 1, 0.1)
    dropped = model.train().forward_head(torch.ones_like(features), pre_logits=True)
    kept = dropped[dropped != 0]
    assert 0 < kept.numel() < dropped.numel()
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.9))


@pytest.mark.parametrize("name", BOTH)
def test_classifier_can_be_replaced(name: str) -> None:
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.get_classifier() is model.fc
    assert model.get_classifier(name_only=True) == "fc"
    assert model(x).shape == (2, model.num_classes) == (2, 10)
    model.reset_classifier(5, "catavgmax")
    assert model(x).shape == (2, 5)
    model.reset_classifier(0, "avg")
    assert torch.equal(model(x), model.forward_features(x).mean((2, 3)))
    assert timm.create_model(name, num_classes=0)(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", BOTH)
def test_drop_path_grows_linearly(name: str) -> None:
    model = timm.create_model(name, drop_path_rate=0.2)
    blocks = [block for info in model.feature_info[1:] for block in model.get_submodule(info["module"])]
    rates = [block.drop_path.drop_prob if block.drop_path is not None else 0.0 for block in blocks]
    assert rates == pytest.approx([0.2 * i / (len(blocks) - 1) for i in range(len(blocks))])


@pytest.mark.parametrize("name", [*BOTH, "resnet50_cifar"])
def test_initialisation(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    zeroed = timm.create_model(name, zero_init_last=True)
    last = "bn3" if name == "resnet50_cifar" else "bn2"
    assert all((b.weight == 0).all() for n, b in zeroed.named_modules() if n.endswith(f".{last}"))
    assert (zeroed.layer1[0].bn1.weight == 1).all()


@pytest.mark.parametrize("name", BOTH)
def test_grad_checkpointing_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32)
    for m in (model, twin):
        m(x).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", BOTH)
def test_channels_last(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert model.forward_features(x).is_contiguous(memory_format=torch.channels_last)
    assert PadShortcut(3, 6, stride=2)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", BOTH)
def test_every_parameter_has_its_group(name: str) -> None:
    model = timm.create_model(name)
    blocks = sum(len(model.get_submodule(info["module"])) for info in model.feature_info[1:])
    for coarse, groups in ((False, blocks + 2), (True, len(model.feature_info) + 1)):  # stem, blocks, classifier
        members = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(members) == groups
        assert sorted(n for group in members.values() for n in group) == sorted(n for n, _ in model.named_parameters())
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.5)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert max(scales) == 1
    assert min(scales) == 0.5 ** (blocks + 1)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", BOTH)
def test_checkpoint_round_trip(name: str, suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=4)).eval()
    path = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    again = timm.create_model(name, num_classes=4, checkpoint_path=path).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", BOTH)
def test_ema_copy_is_independent(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    ema = ModelEmaV3(model, decay=0.5)
    x = torch.randn(1, 3, 32, 32)
    before = model(x)
    assert torch.equal(ema(x), before)
    with torch.no_grad():
        model.fc.bias += 2
    torch.testing.assert_close(ema(x), before)
    ema.update(model)
    torch.testing.assert_close(ema(x), before + 1)


def test_data_settings() -> None:
    for name, size in (("resnet20s", 8), ("resnet50_cifar", 4)):
        model = timm.create_model(name)
        data = resolve_model_data_config(model)
        assert data["input_size"] == (3, 32, 32)
        assert data["crop_pct"] == 1.0
        assert data["mean"] == (0.4914, 0.4822, 0.4465)
        assert data["std"] == (0.2470, 0.2435, 0.2616)
        assert data["interpolation"] == "bicubic"
        cfg = model.pretrained_cfg
        assert (cfg["architecture"], cfg["num_classes"], cfg["pool_size"]) == (name, 10, (size, size))
        assert model.forward_features(torch.zeros(1, *cfg["input_size"])).shape[-2:] == cfg["pool_size"]
        assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
        assert isinstance(model.get_submodule(cfg["classifier"]), nn.Linear)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("resnet20s", pretrained=True)


def test_registration_adds_ten_names_and_overrides_none() -> None:
    script = """
import importlib, warnings
import timm
entrypoints = {name: timm.model_entrypoint(name) for name in timm.list_models()}
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import timm_alfa.models
    importlib.import_module("timm_alfa.models")
assert all(timm.model_entrypoint(name) is fn for name, fn in entrypoints.items())
print(*sorted(set(timm.list_models()) - set(entrypoints)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted([*SMALL, *LARGE])
    assert timm.list_models("resnet*", module="resnet_cifar") == timm.list_models(module="resnet_cifar")
    assert set(timm.list_models(module="resnet_cifar")) == {*SMALL, *LARGE}


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet20s", channels=(8, 16, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, target = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(images), target).backward()
        optimizer.step()
    assert (model(images).argmax(1) == target).all()


def test_wrong_arguments_name_the_rule_and_the_value() -> None:
    block = timm.models.resnet.BasicBlock
    with pytest.raises(ValueError, match=r"output_stride must be 2, 4 or 8 .* got 32"):
        CifarResNet(block, (1, 1, 1, 1), output_stride=32)
    with pytest.raises(ValueError, match="three entries each"):
        SmallCifarResNet(block, (1, 1, 1, 1))
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        timm.create_model("resnet20s").forward_intermediates(torch.zeros(1, 3, 8, 8), output_fmt="NLC")
    with pytest.raises(TypeError, match="stem_type"):
        timm.create_model("resnet20s", stem_type="deep")
