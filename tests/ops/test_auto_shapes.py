"""A backend whose limits, or whose choice by "auto", depend on sizes: a table entry, seen here on a CPU."""

import dataclasses
import warnings

import pytest
import torch

from mmattn.errors import BackendError
from mmattn.ops import limits, registry
from mmattn.ops.attention import attention
from mmattn.ops.backends import eager, triton, triton_decode, varlen
from mmattn.ops.limits import AutoShape, Backend, Limits
from mmattn.ops.observe import observing
from mmattn.ops.replay import is_replayed, replayed
from mmattn.ops.request import prepare, traits_of

KEY_MASK = torch.ones(2, 11, dtype=torch.bool)
SHAPE = AutoShape(
    capabilities=((9, 0),),
    dtypes=(torch.float32,),
    head_dims=(5, 7),
    keys=(3, 11),
    queries=(2, 7, 13),
    heads=(4, 6),
)


def compiling(chosen, **options):
    """Compiled attention that adds to a list, for each graph, what serves it."""

    def keep(graph, _):
        is_torch = any("scaled_dot_product" in str(node.target) for node in graph.graph.nodes)
        chosen.append("sdpa" if is_torch else "fast")
        return graph

    return torch.compile(attention, fullgraph=True, backend=keep, **options)


@pytest.fixture
def table(monkeypatch):
    """A table with a backend "fast" in front, for at most 17 keys, which auto takes for one shape only: `SHAPE`, or
    what it is called with."""
    torch.compiler.reset()
    fast = Backend(
        name="fast",
        run=eager.run,
        limits=Limits(dtypes={"cpu": limits.FLOATS}, grad_devices=("cpu",), max_keys=17),
        unusable=lambda device: None,
        auto_devices=("cpu",),
        auto_note="measured here",
    )
    others = registry.TABLE

    def install(shape):
        table = (dataclasses.replace(fast, auto_shapes=(shape,)), *others)
        monkeypatch.setattr(registry, "TABLE", table)
        monkeypatch.setattr(registry, "_BY_NAME", {row.name: row for row in table})
        monkeypatch.setattr(registry, "_CHOICES", {})

    install(SHAPE)
    monkeypatch.setattr(limits, "compute_capability", lambda device: (9, 0))
    return install


def call(batch=2, heads=3, queries=7, keys=11, head_dim=5, dtype=torch.float32, has_grad=False):
    query = torch.zeros(batch, heads, queries, head_dim, dtype=dtype, requires_grad=has_grad)
    key = torch.zeros(batch, heads, keys, head_dim, dtype=dtype)
    return query, key, key


def is_taken(shapes, *tensors, attn_mask=None, key_mask=None):
    request = prepare(*tensors, attn_mask, key_mask, False, None, 0.0, False)
    traits = traits_of(request)
    return limits.auto_takes(tuple(shape for shape in shapes if shape.suits(traits)), request)


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
        {"queries": 8},
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
        assert is_taken([shape], *call(), attn_mask=attn_mask, key_mask=key_mask) is expected


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("with_key_mask", [False, True, None])
def test_shapes_that_were_measured_with_an_attn_mask(with_key_mask):
    shape = dataclasses.replace(SHAPE, with_key_mask=with_key_mask, attn_masks=("boolean",))
    boolean = torch.ones(7, 11, dtype=torch.bool)
    for key_mask in (None, KEY_MASK):
        fits = with_key_mask in (None, key_mask is not None)
        for attn_mask, expected in ((None, False), (boolean, fits), (torch.zeros(7, 11), False)):
            assert is_taken([shape], *call(), attn_mask=attn_mask, key_mask=key_mask) is expected


@pytest.mark.usefixtures("table")
def test_other_cards_and_gradients(monkeypatch):
    shape = dataclasses.replace(SHAPE, with_grad=False)
    for has_grad, expected in ((False, True), (True, False)):
        assert is_taken([shape], *call(has_grad=has_grad)) is expected
    monkeypatch.setattr(limits, "compute_capability", lambda device: (8, 0))
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


NOTE = "auto chooses it only where it was measured to be the fastest: measured here"


