"""Draws are pure functions of what they are for."""

from __future__ import annotations

import numpy as np

from mmattn.data.draws import draw_generator, uniform_rows


def test_equal_arguments_give_equal_draws_and_others_do_not():
    first = draw_generator(3, 1, 7, "texts").random(5)
    assert np.array_equal(first, draw_generator(3, 1, 7, "texts").random(5))
    for other in ((4, 1, 7, "texts"), (3, 2, 7, "texts"), (3, 1, 8, "texts"), (3, 1, 7, "view")):
        assert not np.array_equal(first, draw_generator(*other).random(5))


def test_draws_stay_the_same_from_version_to_version():
    # Checked in, because a change would silently change every run that is resumed.
    assert draw_generator(0, 0, 0, "x").integers(0, 1000, 3).tolist() == [538, 540, 984]
    assert np.round(uniform_rows(0, "x", [0, 1], 2), 6).tolist() == [[0.302388, 0.864811], [0.786758, 0.059871]]


def test_rows_depend_on_their_own_example_only():
    rows = uniform_rows(1, "a", range(100), 11)
    assert np.array_equal(rows[[17, 3]], uniform_rows(1, "a", [17, 3], 11))
    assert np.array_equal(rows[:, :4], uniform_rows(1, "a", range(100), 4))


def test_rows_are_uniform_and_uncorrelated():
    rows = uniform_rows(5, "b", range(20_000), 7)
    assert rows.min() >= 0
    assert rows.max() < 1
    assert np.abs(rows.mean(axis=0) - 0.5).max() < 0.01
    correlation = np.corrcoef(np.concatenate([rows.T, np.roll(rows, 1, axis=0).T]))
    assert np.abs(correlation - np.eye(14)).max() < 0.03
