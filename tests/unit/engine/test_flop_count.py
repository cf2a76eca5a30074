"""What steps execute, in FLOPs, against what each method should, by hand; and AdvProp's price."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from timm_alfa import list_blocks
from timm_alfa.bench import methods, step, variants
from timm_alfa.bench.released import released
from timm_alfa.bench.variants import Variant
from timm_alfa.engine.flop_count import count_flops, flops_of

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


@pytest.fixture(params=["as it is", "without attention"])
def registry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's table of formulas, as other versions have it."""
    for operation in list(flop_registry):
        name = str(operation)
        if "attention" in name and request.param == "without attention":
            monkeypatch.delitem(flop_registry, operation)


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("registry")
def test_attention(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    shapes = ((3, 2, length, 16) for length in (lengths[0], lengths[1], lengths[1]))
    query, key, value = (torch.rand(*shape, dtype=dtype, requires_grad=True) for shape in shapes)
    attend = functools.partial(nn.functional.scaled_dot_product_attention, query, key, value)
    product = 2 * 3 * 2 * lengths[0] * lengths[1] * 16
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            assert count_flops(attend) == 2 * product
            # the fused kernel keeps no scores and computes them once more
            times = 2 + 4 + (backend == SDPBackend.FLASH_ATTENTION)
            assert count_flops(lambda: attend().sum().backward()) == times * product


@pytest.mark.parametrize(
    "name",
    [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
    ],
)
@pytest.mark.usefixtures("registry")
def test_attention_of_every_device(name: str) -> None:
    query, key, value = torch.rand(3, 4, 7, 16), torch.rand(3, 2, 5, 16), torch.rand(3, 2, 5, 8)  # grouped heads
    operation = getattr(torch.ops.aten, name)
    assert flops_of(operation, (query, key, value, 0.0), {}, None) == 2 * 3 * 4 * 7 * 5 * (16 + 8)
    backward = getattr(torch.ops.aten, f"{name}_backward", None)
    if backward is not None:
        found = flops_of(backward, (torch.rand(3, 4, 7, 8), query, key, value), {}, None)
        assert found == 2 * 3 * 4 * 7 * 5 * (3 * 16 + 2 * 8)


@pytest.mark.usefixtures("registry")
def test_the_shares_of_a_vit_count_its_attention() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    block = 2 * 17 * 48 * (3 * 48 + 48 + 8 * 48) + 4 * 17 * 17 * 48
    head = 2 * 48 * 1000
    whole = 2 * 16 * 48 * 192 + 2 * block + head
    shares = {info.name: info.tail_share for info in list_blocks(model, (3, 32, 32))}
    assert shares["blocks.0"] == pytest.approx((block + head) / whole, rel=1e-12)
    assert shares["blocks.1"] == pytest.approx(head / whole, rel=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.MultiheadAttention(16, 2, batch_first=True),
        nn.TransformerEncoderLayer(16, 2, 40, dropout=0.0, batch_first=True, activation="gelu"),
    ],
)
def test_fused_inference_counts_what_training_does(layer: nn.Module) -> None:
    x = torch.rand(3, 7, 16)
    run = (
        functools.partial(layer, x, x, x, need_weights=False)
        if isinstance(layer, nn.MultiheadAttention)
        else (functools.partial(layer, x))
    )
    training = count_flops(run)
    assert training >= 2 * 3 * 7 * 4 * 16 * 16 + 4 * 3 * 7 * 7 * 16
    layer.eval()
    with torch.no_grad():
        assert count_flops(run) == training


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layers(bidirectional: bool) -> None:
    layer, x = nn.LSTM(6, 5, batch_first=True, bidirectional=bidirectional), torch.rand(3, 7, 6, requires_grad=True)
    forward = (1 + bidirectional) * 2 * 3 * 7 * (4 * 5 * 6 + 4 * 5 * 5)
    assert count_flops(lambda: layer(x)) == forward
    assert count_flops(lambda: layer(x)[0].sum().backward()) == 3 * forward


def test_products_with_vectors() -> None:
    matrix, vector = torch.rand(3, 4), torch.rand(4)
    assert count_flops(lambda: matrix @ vector) == 2 * 12
    assert count_flops(lambda: torch.addmv(torch.rand(3), matrix, vector)) == 2 * 12
    assert count_flops(lambda: vector @ vector) == 2 * 4
    assert count_flops(lambda: torch.addbmm(torch.rand(3, 5), torch.rand(2, 3, 4), torch.rand(2, 4, 5))) == 2 * 120


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
def test_methods_execute_what_they_need_and_no_more(variant: Variant, expected: int, device: torch.device) -> None:
    x, target = images().to(device), torch.arange(BATCH, device=device)
    loss_of = variant.build(toy().to(device).train(), x, "eager")
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
