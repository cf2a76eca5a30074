"""Scaled gradients: nothing underflows that need not, nothing overflows that need not."""

from __future__ import annotations

import torch

from timm_alfa.engine.float16 import attack_gradients, is_float16


def test_which_outputs_are_float16() -> None:
    half, single = torch.zeros(1, dtype=torch.float16), torch.zeros(1)
    assert is_float16([single, half])
    assert not is_float16((single, torch.zeros(1, dtype=torch.bfloat16)))


def test_small_gradients_keep_their_direction(device: torch.device) -> None:
    feature = torch.tensor([1.0, -2.0], dtype=torch.float16, device=device, requires_grad=True)
    output = feature * torch.tensor([1.0, -1.0], dtype=torch.float16, device=device)
    (gradient,) = attack_gradients(output.float().sum() * 2.0**-26, [feature], output)  # float16 ends at 2**-24
    assert gradient is not None
    assert gradient.sign().tolist() == [1.0, -1.0]


def test_large_gradients_keep_their_direction(device: torch.device) -> None:
    feature = torch.tensor([1.0, -2.0], dtype=torch.float16, device=device, requires_grad=True)
    output = feature * torch.tensor([64.0, -1.0], dtype=torch.float16, device=device)
    for loss in (output.mean(), output.float().sum()):  # the first is float16 itself, the second overflows further down
        (gradient,) = attack_gradients(loss, [feature], output, retain_graph=True)
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        assert gradient.sign().tolist() == [1.0, -1.0]


def test_other_dtypes_are_not_scaled(device: torch.device) -> None:
    feature, other = (
        torch.tensor([1.0], device=device, requires_grad=True),
        torch.tensor([1.0], device=device, requires_grad=True),
    )
    gradients = attack_gradients((3 * feature).sum(), [feature, other], feature)
    assert gradients == (torch.tensor([3.0], device=device), None)
