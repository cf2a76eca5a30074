"""The random state: captured, restored, and put back whatever happens."""

from __future__ import annotations

import pytest
import torch

from timm_alfa.engine.randomness import RandomState


def capture(device: torch.device) -> RandomState:
    return RandomState(() if device.type == "cpu" else (device,))


def test_restore_repeats_the_draws(device: torch.device) -> None:
    state = capture(device)
    first = torch.rand(3, device=device), torch.randperm(5), torch.rand(2)
    torch.rand(100, device=device)
    state.restore()
    assert torch.equal(torch.rand(3, device=device), first[0])
    assert torch.equal(torch.randperm(5), first[1])
    assert torch.equal(torch.rand(2), first[2])


def test_a_captured_state_does_not_move(device: torch.device) -> None:
    state = capture(device)
    first = torch.rand(3, device=device)
    state.restore()
    torch.rand(50, device=device)
    state.restore()
    assert torch.equal(torch.rand(3, device=device), first)


def test_left_as_is_even_after_an_error(device: torch.device) -> None:
    torch.rand(7, device=device)
    state = capture(device)
    expected = torch.rand(3, device=device)

    def fail() -> None:
        with state.left_as_is():
            torch.rand(11, device=device)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.rand(3, device=device), expected)
