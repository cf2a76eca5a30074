"""Names, globs, keywords, and what is said where they are wrong."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from toys import Nested, Repeated, Small

from timm_alfa import BlockError, list_blocks, resolve_blocks
from timm_alfa.blocks.resolve import blank_input, format_blocks


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return timm.create_model("resnet18", channels=(8, 8, 16, 16), num_classes=10)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=10)


def test_exact_names_in_the_order_asked_for(resnet: nn.Module) -> None:
    found = resolve_blocks(resnet, ["layer4", "layer2.0.bn2", "layer4"])
    assert list(found) == ["layer4", "layer2.0.bn2"]
    assert found["layer2.0.bn2"] is resnet.layer2[0].bn2
    assert list(resolve_blocks(resnet, "layer1")) == ["layer1"]


def test_globs_do_not_cross_a_dot(resnet: nn.Module) -> None:
    assert list(resolve_blocks(resnet, "layer?")) == ["layer1", "layer2", "layer3", "layer4"]
    assert list(resolve_blocks(resnet, "layer[34]")) == ["layer3", "layer4"]
    assert list(resolve_blocks(resnet, "layer1.*")) == ["layer1.0", "layer1.1"]
    assert list(resolve_blocks(resnet, "*.0.bn2")) == [f"layer{i}.0.bn2" for i in range(1, 5)]
    assert list(resolve_blocks(resnet, ["layer4", "layer?"])) == ["layer4", "layer1", "layer2", "layer3"]


def test_globs_pass_over_lists_without_a_forward() -> None:
    assert "listed" not in resolve_blocks(Repeated(), "*")
    assert list(resolve_blocks(Repeated(), "listed.*")) == ["listed.0", "listed.1"]


def test_keywords(resnet: nn.Module, vit: nn.Module) -> None:
    assert list(resolve_blocks(resnet, "@last")) == ["layer4"]
    assert list(resolve_blocks(resnet, "@stages")) == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert list(resolve_blocks(vit, "@last")) == [f"blocks.{len(vit.blocks) - 1}"]
    assert list(resolve_blocks(resnet, ["@last", "layer3"])) == ["layer4", "layer3"]


def _two_lists() -> nn.Module:
    model = nn.Module()
    model.small = nn.ModuleList([nn.ReLU(), nn.ReLU(), nn.ReLU(), nn.ReLU()])
    model.large = nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.ReLU(), nn.Tanh()]), nn.ReLU()])
    return model


def test_keywords_without_feature_info_take_the_outermost_list() -> None:
    model = nn.Module()
    model.inner = _two_lists().large
    assert list(resolve_blocks(model, "@stages")) == ["inner.0", "inner.1.1", "inner.2"]
    assert list(resolve_blocks(model, "@last")) == ["inner.2"]


def test_keywords_do_not_guess_between_lists() -> None:
    with pytest.raises(BlockError, match="'@last' needs a model with feature_info or one list of blocks"):
        resolve_blocks(_two_lists(), "@last")


def test_keywords_with_feature_info_that_leads_nowhere_take_the_list_with_most_parameters() -> None:
    model = _two_lists()
    model.feature_info = [{"module": "block.0"}, {"module": "block.1"}]  # timm's Twins and MViTv2
    assert list(resolve_blocks(model, "@stages")) == ["large.0", "large.1.1", "large.2"]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("layr4", r"no block is called 'layr4'; did you mean 'layer4'.*@last, @stages"),
        ("layer4.7", r"no block is called 'layer4.7'; did you mean 'layer4\.\d'"),
        ("", r"no block is called ''"),
        ([], r"no block was named; name one such as '@last'"),
        ("stages.*", r"'stages.\*' matches no block; did you mean"),
        ("*.*.*.*.*", r"matches no block"),
        ("@first", r"'@first' is no keyword; the keywords are @last, @stages"),
        (["layer4", "layer5"], r"no block is called 'layer5'"),
    ],
)
def test_wrong_names(resnet: nn.Module, blocks: str | list[str], message: str) -> None:
    with pytest.raises(BlockError, match=message) as caught:
        resolve_blocks(resnet, blocks)
    assert "\n" not in str(caught.value)


def test_a_list_without_a_forward_is_refused() -> None:
    with pytest.raises(BlockError, match=r"'listed' is a ModuleList, which has no forward.*such as 'listed\.\*'"):
        resolve_blocks(Repeated(), "listed")


def test_keywords_need_something_to_go_by() -> None:
    with pytest.raises(BlockError, match="'@last' needs a model with feature_info or one list of blocks"):
        resolve_blocks(nn.Sequential(nn.Linear(2, 2)), "@last")


def test_two_names_of_one_module() -> None:
    model = nn.Module()
    model.one = model.two = nn.ReLU()
    with pytest.raises(BlockError, match="no block is called 'two'"):
        resolve_blocks(model, ["one", "two"])


def test_list_blocks(resnet: nn.Module) -> None:
    infos = {info.name: info for info in list_blocks(resnet, (3, 64, 64))}
    assert list(infos)[:2] == ["conv1", "bn1"]
    assert infos["layer4"].shape == (16, 2, 2)
    assert infos["layer4"].is_stage
    assert not infos["layer4.0"].is_stage
    assert infos["layer4"].type == "Sequential"
    assert all(name.count(".") < 2 for name in infos)
    shares = [info.tail_share for info in infos.values()]
    assert shares == sorted(shares, reverse=True)
    # behind layer4 there is only the classifier: 16 x 10 multiply-adds
    assert 0 < infos["layer4"].tail_share < 1e-3
    assert infos["fc"].tail_share == 0.0
    deep = {info.name for info in list_blocks(resnet, (3, 64, 64), depth=None)}
    assert "layer2.0.bn2" in deep
    assert {info.name for info in list_blocks(resnet, (3, 64, 64), depth=1)} < set(infos)


def test_list_blocks_leaves_out_what_cannot_be_named() -> None:
    names = {info.name for info in list_blocks(Repeated(), (3, 8, 8))}
    assert names == {"listed.0", "listed.1", "nowhere", "head"}


def test_every_listed_block_resolves(vit: nn.Module) -> None:
    infos = list_blocks(vit, depth=None)
    assert list(resolve_blocks(vit, [info.name for info in infos])) == [info.name for info in infos]


def test_input_size_of_a_plain_module_is_needed() -> None:
    with pytest.raises(ValueError, match="input_size: needed for a model without a pretrained_cfg"):
        list_blocks(Small())
    assert list_blocks(Small(), (3, 8, 8))


def test_blank_input_follows_the_model() -> None:
    model = timm.create_model("test_resnet", in_chans=1, num_classes=3).double()
    blank = blank_input(model, batch_size=2)
    assert blank.shape == (2, 1, *model.pretrained_cfg["input_size"][1:])
    assert blank.dtype == torch.float64


def test_table() -> None:
    lines = format_blocks(list_blocks(Nested(), (3, 8, 8)), marked=["branches"]).splitlines()
    assert lines[0].split() == ["block", "type", "output", "tail", "FLOPs"]
    assert len({len(line) for line in lines}) == 1
    marked = [line for line in lines if line.startswith("> ")]
    assert len(marked) == 1
    assert "Branches" in marked[0]
    assert "((4, 4, 4), (5,))" in marked[0]
