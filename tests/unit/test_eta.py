"""eta's projections against exact ones, and the SGD that learns it against torch's."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.simplex import project_simplex_by_sorting

from timm_alfa import project_hyperplane, project_simplex
from timm_alfa.eta import PROJECTIONS, Eta, l1_norm

ORDINARY = st.floats(-3, 3)
ANY_SIZE = st.one_of(
    ORDINARY,
    st.floats(-1e8, 1e8),
    st.sampled_from([0.0, 1e-300, -1e-300, 1e-12, 0.25, 1e8, -1e8]),  # ties are likely
)
VECTORS = st.lists(ANY_SIZE, min_size=1, max_size=12)


@given(VECTORS)
def test_simplex_agrees_with_sorting(values: list[float]) -> None:
    found = project_simplex(torch.tensor(values, dtype=torch.float64))
    expected = torch.tensor(project_simplex_by_sorting(values), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert bool((found >= 0).all())
    assert float(found.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        ([1.0, 1.0, 1.0, 1.0], [0.25, 0.25, 0.25, 0.25]),
        ([2.0, 0.0], [1.0, 0.0]),
        ([0.5, 0.5, -1.0], [0.5, 0.5, 0.0]),
        ([1e8, 1e8, -1e8], [0.5, 0.5, 0.0]),
        ([-7.0], [1.0]),
        ([0.0, 0.6, 0.9], [0.0, 0.35, 0.65]),
    ],
)
def test_simplex_by_hand(values: list[float], expected: list[float], device: torch.device) -> None:
    found = project_simplex(torch.tensor(values, dtype=torch.float64, device=device))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64, device=device))


@given(VECTORS)
def test_hyperplane_shifts_all_entries_alike_to_sum_one(values: list[float]) -> None:
    eta = torch.tensor(values, dtype=torch.float64)
    found = project_hyperplane(eta)
    assert float(found.sum()) == pytest.approx(1, abs=1e-6)
    shifts = found - eta
    assert float(shifts.max() - shifts.min()) <= 1e-6


@pytest.mark.parametrize("name", PROJECTIONS)
@given(values=VECTORS)
def test_projections_are_idempotent(name: str, values: list[float]) -> None:
    once = PROJECTIONS[name](torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(PROJECTIONS[name](once), once, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_keep_dtype_and_argument(name: str) -> None:
    eta = torch.tensor([0.9, 0.4, -0.2])
    before = eta.clone()
    found = PROJECTIONS[name](eta)
    assert found.dtype == torch.float32
    assert torch.equal(eta, before)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 2)])
def test_projections_want_a_vector(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"eta: expected a vector with at least one entry, found shape"):
        PROJECTIONS[name](torch.zeros(shape))


def test_start_values() -> None:
    assert Eta(["a", "b", "c", "d"]).values.tolist() == [1.0] * 4
    assert not Eta(["a"]).values.requires_grad
    learned = Eta(["a", "b", "c", "d"], learnable=True)
    assert learned.values.tolist() == [0.25] * 4
    assert learned.values.requires_grad


@pytest.mark.parametrize("eta_set", PROJECTIONS)
def test_steps_are_those_of_torch_sgd_and_a_projection(eta_set: str, device: torch.device) -> None:
    eta = Eta(["a", "b", "c"], learnable=True, eta_set=eta_set, lr=0.3, momentum=0.8).to(device)  # type: ignore[arg-type]
    parameter = torch.nn.Parameter(torch.full((3,), 1 / 3, dtype=torch.float64, device=device))
    optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=0.8)
    for _ in range(5):
        gradient = torch.randn(3, device=device)
        eta.step(gradient)
        parameter.grad = gradient.double()
        optimizer.step()
        with torch.no_grad():
            parameter.copy_(PROJECTIONS[eta_set](parameter))
    torch.testing.assert_close(eta.values, parameter, rtol=0, atol=1e-12)
    assert eta.values.requires_grad
    assert eta.values.is_leaf
    if eta_set == "simplex":
        assert bool((eta.values >= 0).all())


def test_l1_norm_has_subgradient_one_at_zero() -> None:
    eta = torch.tensor([0.5, 0.0, -0.25], requires_grad=True)
    norm = l1_norm(eta)
    norm.backward()
    assert norm.item() == 0.75
    assert eta.grad is not None
    assert eta.grad.tolist() == [1.0, 1.0, -1.0]


def test_gamma_moves_nothing_on_the_simplex() -> None:
    eta = Eta(["a", "b", "c"], learnable=True, eta_set="simplex")
    with torch.no_grad():
        eta.values.copy_(torch.tensor([0.7, 0.3, 0.0]))
    before = eta.values.detach().clone()
    (gradient,) = torch.autograd.grad(5 * l1_norm(eta.values), eta.values)
    eta.step(gradient)
    torch.testing.assert_close(eta.values.detach(), before)


def test_state_survives_saving_with_weights_only(device: torch.device) -> None:
    eta = Eta(["layer3", "layer4"], learnable=True).to(device)
    for _ in range(3):
        eta.step(torch.randn(2, device=device))
    buffer = io.BytesIO()
    torch.save(eta.state_dict(), buffer)
    buffer.seek(0)
    other = Eta(["layer3", "layer4"], learnable=True).to(device)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    gradient = torch.randn(2, device=device)
    eta.step(gradient)
    other.step(gradient)
    assert torch.equal(eta.values, other.values)
    assert torch.equal(eta.velocity, other.velocity)
    assert other.values.requires_grad


def test_state_is_a_copy() -> None:
    eta = Eta(["a", "b"], learnable=True)
    state = eta.state_dict()
    eta.step(torch.tensor([1.0, -1.0]))
    assert state["eta"].tolist() == [0.5, 0.5]
    assert state["velocity"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("blocks", [["layer3"], ["layer4", "layer3"], ["layer3", "layer2"]])
def test_state_of_other_blocks_is_refused(blocks: list[str]) -> None:
    state = Eta(["layer3", "layer4"], learnable=True).state_dict()
    with pytest.raises(ValueError, match=f"layer3, layer4 but this run perturbs {', '.join(blocks)}"):
        Eta(blocks, learnable=True).load_state_dict(state)