def test_shapes_that_pay_only_where_they_are_replayed(table):
    """The context decides anew for each call, and `explain` says what keeps the backend from being chosen."""
    table(dataclasses.replace(SHAPE, when_replayed_only=True))
    assert used(*call()) == "sdpa"
    assert registry.explain(*call()).reasons["fast"] == [
        "auto chooses it for this call only where it is replayed as a CUDA graph: measured here"
    ]
    assert registry.explain(*call(keys=12)).reasons["fast"] == [NOTE]
    assert registry.explain(*call(head_dim=6)).reasons["fast"] == [NOTE]
    with replayed():
        assert used(*call()) == registry.explain(*call()).chosen == "fast"
        assert used(*call(keys=12)) == "sdpa"
        with replayed():
            assert is_replayed()
        assert is_replayed()
    assert not is_replayed()
    assert used(*call()) == "sdpa"


def test_compiled_code_keeps_what_was_so_when_it_was_compiled(table):
    table(dataclasses.replace(SHAPE, when_replayed_only=True))
    compiled = compiling(chosen := [])
    with replayed():
        compiled(*call())
    compiled(*call())
    assert chosen == ["fast"]


def test_compiled_code_for_any_sizes(table):
    """Sizes that no shape has are one compilation; a number of queries of a shape is another."""
    table(SHAPE)
    compiled = compiling(chosen := [], dynamic=True)
    for sizes in ({"queries": 17}, {"queries": 3, "keys": 4}, {"queries": 19, "keys": 23, "batch": 4}):
        compiled(*call(**sizes))
        assert chosen == ["sdpa"], sizes
    compiled(*call(queries=13))
    assert chosen == ["sdpa", "fast"]


def test_what_a_machine_can_do_is_no_part_of_a_compiled_graph():
    """Not every torch traces the questions, and none traces functions that remember their answers."""
    query = torch.zeros(1, 2, 3, 8, device="meta")
    traits = traits_of(prepare(query, query, query, None, None, False, None, 0.0, False))._replace(device="cuda")

    def ask(tensor):
        return tensor + sum(len(row.refusals(traits)) for row in registry.TABLE)

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(ask, fullgraph=True, backend="eager")
        assert torch.equal(compiled(torch.zeros(3)), ask(torch.zeros(3)))
    assert all(getattr(row.unusable, "_dynamo_marked_constant", False) for row in registry.TABLE)


UNETS = [(8, 4096, 40), (8, 1024, 80), (8, 256, 160), (10, 4096, 64), (20, 1024, 64)]


@pytest.fixture
def on_a_card(monkeypatch):
    """Would "auto" take a row, triton's by default, on a Hopper card?"""
    monkeypatch.setattr(limits, "compute_capability", lambda device: (9, 0))

    def is_covered(
        heads, queries, keys, head_dim, batch=2, dtype=torch.bfloat16, has_grad=False, row=triton.BACKEND, **masks
    ):
        query = torch.empty(batch, heads, queries, head_dim, dtype=dtype, device="meta", requires_grad=has_grad)
        key = torch.empty(batch, heads, keys, head_dim, dtype=dtype, device="meta")
        return is_taken(row.auto_shapes, query, key, key, **masks)

    return is_covered


def test_the_triton_kernels_are_switched_on():
    assert triton.BACKEND.auto_devices == ("cuda",)


@pytest.mark.parametrize(("heads", "queries", "head_dim"), UNETS)
@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("has_grad", [False, True])
def test_text_without_a_mask_where_it_is_replayed(on_a_card, batch, heads, queries, head_dim, has_grad):
    sizes = {"batch": batch, "has_grad": has_grad}
    assert not on_a_card(heads, queries, 77, head_dim, **sizes)
    with replayed():
        assert on_a_card(heads, queries, 77, head_dim, **sizes)
        assert not on_a_card(heads, queries, 64, head_dim, **sizes)
        assert not on_a_card(heads, queries, 300, head_dim, **sizes)
        assert not on_a_card(heads, queries + 1, 77, head_dim, **sizes)


