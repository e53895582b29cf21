from __future__ import annotations

import pytest
import torch
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
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
    ours = SinusoidalPositions(embed_dim, 131)
    assert torch.equal(ours(torch.arange(131)), stock.weight.data)
    assert torch.equal(ours.span(7, 5, device=torch.device("cpu")), stock.weight.data[7:12])


def test_sinusoidal_positions_equal_m2m100() -> None:
    stock = M2M100SinusoidalPositionalEmbedding.get_embedding(131, 14, None)
    assert torch.equal(SinusoidalPositions(14, 131, "tensor2tensor")(torch.arange(131)), stock)
    with pytest.raises(UsageError, match="needs an even embed_dim, not 7"):
        SinusoidalPositions(7, 131, "tensor2tensor")
    with pytest.raises(UsageError, match="spacing 'mel' is unknown"):
        SinusoidalPositions(8, 131, "mel")  # type: ignore[arg-type]


def test_sinusoidal_positions_end_somewhere() -> None:
    positions = SinusoidalPositions(6, 11)
    with pytest.raises(UsageError, match=r"positions 9 to 11 were asked for, there are 11"):
        positions(torch.tensor([9, 11]))
    with pytest.raises(UsageError, match=r"positions 9 to 11 were asked for, there are 11"):
        positions.span(9, 3, device=torch.device("cpu"))
    with pytest.raises(UsageError, match=r"positions -2 to 0 were asked for"):
        positions.span(-2, 3, device=torch.device("cpu"))


def test_sinusoidal_positions_keep_shape_and_take_a_dtype() -> None:
    module = SinusoidalPositions(6, 13)
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
    with pytest.raises(UsageError, match="base is 0.0, it must be a positive number"):
        RotaryEmbedding(6, base=0.0)
