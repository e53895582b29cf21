from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmattn.errors import UsageError
from mmattn.nn import FeedForward, RMSNorm, TransformerLayer, make_norm

PLAIN = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu", "geglu", "swiglu"])
def test_equals_the_formula(activation) -> None:
    torch.manual_seed(10)
    module = FeedForward(7, 13, activation=activation, bias=activation != "swiglu")
    x = torch.randn(3, 5, 7)
    if activation in PLAIN:
        expected = module.down_proj(PLAIN[activation](module.up_proj(x)))
    else:
        gate = {"geglu": F.gelu, "swiglu": F.silu}[activation]
        expected = module.down_proj(gate(module.gate_proj(x)) * module.up_proj(x))
    assert torch.equal(module(x), expected)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(11)
    module = FeedForward(7, 13, dropout_p=0.5)
    x = torch.randn(2, 7)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_unknown_names_are_errors() -> None:
    with pytest.raises(UsageError, match="activation 'tanh' is unknown: use one of gelu, gelu_tanh, relu, silu, geglu"):
        FeedForward(7, 13, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="norm 'batch' is unknown: use 'layer' or 'rms'"):
        make_norm("batch", 7)  # type: ignore[arg-type]


def test_numbers_out_of_range_are_errors() -> None:
    with pytest.raises(UsageError, match="FeedForward: ffn_dim is 0, it must be at least 1"):
        FeedForward(7, 0)
    with pytest.raises(UsageError, match="FeedForward: dropout_p is -0.1, it must be at least 0 and at most 1"):
        FeedForward(7, 13, dropout_p=-0.1)
    with pytest.raises(UsageError, match="TransformerLayer: ffn_dropout_p is 10, it must be at least 0 and at most 1"):
        TransformerLayer(8, 2, 13, ffn_dropout_p=10)


def test_norms() -> None:
    assert isinstance(make_norm("rms", 7), RMSNorm)
    assert make_norm("layer", 7, 1e-12).eps == 1e-12
