"""How sizes are cut into blocks."""

import pytest

from mmattn.kernels.tiles import padded, power_of_two, tiles_of, tiles_up_to


@pytest.mark.parametrize(
    ("size", "tiles"),
    [
        (1, ((0, 16),)),
        (16, ((0, 16),)),
        (17, ((0, 32),)),
        (40, ((0, 32), (32, 16))),
        (72, ((0, 64), (64, 16))),
        (77, ((0, 64), (64, 16))),
        (96, ((0, 64), (64, 32))),
        (128, ((0, 128),)),
        (160, ((0, 128), (128, 32))),
        (257, ((0, 256), (256, 16))),
        (500, ((0, 512),)),
    ],
)
def test_tiles(size, tiles):
    assert tiles_of(size) == tiles


def test_tiles_cover_and_waste_little():
    for size in range(1, 600):
        tiles = tiles_of(size)
        end = 0
        for start, length in tiles:
            assert start == end
            assert length >= 16
            assert length & (length - 1) == 0
            end = start + length
        assert end == padded(size) >= size
        assert len(tiles) <= 2
        # Only the last block reaches beyond: kernels rely on it.
        assert tiles[-1][0] < size
        assert padded(size) <= power_of_two(max(16, size))
    assert max(padded(size) / size for size in range(64, 129)) < 1.5


def test_small_tiles():
    assert tiles_up_to(32, 160) == ((0, 32), (32, 32), (64, 32), (96, 32), (128, 32))
    assert tiles_up_to(32, 72) == ((0, 32), (32, 32), (64, 16))
    assert tiles_up_to(32, 23) == ((0, 32),)
