"""Rotary positions: the paper's rotation, its relative property, precision, refusals."""

import math

import pytest
import torch

from mmattn.errors import UsageError
from mmattn.ops.rotary import apply_rotary, rotary_frequencies, rotary_tables, rotate


def test_is_the_rotation_of_the_paper():
    x = torch.randn(1, 1, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 5, 11])
    got = apply_rotary(x, positions, base=100.0)
    for row, position in enumerate(positions.tolist()):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            first, second = x[0, 0, row, pair].item(), x[0, 0, row, pair + 3].item()
            assert math.isclose(
                got[0, 0, row, pair].item(), first * math.cos(angle) - second * math.sin(angle), abs_tol=1e-14
            )
            assert math.isclose(
                got[0, 0, row, pair + 3].item(), second * math.cos(angle) + first * math.sin(angle), abs_tol=1e-14
            )


def test_scores_depend_on_distance_only():
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    positions = torch.tensor([3, 1, 4, 15, 9])
    near = apply_rotary(query, positions) @ apply_rotary(key, positions).mT
    far = apply_rotary(query, positions + 1000) @ apply_rotary(key, positions + 1000).mT
    torch.testing.assert_close(near, far, rtol=0, atol=1e-11)


def test_positions_per_row_and_shared_tables():
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    got = apply_rotary(x, positions)
    for row in range(2):
        assert torch.equal(got[row : row + 1], apply_rotary(x[row : row + 1], positions[row]))
    tables = rotary_tables(positions, rotary_frequencies(8))
    assert torch.equal(got, rotate(x, *tables))
    assert torch.equal(apply_rotary(x, positions[0])[:, :, 0], x[:, :, 0])


def test_far_positions_keep_their_precision_in_half_types():
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    position = torch.tensor([100_003])
    exact = apply_rotary(x.double(), position)
    error = (apply_rotary(x, position).double() - exact).abs().max()
    assert error <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max() * 1.01


def test_refusals():
    with pytest.raises(UsageError, match="head_dim is 5, it must be even"):
        rotary_frequencies(5)
    x = torch.zeros(2, 3, 5, 8)
    with pytest.raises(UsageError, match=r"positions \[4\] do not fit x \[2, 3, 5, 8\]"):
        apply_rotary(x, torch.arange(4))
    with pytest.raises(UsageError, match=r"positions \[3, 5\] do not fit"):
        apply_rotary(x, torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"use \[L\] or \[B, L\]"):
        rotary_tables(torch.zeros(2, 3, 5), rotary_frequencies(8))
