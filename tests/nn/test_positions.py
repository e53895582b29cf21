from __future__ import annotations

import pytest
import torch
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from mmattn.errors import UsageError
from mmattn.nn import LearnedPositions, RotaryEmbedding, SinusoidalPositions


def test_learned_positions() -> None:
    positions = LearnedPositions(7, 5)
    picked = torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(positions(picked), positions.weight[picked])
    assert list(positions.state_dict()) == ["weight"]
    with pytest.raises(UsageError, match=r"positions 2 to 7 were asked for, there are 7 \(0 to max_length - 1\)"):
        positions(torch.tensor([2, 7]))


@pytest.mark.parametrize("embed_dim", [1, 6, 7, 512])
def test_sinusoidal_positions_equal_marian(embed_dim: int) -> None:
    stock = MarianSinusoidalPositionalEmbedding(131, embed_dim)
    stock.weight.data = stock.create_weight()
    ours = SinusoidalPositions(embed_dim)(torch.arange(131))
    # Marian takes the angles in float64 and rounds at the end; a float32 angle near 130 is right to 130 * 2^-23.
    torch.testing.assert_close(ours, stock.weight.data, rtol=0, atol=130 * 2**-22)


def test_sinusoidal_positions_keep_shape_and_take_a_dtype() -> None:
    module = SinusoidalPositions(6)
    out = module(torch.arange(10).view(2, 5), torch.bfloat16)
    assert out.shape == (2, 5, 6)
    assert out.dtype is torch.bfloat16
    assert torch.equal(module(torch.tensor([7]))[0], module(torch.arange(8))[7])


def test_rotary_tables() -> None:
    rotary = RotaryEmbedding(6, base=100.0).half()
    cos, sin = rotary(torch.tensor([0, 4]), torch.float64)
    angles = 4 * 100.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    assert cos.shape == sin.shape == (1, 1, 2, 3)
    torch.testing.assert_close(cos[0, 0], torch.stack([torch.ones(3, dtype=torch.float64), angles.cos()]))
    torch.testing.assert_close(sin[0, 0, 1], angles.sin())
    assert not rotary.state_dict()
    with pytest.raises(UsageError, match="head_dim is 5, it must be even"):
        RotaryEmbedding(5)
