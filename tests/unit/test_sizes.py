"""Sizes as a share of the feature: the definition by hand, parity with plain hooks, odd features, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import gradient_errors
from reference.plain_alfa import plain_alfa
from rng import rng_state, set_rng_state
from torch import Tensor, nn
from toys import FAMILIES, Nested, batch, family

from timm_alfa import AlfaLoss, AlfaTask, AlfaWrapper, pgd
from timm_alfa.peers import NoiseTask
from timm_alfa.sizes import Relative, describe_size, l2_norm, parse_size, rms


def test_the_scale_by_hand() -> None:
    feature = torch.tensor([[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    (scale,) = rms([feature])
    assert scale.tolist() == [[2.5], [1.0]]
    assert l2_norm([feature, 2 * feature]).tolist() == pytest.approx([125.0**0.5, 20.0**0.5])


def test_padding_does_not_count_and_zeros_of_a_feature_map_do() -> None:
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]])
    assert rms([tokens])[0].flatten().tolist() == pytest.approx([2.0**0.5])
    assert rms([tokens.view(1, 4, 2, 1)])[0].flatten().tolist() == [1.0]


def test_rows_of_one_sample_share_a_scale() -> None:
    inner, outer = torch.tensor([[1.0], [3.0], [0.0], [2.0]]), torch.tensor([[6.0], [8.0]])
    assert rms([inner, outer])[0].flatten().tolist() == pytest.approx([5.0**0.5, 5.0**0.5, 2.0**0.5, 2.0**0.5])
    assert rms([inner, outer])[1].flatten().tolist() == [6.0, 8.0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(4, 6, 5, 5), (4, 5, 5, 6), (4, 7, 6), (4, 9), (4, 3, 4, 4, 4)])
def test_delta_has_the_share_of_the_features_rms(shape: tuple[int, ...], norm: Any, device: torch.device) -> None:
    feature, gradient = (torch.randn(shape, dtype=torch.float64).to(device) for _ in range(2))
    (delta,) = pgd.pgd_step(None, [gradient], alpha=pgd.absolute(Relative(0.02), [feature]), norm=norm)
    share = delta.flatten(1).norm(dim=1) / feature.flatten(1).norm(dim=1)
    torch.testing.assert_close(share, torch.full_like(share, 0.02), rtol=1e-12, atol=0)


@pytest.mark.parametrize("front", ["wrapper", "task"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [None, 0.05])
@pytest.mark.parametrize("name", FAMILIES)
def test_parity(name: str, eps: float | None, norm: Any, front: str, device: torch.device) -> None:
    model, images, target = family(name, device=device)
    blocks = list(FAMILIES[name][3:])
    bound = None if eps is None else f"{100 * eps:g}%"
    options: dict[str, Any] = {"alpha": "2%", "eps": bound, "norm": norm, "steps": 3}
    state = rng_state(device)
    if front == "wrapper":
        loss = AlfaLoss(F.cross_entropy)(AlfaWrapper(model, F.cross_entropy, blocks, **options)(images, target), target)
        loss.loss.backward()
    else:
        AlfaTask(model, F.cross_entropy, blocks, verbose=False, **options)(images, target)["loss"].backward()
    set_rng_state(state, device)
    expected = plain_alfa(
        model, F.cross_entropy, images, target, blocks, alpha=0.02, steps=3, eps=eps, norm=norm, relative=True
    )
    for parameter, error in gradient_errors(model, expected.gradients).items():
        assert error < 1e-9, parameter


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_parity_of_nested_outputs(norm: Any, device: torch.device) -> None:
    images, target = batch(12, device=device)
    model = Nested().double().to(device).train()
    expected = plain_alfa(
        model, Nested.criterion, images, target, ["branches"], alpha=0.1, steps=2, eps=0.12, norm=norm, relative=True
    )
    task = AlfaTask(model, Nested.criterion, "branches", alpha="10%", eps="12%", steps=2, norm=norm, verbose=False)
    task(images, target)["loss"].backward()
    for parameter, error in gradient_errors(model, expected.gradients).items():
        assert error < 1e-9, parameter


class Scaled(nn.Module):
    """A feature of any size, in any type."""

    def __init__(self, factor: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 4, 1), nn.Identity(), nn.Linear(4, 10)
        self.factor, self.dtype = factor, dtype

    def forward(self, x: Tensor) -> Tensor:
        x = self.block((self.stem(x) * self.factor).to(self.dtype))
        return self.head(x.float().mean(dim=(2, 3)) / max(self.factor, 1.0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("factor", "dtype"),
    [(0.0, torch.float32), (1e4, torch.float16), (1e-4, torch.float16), (1.0, torch.bfloat16), (1e15, torch.float32)],
)
def test_zero_large_and_small_features(factor: float, dtype: torch.dtype, norm: Any, device: torch.device) -> None:
    images, target = batch(8, dtype=torch.float32, device=device)
    model = Scaled(factor, dtype).to(device).train()
    alfa = AlfaWrapper(model, F.cross_entropy, "block", alpha="2%", eps="3%", steps=2, norm=norm)
    output = alfa(images, target)
    delta, feature = output.deltas["block"].double(), (model.stem(images) * factor).to(dtype).double()
    assert bool(delta.isfinite().all())
    assert bool(output.adv_outputs["block"].isfinite().all())
    if factor:
        share = delta.flatten(1).norm(dim=1) / feature.flatten(1).norm(dim=1)
        assert bool((share <= 0.0301).all())
        assert bool((share > 0.005).all())
    else:
        assert not delta.any()


def test_a_share_is_the_same_however_the_feature_is_scaled(device: torch.device) -> None:
    images, target = batch(8, device=device)
    found = []
    for factor in (1.0, 64.0):
        torch.manual_seed(0)
        model = Scaled(factor, torch.float64).double().to(device).train()
        model.head.float()
        output = AlfaWrapper(model, F.cross_entropy, "block", alpha="2%")(images, target)
        found.append(output.deltas["block"] / factor)
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def test_noise_has_the_share_of_the_features_rms(device: torch.device) -> None:
    model, images, target = family("resnet", batch_size=2, device=device)
    task = NoiseTask(model, F.cross_entropy, "layer3", sigma="5%", verbose=False)
    task(images, target)["loss"].backward()
    ratio = task.epoch_metrics()["delta_ratio_layer3"]
    assert ratio == pytest.approx(0.05, rel=0.1)
    assert task.summary_lines((3, 64, 64))[0].startswith("Noise: sigma 5%, ")


def test_a_random_start_is_within_the_ball(device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    alfa = AlfaWrapper(model, F.cross_entropy, "layer4", alpha=1e-9, eps="4%", init="uniform")
    features: list[Tensor] = []
    handle = model.layer4.register_forward_hook(lambda module, args, output: features.append(output.detach()))
    delta = alfa(images, target).deltas["layer4"]
    handle.remove()
    largest = delta.abs().flatten(1).amax(dim=1) / (0.04 * rms([features[0]])[0].flatten())
    assert bool((largest <= 1 + 1e-9).all())
    assert bool((largest > 0.95).all())


def test_eta_multiplies_a_share(device: torch.device) -> None:
    model, images, target = family("resnet", device=device)
    task = AlfaTask(model, F.cross_entropy, "@stages", alpha="2%", learnable=True, verbose=False)
    assert task(images, target)["loss"].isfinite()
    assert "PGD-1, alpha 2%, linf, unbounded" in task.summary_lines((3, 64, 64))[0]


@pytest.mark.parametrize("text", ["2 %", "-1%", "200%", "%", "nan%", "inf%", "1e1%", "2%%", "two%", " 2%", "2", ""])
def test_text_that_is_no_share(text: str) -> None:
    for name, build in (
        ("alpha", lambda: AlfaWrapper(nn.Sequential(nn.ReLU()), F.cross_entropy, "0", alpha=text)),
        ("eps", lambda: AlfaWrapper(nn.Sequential(nn.ReLU()), F.cross_entropy, "0", eps=text)),
        ("sigma", lambda: NoiseTask(nn.Sequential(nn.ReLU()), F.cross_entropy, "0", sigma=text)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            build()


def test_zero_as_a_share() -> None:
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match="alpha: expected a finite step size above 0"):
        AlfaWrapper(model, F.cross_entropy, "0", alpha="0%")
    AlfaWrapper(model, F.cross_entropy, "0", eps="0%")
    NoiseTask(model, F.cross_entropy, "0", sigma="0%", verbose=False)


@pytest.mark.parametrize("value", [None, True, [0.1]])
def test_values_that_are_no_size(value: Any) -> None:
    with pytest.raises(TypeError, match="alpha: expected a number, or a share such as '2%', found"):
        AlfaWrapper(nn.Sequential(nn.ReLU()), F.cross_entropy, "0", alpha=value)


def test_text_and_back() -> None:
    assert parse_size("2%") == parse_size(Relative(0.02)) == Relative(0.02)
    assert [str(parse_size(text)) for text in ("2%", "0.5%", ".25%", "100%", "12.%")] == [
        "2%",
        "0.5%",
        "0.25%",
        "100%",
        "12%",
    ]
    assert describe_size(0.5 / 255) == "0.5/255"
