"""Steps and projections: hand-computed values, and properties that hold for every input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from timm_alfa import pgd


def test_linf_step_by_hand() -> None:
    gradient = torch.tensor([[3.0, -0.001, 0.0]])
    (delta,) = pgd.pgd_step(None, [gradient], alpha=0.5)
    assert delta.tolist() == [[0.5, -0.5, 0.0]]
    (delta,) = pgd.pgd_step([delta], [gradient], alpha=0.5, eps=0.75)
    assert delta.tolist() == [[0.75, -0.75, 0.0]]


def test_l2_step_by_hand_is_per_sample_over_all_tensors() -> None:
    gradients = [torch.tensor([[3.0], [0.0]]), torch.tensor([[[4.0]], [[2.0]]])]
    one, two = pgd.pgd_step(None, gradients, alpha=10.0, norm="l2")
    torch.testing.assert_close(one, torch.tensor([[6.0], [0.0]]))
    torch.testing.assert_close(two, torch.tensor([[[8.0]], [[10.0]]]))
    one, two = pgd.pgd_step([one, two], gradients, alpha=10.0, norm="l2", eps=5.0)
    torch.testing.assert_close(one, torch.tensor([[3.0], [0.0]]))
    torch.testing.assert_close(two, torch.tensor([[[4.0]], [[5.0]]]))


def test_a_sample_may_have_several_rows_in_one_of_the_tensors() -> None:
    outer, inner = torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0], [4.0], [5.0], [12.0]])  # two rows per sample
    one, two = pgd.pgd_step(None, [outer, inner], alpha=1.0, norm="l2")
    torch.testing.assert_close(one, torch.tensor([[3 / 5], [0.0]]))
    torch.testing.assert_close(two, torch.tensor([[0.0], [4 / 5], [5 / 13], [12 / 13]]))
    assert pgd.l2_norms([outer, inner]).tolist() == [5.0, 13.0]
    assert pgd.linf_norms([outer, inner]).tolist() == [4.0, 12.0]
    one, two = pgd.project([outer, inner], 6.5, "l2")
    torch.testing.assert_close(one, outer)
    torch.testing.assert_close(two, torch.tensor([[0.0], [4.0], [2.5], [6.0]]))


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1.0, 1e25, 1e37])
def test_l2_direction_has_length_one_at_any_scale(scale: float, device: torch.device) -> None:
    gradient = torch.tensor([[3.0, -4.0], [0.6, 0.8]], device=device) * scale * 0.5
    (way,) = pgd.direction([gradient], "l2")
    torch.testing.assert_close(way, torch.tensor([[0.6, -0.8], [0.6, 0.8]], device=device), rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", pgd.NORMS)
def test_zero_gradient_moves_nothing(norm: pgd.Norm, device: torch.device) -> None:
    (delta,) = pgd.pgd_step(
        None, [torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=device)], alpha=1.0, norm=norm, eps=0.5
    )
    assert delta.tolist() == [[0.0, 0.0], [0.5, 0.0]]


def test_a_sample_whose_gradient_is_not_a_number_stays_where_it_is(device: torch.device) -> None:
    gradient = torch.tensor([[3.0, 4.0], [1.0, float("nan")]], device=device)
    (delta,) = pgd.pgd_step(None, [gradient], alpha=1.0, norm="l2", eps=0.5)
    torch.testing.assert_close(delta[0], torch.tensor([0.3, 0.4], device=device))
    assert delta[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("norm", pgd.NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_features_have_float32_perturbations(
    dtype: torch.dtype, norm: pgd.Norm, device: torch.device
) -> None:
    feature = torch.randn(2, 3).to(device, dtype)
    start = [*pgd.zeros([feature]), *pgd.uniform([feature], 0.1)]
    step = pgd.pgd_step(None, [feature], alpha=0.5 / 255, norm=norm, eps=1.0)
    assert {part.dtype for part in (*start, *step)} == {torch.float32}
    assert pgd.zeros([feature.double()])[0].dtype == torch.float64


def test_a_step_leaves_its_arguments_alone() -> None:
    delta, gradient = torch.ones(2, 3), torch.randn(2, 3)
    before = delta.clone(), gradient.clone()
    pgd.pgd_step([delta], [gradient], alpha=0.5, eps=0.1)
    pgd.pgd_step(None, [gradient], alpha=0.5, eps=0.1, norm="l2")
    assert torch.equal(delta, before[0])
    assert torch.equal(gradient, before[1])


def test_scales_per_channel() -> None:
    alpha = torch.tensor([0.1, 0.2]).view(1, 2, 1)
    eps = torch.tensor([0.15, 1.0]).view(1, 2, 1)
    gradient = torch.tensor([[[1.0, -1.0], [-2.0, 0.0]]])
    (delta,) = pgd.follow(pgd.climb(pgd.zeros([gradient]), steps=2, alpha=alpha, eps=eps), lambda _: [gradient])
    torch.testing.assert_close(delta, torch.tensor([[[0.15, -0.15], [-0.4, 0.0]]]))


def test_uniform_start_fills_the_ball(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    (delta,) = pgd.uniform([torch.zeros(10_000, 2, device=device)], 0.3, generator)
    assert delta.abs().max() <= 0.3
    assert delta.min() < -0.299
    assert delta.max() > 0.299
    assert delta.mean().abs() < 0.01  # standard error 0.0012
    assert delta.std().item() == pytest.approx(0.3 / 3**0.5, rel=0.02)


def test_perturb_climbs_to_the_top_within_what_is_valid() -> None:
    # -(delta - 0.35)^2 rises towards 0.35; steps of 0.1 from 0, clipped to at most 0.25
    seen: list[float] = []

    def gradient_at(delta: list[Tensor]) -> list[Tensor]:
        seen.append(round(delta[0].item(), 6))
        return [-2 * (delta[0] - 0.35)]

    def valid(delta: list[Tensor]) -> list[Tensor]:
        return [part.clamp(max=0.25) for part in delta]

    (delta,) = pgd.follow(pgd.climb([torch.zeros(1, 1)], steps=4, alpha=0.1, valid=valid), gradient_at)
    assert seen == [0.0, 0.1, 0.2, 0.25]
    assert delta.item() == 0.25
    assert pgd.follow(pgd.climb([delta], steps=0, alpha=0.1), gradient_at)[0] is delta


@pytest.mark.parametrize("norm", pgd.NORMS)
@given(
    seed=st.integers(0, 2**31),
    eps=st.sampled_from([0.0, 1e-6, 0.5, 100.0]),
    scale=st.sampled_from([0.0, 1e-20, 1.0, 1e20]),
)
def test_projection_is_idempotent_and_inside(norm: pgd.Norm, seed: int, eps: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = [
        torch.randn(3, 4, generator=generator, dtype=torch.float64) * scale,
        torch.randn(3, 2, 2, generator=generator, dtype=torch.float64) * scale,
    ]
    once = pgd.project(delta, eps, norm)
    twice = pgd.project(once, eps, norm)
    lengths = pgd.linf_norms(once) if norm == "linf" else pgd.l2_norms(once)
    assert bool((lengths <= eps * (1 + 1e-12)).all())
    for one, two, original in zip(once, twice, delta, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
        assert bool((one * original >= 0).all())


def test_inside_points_stay_where_they_are() -> None:
    delta = [torch.tensor([[0.3, -0.4]], dtype=torch.float64)]
    for norm in pgd.NORMS:
        assert torch.equal(pgd.project(delta, 0.6, norm)[0], delta[0])
        assert torch.equal(pgd.project(delta, None, norm)[0], delta[0])


def test_norms_by_hand() -> None:
    delta = [torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[-4.0], [-1.0]])]
    torch.testing.assert_close(pgd.l2_norms(delta), torch.tensor([5.0, 3.0**0.5]))
    assert pgd.linf_norms(delta).tolist() == [4.0, 1.0]
