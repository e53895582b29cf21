"""The stock models that swapping is compared with: each works, repeats itself and has weights that count."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.swap.zoo import FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def test_outputs_are_finite_vary_and_repeat(family):
    built = family.build()
    output = family.run(built)
    assert output.is_floating_point()
    assert torch.isfinite(output).all()
    assert output.std() > 0.01
    assert torch.equal(family.run(built), output)


def test_two_builds_are_equal_and_leave_the_random_state_alone(family):
    before = torch.random.get_rng_state()
    first, second = (family.model_of(family.build()).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_models_are_in_evaluation_mode_with_no_weight_all_zero(family):
    model = family.model_of(family.build())
    assert isinstance(model, nn.Module)
    assert not any(module.training for module in model.modules())
    assert [name for name, weight in model.named_parameters() if not weight.any()] == []
