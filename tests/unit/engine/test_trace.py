"""What one forward tells about the modules of a model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import Nested, Repeated, Small

from timm_alfa.engine.trace import evaluating, trace


def test_order_shapes_calls_and_costs_by_hand() -> None:
    # FLOPs per image: 2*4*8 = 64, 2*8*8 = 128, 2*8*4 = 64
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 4))
    visits = trace(model, torch.zeros(2, 4))
    assert [visit.name for visit in visits] == ["0", "1", "2.0", "2.1", "2", "3"]
    assert [visit.type for visit in visits] == ["Linear", "ReLU", "Linear", "ReLU", "Sequential", "Linear"]
    assert [visit.shapes for visit in visits] == [((8,),), ((8,),), ((8,),), ((8,),), ((8,),), ((4,),)]
    assert [visit.tail_share for visit in visits] == pytest.approx([0.75, 0.75, 0.25, 0.25, 0.25, 0.0])
    assert {visit.calls for visit in visits} == {1}


def test_modules_that_run_twice_or_never_or_return_other_things() -> None:
    visits = {visit.name: visit for visit in trace(Repeated(), torch.zeros(1, 3, 4, 4))}
    assert visits["twice"].calls == 2
    assert "never" not in visits
    assert "listed" not in visits
    assert visits["integers"].shapes == ()


def test_nested_outputs_have_several_shapes() -> None:
    visits = {visit.name: visit for visit in trace(Nested(), torch.zeros(2, 3, 8, 8))}
    assert visits["branches"].shapes == ((4, 4, 4), (5,))


def test_a_model_without_flops_has_no_tail() -> None:
    assert [visit.tail_share for visit in trace(nn.Sequential(nn.ReLU()), torch.zeros(1, 3))] == [0.0]


def test_a_weight_may_be_handed_from_module_to_module() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 4))
            self.mix = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(self.token)

    (visit,) = trace(Token(), torch.zeros(1, 4))
    assert (visit.name, visit.shapes) == ("mix", ((4,),))


def test_mode_buffers_random_state_and_modules_stay() -> None:
    model = Small().train()
    model.block.eval()
    model.extra = nn.RReLU()  # unused
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    state = torch.get_rng_state()
    trace(model, torch.zeros(1, 3, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modes_and_modules_come_back_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no")

    model = nn.Sequential(nn.Dropout(), Failing()).train()
    with pytest.raises(KeyError):
        trace(model, torch.zeros(1))
    assert all(module.training for module in model.modules())
    assert all("_compiled_call_impl" not in module.__dict__ for module in model.modules())


def test_evaluating_is_inside_only() -> None:
    model = nn.Sequential(nn.Dropout(), nn.ReLU()).train()
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