def test_large_batches_without_a_mask(on_a_card):
    assert not on_a_card(8, 4096, 77, 40, batch=15)
    assert on_a_card(8, 4096, 77, 40, batch=16)
    assert on_a_card(8, 4096, 77, 40, batch=64)
    assert not on_a_card(8, 4096, 77, 40, batch=16, has_grad=True)
    for has_grad in (False, True):
        assert not on_a_card(10, 4096, 77, 64, batch=15, has_grad=has_grad)
        assert on_a_card(10, 4096, 77, 64, batch=16, has_grad=has_grad)


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize(("heads", "queries", "head_dim"), [(8, 256, 160), (20, 1024, 64)])
def test_large_batches_without_a_mask_where_they_are_replayed(on_a_card, heads, queries, head_dim, has_grad):
    assert not on_a_card(heads, queries, 77, head_dim, batch=16, has_grad=has_grad)
    with replayed():
        assert on_a_card(heads, queries, 77, head_dim, batch=16, has_grad=has_grad)
        assert not on_a_card(heads, queries, 77, head_dim, batch=17, has_grad=has_grad)


@pytest.mark.parametrize(("heads", "keys", "head_dim", "batch"), [(16, 300, 72, 16), (24, 512, 128, 2)])
def test_padded_text_in_training(on_a_card, heads, keys, head_dim, batch):
    mask = torch.empty(batch, keys, dtype=torch.bool, device="meta")
    sizes = (heads, 4096, keys, head_dim, batch)
    assert on_a_card(*sizes, has_grad=True, key_mask=mask, row=varlen.BACKEND)
    assert not on_a_card(*sizes, key_mask=mask, row=varlen.BACKEND)
    assert not on_a_card(*sizes, has_grad=True, row=varlen.BACKEND)
    assert not on_a_card(heads, 4096, keys, head_dim, 1, has_grad=True, key_mask=mask[:1], row=varlen.BACKEND)
    with replayed():
        assert on_a_card(*sizes, key_mask=mask, row=varlen.BACKEND) is (head_dim == 72)
    # Its row comes before that of the kernels for short keys, which serve such calls too.
    names = [row.name for row in registry.TABLE]
    assert names.index("varlen") < names.index("triton")
    # And of packed sequences the shorter have theirs before it.
    assert names.index("triton_packed") < names.index("varlen")


def test_steps_of_decoding(on_a_card):
    row = {"row": triton_decode.BACKEND}
    key_mask = torch.empty(2, 257, dtype=torch.bool, device="meta")
    boolean = torch.empty(1, 257, dtype=torch.bool, device="meta")
    for masks in ({"key_mask": key_mask}, {"attn_mask": boolean}, {"key_mask": key_mask, "attn_mask": boolean}):
        assert on_a_card(16, 1, 257, 64, **masks, **row)
        assert on_a_card(32, 8, 257, 128, **masks, **row)
        assert not on_a_card(16, 9, 257, 64, **masks, **row)
        assert not on_a_card(16, 1, 257, 72, **masks, **row)
        assert not on_a_card(16, 1, 257, 64, has_grad=True, **masks, **row)
        assert not on_a_card(16, 1, 257, 64, dtype=torch.float32, **masks, **row)
    assert not on_a_card(16, 1, 257, 64, attn_mask=boolean.float(), **row)
    assert not on_a_card(16, 4, 257, 64, **row)
    with replayed():
        assert on_a_card(16, 4, 257, 64, **row)
        assert not on_a_card(16, 1, 257, 64, **row)


@pytest.mark.parametrize(("heads", "keys", "head_dim"), [(16, 300, 72), (16, 257, 72), (8, 77, 40), (10, 80, 64)])
@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("batch", [2, 32])
def test_text_under_a_key_mask(on_a_card, heads, keys, head_dim, has_grad, batch):
    masked = {
        "key_mask": torch.empty(batch, keys, dtype=torch.bool, device="meta"),
        "has_grad": has_grad,
        "batch": batch,
        "dtype": torch.float16,
    }
    assert on_a_card(heads, 4096, keys, head_dim, **masked)
    assert not on_a_card(heads, 4096, keys, head_dim, **masked | {"dtype": torch.float32})
    assert not on_a_card(heads, 1024, keys, head_dim, **masked)
    boolean = torch.empty(4096, keys, dtype=torch.bool, device="meta")
    assert not on_a_card(heads, 4096, keys, head_dim, **masked, attn_mask=boolean)


def test_long_text_without_a_mask_stays_with_torch(on_a_card):
    """cuDNN is faster there, replayed or not."""
    with replayed():
        assert not on_a_card(16, 4096, 300, 72)
        assert not on_a_card(16, 4096, 300, 72, has_grad=True)
