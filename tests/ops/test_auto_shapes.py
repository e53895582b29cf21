"""A backend whose limits, or whose choice by "auto", depend on sizes: a table entry, seen here on a CPU."""

import dataclasses

import pytest
import torch

from mmattn.errors import BackendError
from mmattn.ops import limits, registry
from mmattn.ops.attention import attention
from mmattn.ops.backends import eager, triton
from mmattn.ops.limits import AutoShape, Backend, Limits
from mmattn.ops.observe import observing
from mmattn.ops.request import prepare, traits_of

KEY_MASK = torch.ones(2, 11, dtype=torch.bool)
SHAPE = AutoShape(
    capabilities=((9, 0),),
    dtypes=(torch.float32,),
    head_dims=(5, 7),
    keys=(3, 11),
    queries=(2, 13),
    heads=(4, 6),
)


@pytest.fixture
def table(monkeypatch):
    """A table with a backend "fast" in front, for at most 17 keys, which auto takes for `SHAPE` only."""
    fast = Backend(
        name="fast",
        run=eager.run,
        limits=Limits(dtypes={"cpu": limits.FLOATS}, grad_devices=("cpu",), max_keys=17),
        unusable=lambda device: None,
        auto_devices=("cpu",),
        auto_note="measured here",
        auto_shapes=(SHAPE,),
    )
    table = (fast, *registry.TABLE)
    monkeypatch.setattr(registry, "TABLE", table)
    monkeypatch.setattr(registry, "_BY_NAME", {row.name: row for row in table})
    monkeypatch.setattr(registry, "_CHOICES", {})
    monkeypatch.setattr(limits, "_capability", lambda device: (9, 0))


def call(batch=2, heads=3, queries=7, keys=11, head_dim=5, dtype=torch.float32, has_grad=False):
    query = torch.zeros(batch, heads, queries, head_dim, dtype=dtype, requires_grad=has_grad)
    key = torch.zeros(batch, heads, keys, head_dim, dtype=dtype)
    return query, key, key


def used(*tensors, **arguments):
    calls = []
    with observing(calls.append):
        attention(*tensors, **arguments)
    return calls[0].backend


@pytest.mark.usefixtures("table")
def test_auto_takes_it_where_it_was_measured_to_be_the_fastest():
    for sizes in ({}, {"keys": 3}, {"queries": 13}, {"head_dim": 7}, {"batch": 1, "heads": 4}, {"has_grad": True}):
        assert used(*call(**sizes)) == "fast", sizes
    for sizes in (
        {"keys": 2},
        {"keys": 12},
        {"queries": 1},
        {"queries": 14},
        {"head_dim": 6},
        {"batch": 1},
        {"heads": 4},
        {"dtype": torch.float64},
    ):
        assert used(*call(**sizes)) == "sdpa", sizes
        assert used(*call(**sizes), backend="fast") == "fast", sizes
    # The same features again, other sizes: what is remembered does not decide.
    assert used(*call()) == "fast"
    assert used(*call(), key_mask=KEY_MASK) == "sdpa"
    assert used(*call(), attn_mask=torch.ones(7, 11, dtype=torch.bool)) == "sdpa"


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("with_key_mask", "without", "masked"), [(True, False, True), (None, True, True)])
def test_shapes_that_were_measured_with_a_key_mask(with_key_mask, without, masked):
    shape = dataclasses.replace(SHAPE, with_key_mask=with_key_mask)
    boolean = torch.ones(7, 11, dtype=torch.bool)
    for attn_mask, key_mask, expected in ((None, None, without), (None, KEY_MASK, masked), (boolean, KEY_MASK, False)):
        request = prepare(*call(), attn_mask, key_mask, False, None, 0.0, False)
        assert shape.covers(request, traits_of(request)) is expected


@pytest.mark.usefixtures("table")
def test_other_cards_and_gradients(monkeypatch):
    shape = dataclasses.replace(SHAPE, with_grad=False)
    for has_grad, expected in ((False, True), (True, False)):
        request = prepare(*call(has_grad=has_grad), None, None, False, None, 0.0, False)
        assert shape.covers(request, traits_of(request)) is expected
    monkeypatch.setattr(limits, "_capability", lambda device: (8, 0))
    assert used(*call()) == "sdpa"


@pytest.mark.usefixtures("table")
def test_size_limits_are_reasons():
    tensors = call(keys=19)
    with pytest.raises(BackendError, match=r"'fast' cannot serve this call: 19 keys \(serves at most 17\)"):
        attention(*tensors, backend="fast")
    explanation = registry.explain(*tensors)
    assert explanation.chosen == "sdpa"
    assert explanation.reasons["fast"] == [
        "19 keys (serves at most 17)",
        "auto chooses it only where it was measured to be the fastest: measured here",
    ]
    assert registry.explain(*call()).chosen == "fast"
    assert "head_dim 1 to any, at most 17 keys" in str(registry.backends()["fast"])


UNETS = [(8, 4096, 40), (8, 1024, 80), (8, 256, 160), (10, 4096, 64), (20, 1024, 64)]


@pytest.mark.parametrize(("heads", "queries", "head_dim"), UNETS)
@pytest.mark.parametrize("batch", [2, 4])
def test_measured_shapes_of_the_triton_kernels(monkeypatch, batch, heads, queries, head_dim):
    """What "auto" would take once it is switched on; it is not."""
    monkeypatch.setattr(limits, "_capability", lambda device: (9, 0))
    row = triton.BACKEND
    assert row.auto_devices == ()

    def is_covered(keys):
        query = torch.empty(batch, heads, queries, head_dim, dtype=torch.bfloat16)
        key = torch.empty(batch, heads, keys, head_dim, dtype=torch.bfloat16)
        request = prepare(query, key, key, None, None, False, None, 0.0, False)
        return not row.auto_size_refusals(request, traits_of(request))

    assert is_covered(77)
    assert not is_covered(64)
    assert not is_covered(300)


@pytest.mark.parametrize(("heads", "keys", "head_dim"), [(16, 300, 72), (8, 77, 40), (10, 77, 64)])
def test_masked_shapes_wait_to_be_measured(monkeypatch, heads, keys, head_dim):
    """With a key mask "auto" takes none yet; the rows for them are ready."""
    monkeypatch.setattr(limits, "_capability", lambda device: (9, 0))
    row = dataclasses.replace(triton.BACKEND, auto_shapes=triton.TO_MEASURE)

    def is_covered(row, key_mask, attn_mask=None):
        query = torch.empty(2, heads, 4096, head_dim, dtype=torch.float16)
        key = torch.empty(2, heads, keys, head_dim, dtype=torch.float16)
        request = prepare(query, key, key, attn_mask, key_mask, False, None, 0.0, False)
        return not row.auto_size_refusals(request, traits_of(request))

    key_mask = torch.ones(2, keys, dtype=torch.bool)
    assert is_covered(row, key_mask)
    assert not is_covered(row, None)
    assert not is_covered(row, key_mask, torch.ones(4096, keys, dtype=torch.bool))
    assert not is_covered(triton.BACKEND, key_mask)
