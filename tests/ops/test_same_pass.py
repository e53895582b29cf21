"""Weights that observers ask for before a call, and who gets them."""

from __future__ import annotations

import pytest
import torch

from mmattn.ops.attention import attention
from mmattn.ops.observe import AttentionCall, observing
from mmattn.ops.request import prepare
from mmattn.ops.same_pass import MapsAsked, SamePassMaps
from tests.maps.same_pass import giving_maps
from tests.ops.cases import Shape, generator_for, make_inputs

SHAPE = Shape(3, 6, 2, 5, 7, 11)


def inputs():
    return make_inputs(SHAPE, torch.float32, generator_for(3))


def request():
    return prepare(*inputs(), None, None, False, None, 0.0, False)


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        (MapsAsked(), True),
        (MapsAsked(range(1, 3), ((0,), (4, 2)), (5, 0)), True),
        (MapsAsked(range(1, 4)), False),
        (MapsAsked(range(2, 2)), False),
        (MapsAsked(range(-1, 1)), False),
        (MapsAsked(range(0, 3, 2)), False),
        (MapsAsked(range(0, 2), ((0,),)), False),
        (MapsAsked(heads=(6,)), False),
        (MapsAsked(heads=(-1,)), False),
        (MapsAsked(heads=(1, 1)), False),
        (MapsAsked(heads=()), False),
    ],
    ids=str,
)
def test_what_fits_a_call(asked, fits):
    assert asked.fits(request()) is fits


def test_keys_as_a_table():
    table, first = MapsAsked().table(request())
    assert (table.tolist(), first) == ([list(range(7))] * 3, 0)
    asked = MapsAsked(range(1, 3), ((4, 2), (6,)))
    table, first = asked.table(request())
    assert (table.tolist(), table.dtype, first) == ([[4, 2], [6, -1]], torch.int32, 1)
    assert asked.table(request())[0] is table, "made once"
    assert MapsAsked(range(2), ((), ())).table(request())[0].shape == (2, 0)
    weights = torch.arange(2 * 1 * 5 * 2.0).view(2, 1, 5, 2)
    maps = SamePassMaps(asked, weights, torch.zeros(3, 6, 5))
    assert torch.equal(maps.of_row(1), weights[0])
    assert torch.equal(maps.of_row(2), weights[1][..., :1])


def test_rows_that_share_their_keys():
    asked = MapsAsked(range(2, 6), ((1,), (1,), (2, 3), (2, 3)), (0,), average=True)
    assert asked.for_shared_keys(1) is asked
    shared = asked.for_shared_keys(2)
    assert shared is asked.for_shared_keys(2)
    assert shared is not None
    assert (shared.rows, shared.keys, shared.heads, shared.average) == (range(1, 3), ((1,), (2, 3)), (0,), True)
    assert asked.for_shared_keys(3) is None, "rows 3 and 4 want different keys of one text"
    everything = MapsAsked(range(3, 6)).for_shared_keys(3)
    assert everything is not None
    assert everything.rows == range(1, 2)


def test_the_outermost_that_asks_is_answered():
    query, key, value = inputs()
    calls: list[AttentionCall] = []
    first, second, too_many = MapsAsked(heads=(1,)), MapsAsked(), MapsAsked(heads=(6,))
    asked_about = []

    def ask(request, caller):
        asked_about.append((request.query.shape, caller))
        return first

    with (
        giving_maps(),
        observing(calls.append),
        observing(calls.append, lambda *_: None),
        observing(calls.append, lambda *_: too_many),
        observing(calls.append, ask),
        observing(calls.append, lambda *_: second),
    ):
        attention(query, key, value, caller="someone")
        attention(query, key, value, return_weights=True)
    assert asked_about == [(query.shape, "someone")], "weights that are returned need no maps"
    assert len(calls) == 10
    assert {id(call.maps.asked) for call in calls[:5] if call.maps is not None} == {id(first)}
    _, weights = attention(query, key, value, backend="eager", return_weights=True)
    assert calls[0].maps is not None
    torch.testing.assert_close(calls[0].maps.weights, weights[:, 1:2])
    assert all(call.maps is None for call in calls[5:])


def test_backends_that_have_no_maps_are_not_asked():
    calls: list[AttentionCall] = []
    with observing(calls.append, lambda *_: pytest.fail("asked")):
        attention(*inputs(), backend="eager")
    assert calls[0].maps is None
