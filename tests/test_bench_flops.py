"""What steps execute, in FLOPs, against what each method should, by hand; and AdvProp's price."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_alfa.bench import methods, step, variants
from timm_alfa.bench.flops import count_flops
from timm_alfa.bench.released import released
from timm_alfa.bench.variants import Variant

BATCH = 10
STEM, MIDDLE, HEAD = (2 * BATCH * n for n in (64 * 6 * 3 * 9, 64 * 8 * 3 * 9, 512 * 10))  # forward; two per product
ALL = STEM + MIDDLE + HEAD
PLAIN = 3 * ALL - STEM  # images need no gradient


def toy() -> nn.Module:
    """Blocks 0 and 1, and a head; the second convolution has two groups."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(512, 10)
    )


def images() -> Tensor:
    return torch.rand(BATCH, 3, 8, 8)


def test_each_operation_counts_forward_for_inputs_and_for_weights() -> None:
    model, x = toy(), images()
    assert count_flops(lambda: model(x)) == ALL
    assert count_flops(lambda: model(x).sum().backward()) == PLAIN
    leaf = x.requires_grad_()
    assert count_flops(lambda: torch.autograd.grad(model(leaf).sum(), leaf)) == 2 * ALL


def test_a_transposed_convolution() -> None:
    model, x = nn.ConvTranspose2d(4, 6, 2, stride=2), torch.rand(2, 4, 5, 5, requires_grad=True)
    forward = 2 * 2 * 25 * 4 * 6 * 4
    assert count_flops(lambda: model(x)) == forward
    assert count_flops(lambda: model(x).sum().backward()) == 3 * forward


def test_attention() -> None:
    query = torch.rand(1, 2, 7, 16)
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(query, query, query)) == 2 * 2 * 2 * 49 * 16


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (variants.plain(), PLAIN),
        (variants.alfa(["1"]), PLAIN + 3 * HEAD),  # 1 + t
        (variants.alfa(["1"], steps=5), PLAIN + 3 * HEAD + 4 * 2 * HEAD),
        (variants.alfa_wrapper(["1"]), PLAIN + 4 * HEAD),  # 1 + (4/3) t: the clean tail is walked twice
        (variants.alfa_wrapper(["1"], steps=5), PLAIN + 4 * HEAD + 4 * 2 * HEAD),
        # the piece between two blocks is walked once more, for the first one's attack
        (variants.l_alfa(["0", "1"]), PLAIN + 3 * (MIDDLE + HEAD) + 3 * HEAD + MIDDLE),
        (released(["1"]), PLAIN + STEM + MIDDLE + 2 * HEAD + 2 * HEAD),
        (released(["1"], steps=5), PLAIN + STEM + MIDDLE + 5 * 2 * HEAD + 2 * HEAD),
        (variants.noise(["1"]), PLAIN + 3 * HEAD),
        (variants.moex("0"), PLAIN),
        (variants.advprop(1), 2 * PLAIN + 2 * ALL),
        (variants.advprop(5), 2 * PLAIN + 5 * 2 * ALL),
        (variants.pgd_at(3), PLAIN + 3 * 2 * ALL),
        # two of ten images: the attack's pass is walked for the images and for the weights
        (variants.fast_advprop(), (8 * PLAIN + 2 * (PLAIN + 4 * ALL)) // 10),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_methods_execute_what_they_need_and_no_more(variant: Variant, expected: int) -> None:
    x, target = images(), torch.arange(BATCH)
    loss_of = variant.build(toy().train(), x, False)
    for _ in range(2):
        assert count_flops(lambda: loss_of(x, target).backward()) == expected


@pytest.mark.parametrize(("flags", "limit"), [(["--steps", "1"], 2.8), (["--steps", "5"], 5.4)])
def test_advprop_is_as_cheap_as_it_can_be(flags: list[str], limit: float) -> None:
    """In plain steps of a ResNet-50. All its layers but the classifier, 1 part in 2000 at 224, scale with the image."""
    args = step.build_parser().parse_args(["--methods", "advprop", *flags])
    model = timm.create_model("resnet50").train()
    x, target = torch.rand(2, 3, 64, 64), torch.arange(2)

    def flops(variant: Variant) -> int:
        loss_of = variant.build(copy.deepcopy(model), x, False)
        return count_flops(lambda: loss_of(x, target).backward())

    plain, _, advprop = methods.select(args, model)
    assert 0.95 * limit < flops(advprop) / flops(plain) <= limit
