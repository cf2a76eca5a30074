"""The random state: captured, restored, and put back whatever happens."""

from __future__ import annotations

import pytest
import torch

from timm_alfa.engine.randomness import RandomState


def test_restore_repeats_the_draws() -> None:
    state = RandomState()
    first = torch.rand(3), torch.randperm(5)
    torch.rand(100)
    state.restore()
    assert torch.equal(torch.rand(3), first[0])
    assert torch.equal(torch.randperm(5), first[1])


def test_a_captured_state_does_not_move() -> None:
    state = RandomState()
    first = torch.rand(3)
    state.restore()
    torch.rand(50)
    state.restore()
    assert torch.equal(torch.rand(3), first)


def test_left_as_is_even_after_an_error() -> None:
    torch.rand(7)
    state = RandomState()
    expected = torch.rand(3)

    def fail() -> None:
        with state.left_as_is():
            torch.rand(11)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.rand(3), expected)
