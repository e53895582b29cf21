"""Packed attention held to a block-diagonal mask in float64, on every path that a CPU has."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import mmattn
from mmattn.errors import BackendError, UsageError
from mmattn.ops import limits, packed_groups
from mmattn.ops.backends import flash, varlen
from mmattn.ops.observe import observing
from mmattn.ops.packed import packed_attention
from mmattn.ops.segments import Segments
from tests.ops.row_kernels import NAMES, install
from tests.tolerance import check_attention

HEAD_DIM = 7
LENGTHS = [1, 3, 3, 3, 5, 11, 13, 2, 2, 17, 1]
OTHERS = [19, 3, 3, 5, 5, 2, 29, 7, 7, 17, 1]


def _inputs(queries: list[int], keys: list[int], heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((sum(queries), heads), (sum(keys), kv_heads), (sum(keys), kv_heads))
    return tuple(torch.randn(*shape, HEAD_DIM, generator=generator, dtype=torch.float64) for shape in shapes)  # pyright: ignore


def _blocks(queries: list[int], keys: list[int], is_causal: bool) -> Tensor:
    """The block-diagonal mask `[N, M]`, each block causal at its own end."""
    blocks = [
        torch.ones(q, k, dtype=torch.bool).tril(k - q if is_causal else k) for q, k in zip(queries, keys, strict=True)
    ]
    return torch.block_diag(*(block.float() for block in blocks)).bool()


def _reference(
    inputs: tuple[Tensor, ...], queries: list[int], keys: list[int], is_causal: bool, backend="eager"
) -> Tensor:
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in inputs)
    mask = _blocks(queries, keys, is_causal)
    return mmattn.attention(query, key, value, attn_mask=mask, backend=backend)[0].transpose(0, 1)


def _with_gradients(function: Any, inputs: tuple[Tensor, ...], cotangent: Tensor) -> list[Tensor]:
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    output = function(leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(output.dtype))]


@pytest.mark.parametrize("call_cost", [0.0, 1e3, 1e12], ids=["alone", "some together", "all together"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize(("keys", "is_causal"), [(LENGTHS, False), (LENGTHS, True), (OTHERS, False), (OTHERS, True)])
def test_float64_equals_the_block_diagonal_mask(monkeypatch, call_cost, heads, kv_heads, keys, is_causal):
    monkeypatch.setattr(packed_groups, "_CALL_COST", call_cost)
    packed_groups._groups.cache_clear()
    inputs = _inputs(LENGTHS, keys, heads, kv_heads)
    cotangent = torch.randn(sum(LENGTHS), heads, HEAD_DIM, dtype=torch.float64)
    expected = _with_gradients(lambda x: _reference(x, LENGTHS, keys, is_causal), inputs, cotangent)
    found = _with_gradients(
        lambda x: packed_attention(*x, Segments.of(LENGTHS), Segments.of(keys), is_causal=is_causal), inputs, cotangent
    )
    packed_groups._groups.cache_clear()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_low_precision_keeps_the_tolerance(dtype, backend):
    def packed(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return packed_attention(*rows, Segments.of(LENGTHS), Segments.of(OTHERS), backend=backend).transpose(0, 1)[None]

    low = (tensor.to(dtype).transpose(0, 1)[None] for tensor in _inputs(LENGTHS, OTHERS, 6, 2))
    check_attention(packed, *low, attn_mask=_blocks(LENGTHS, OTHERS, False), what=f"packed {backend} {dtype}")


def test_scale_and_self_segments():
    inputs = _inputs(LENGTHS, LENGTHS, 3, 3)
    doubled = (inputs[0] * 2, *inputs[1:])
    scaled = packed_attention(*inputs, Segments.of(LENGTHS), scale=2 * HEAD_DIM**-0.5)
    torch.testing.assert_close(scaled, packed_attention(*doubled, Segments.of(LENGTHS)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_sequence_does_not_see_its_neighbours_not_even_a_nan(monkeypatch, is_causal):
    monkeypatch.setattr(packed_groups, "_CALL_COST", 1e12)  # all together
    packed_groups._groups.cache_clear()
    inputs = _inputs(LENGTHS, LENGTHS, 3, 3)
    before = packed_attention(*inputs, Segments.of(LENGTHS), is_causal=is_causal)
    changed = tuple(tensor.clone() for tensor in inputs)
    for tensor in changed:
        tensor[:1] = float("nan")  # the first sequence
    after = packed_attention(*changed, Segments.of(LENGTHS), is_causal=is_causal)
    packed_groups._groups.cache_clear()
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-12, atol=1e-12)


def test_dropout_drops_weights_in_expectation_nothing():
    inputs = tuple(tensor.float() for tensor in _inputs([5] * 300, [5] * 300, 2, 2))
    inputs = (torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1]), torch.ones_like(inputs[2]))
    torch.manual_seed(0)
    output = packed_attention(*inputs, Segments.of([5] * 300), dropout_p=0.5)
    assert output.unique().numel() > 2
    assert abs(output.mean().item() - 1) < 0.05


def test_gradients_of_gradients():
    inputs = tuple(tensor.requires_grad_() for tensor in _inputs([2, 3], [2, 3], 1, 1))
    assert torch.autograd.gradgradcheck(
        lambda *x: packed_attention(*x, Segments.of([2, 3]), backend="eager"), inputs, atol=1e-6
    )


def test_segments():
    segments = Segments.of([3, 1, 5])
    assert (segments.lengths, segments.total, segments.longest) == ((3, 1, 5), 9, 5)
    assert segments.cu_seqlens.tolist() == [0, 3, 4, 9]
    assert segments.cu_seqlens.dtype is torch.int32
    assert segments.positions().tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    again = pickle.loads(pickle.dumps(segments)).to("cpu", non_blocking=True)
    assert again.lengths == segments.lengths
    for lengths in ([], [3, 0, 5]):
        with pytest.raises(UsageError, match=r"each at least 1: leave empty sequences out"):
            Segments.of(lengths)
    assert Segments.of(torch.tensor([3, 2])).lengths == (3, 2)
    with pytest.raises(UsageError, match=r"lengths \[2.5, 3.0\] must be whole numbers"):
        Segments.of(torch.tensor([2.5, 3]))
    with pytest.raises(UsageError, match=r"cu_seqlens are torch.int64 \[3\], they must be int32"):
        Segments((3, 2), torch.tensor([0, 3, 5]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, on a CPU
def test_transforms_of_torch_func():
    segments = Segments.of([3, 1, 5])
    rows = torch.randn(4, 9, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return packed_attention(rows, rows.cos(), rows.sin(), segments).square().sum()

    expected = [torch.autograd.functional.vjp(loss, each)[1] for each in rows]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(rows), torch.stack(expected))
    _, pushed = torch.func.jvp(loss, (rows[0],), (rows[1],))
    torch.testing.assert_close(pushed, (expected[0] * rows[1]).sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (9, 3)}, r"query must be \[N, H, D\]"),
        ({"query": (9, 4, 7)}, "the query heads must be a multiple of the key/value heads"),
        ({"query": (8, 6, 7)}, "query has 8 rows, its segments 9: they must agree"),
        ({"query_segments": Segments.of([9])}, "1 sequences of queries and 3 of keys"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        ({"scale": float("nan")}, "scale is nan, it must be a finite number"),
        ({"value": None}, "value a NoneType; all must be tensors"),
        ({"backend": "fast"}, "unknown attention backend 'fast'"),
        ({"role": "both"}, "unknown attention role 'both'"),
        ({"dtype": torch.float64}, "they must share dtype and device"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    segments = Segments.of([3, 1, 5])
    dtype = change.pop("dtype", torch.float32)
    arguments: dict[str, Any] = {
        "query": torch.randn(change.pop("query", (9, 6, 7)), dtype=dtype),
        "key": torch.randn(9, 3, 7),
        "value": torch.randn(9, 3, 7),
        "query_segments": segments,
        "key_segments": segments,
    }
    with pytest.raises(UsageError, match=message):
        packed_attention(**arguments | change)


def test_observers_are_told_that_there_is_nothing_to_see():
    inputs = _inputs([3], [3], 1, 1)
    with observing(lambda call: None), pytest.raises(UsageError, match="cannot be read from packed sequences"):
        packed_attention(*inputs, Segments.of([3]))


def test_kernels_of_the_gpu_refuse_a_cpu():
    inputs = _inputs([3], [3], 1, 1)
    for name in ("varlen", "flash"):
        with pytest.raises(BackendError, match=rf"attention backend '{name}' cannot serve this call: device cpu"):
            packed_attention(*inputs, Segments.of([3]), backend=name)


def test_an_old_card_is_no_card_for_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(flash, "package_version", lambda name: "2.8")
    monkeypatch.setattr(limits, "_ampere_missing", limits._ampere_missing.__wrapped__)  # not what is remembered
    for backend in (varlen, flash):
        reason = backend.BACKEND.unusable("cuda")
        assert reason == "needs compute capability 8.0 (A100 and newer), this card has 7.5"


def test_a_named_backend_and_use_backend_serve_the_groups(monkeypatch):
    seen: list[str] = []
    real = packed_groups.attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["backend"])
        return real(*args, **kwargs)

    monkeypatch.setattr(packed_groups, "attention", spy)
    inputs = _inputs([3], [3], 1, 1)
    packed_attention(*inputs, Segments.of([3]), backend="eager")
    with mmattn.use_backend("sdpa", role="cross"):
        packed_attention(*inputs, Segments.of([3]), role="cross")
        packed_attention(*inputs, Segments.of([3]), role="self")
    assert seen == ["eager", "sdpa", "auto"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2)])
@pytest.mark.parametrize(("keys", "is_causal"), [(LENGTHS, True), (OTHERS, False), (OTHERS, True)])
def test_kernels_for_rows(monkeypatch, name, heads, kv_heads, keys, is_causal):
    calls = install(monkeypatch)
    inputs = _inputs(LENGTHS, keys, heads, kv_heads)
    cotangent = torch.randn(sum(LENGTHS), heads, HEAD_DIM, dtype=torch.float64)
    expected = _with_gradients(lambda x: _reference(x, LENGTHS, keys, is_causal), inputs, cotangent)
    segments = (Segments.of(LENGTHS), Segments.of(keys))
    found = _with_gradients(
        lambda x: packed_attention(*x, *segments, is_causal=is_causal, backend=name), inputs, cotangent
    )
    assert list(calls) == [name]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_kernels_get_what_they_ask_for(monkeypatch):
    calls = install(monkeypatch)
    queries, keys = Segments.of([3, 2]), Segments.of([7, 5])
    inputs = _inputs([3, 2], [7, 5], 6, 2)
    for name in NAMES:
        packed_attention(*inputs, queries, keys, is_causal=True, scale=0.3, backend=name)
    varlen_call, flash_call = calls["varlen"], calls["flash"]
    assert varlen_call["cu_seq_q"] is flash_call["args"][3] is queries.cu_seqlens
    assert varlen_call["cu_seq_k"] is flash_call["args"][4] is keys.cu_seqlens
    assert (varlen_call["max_q"], varlen_call["max_k"]) == flash_call["args"][5:] == (128, 128)
    assert (varlen_call["window_size"], varlen_call["scale"]) == ((-1, 0), 0.3)
    assert (flash_call["causal"], flash_call["softmax_scale"], flash_call["dropout_p"]) == (True, 0.3, 0.0)


@pytest.mark.parametrize("wrong", ["query", "key"])
def test_segments_of_another_device_are_refused_by_kernels(monkeypatch, wrong):
    install(monkeypatch)
    inputs = _inputs([3, 2], [7, 5], 6, 2)
    where = {"query": "cpu", "key": "cpu", wrong: "meta"}
    segments = (Segments.of([3, 2], where["query"]), Segments.of([7, 5], where["key"]))
    with pytest.raises(
        UsageError, match=rf"the {wrong} segments are on meta, query on cpu: attention backend 'varlen'"
    ):
        packed_attention(*inputs, *segments)
    packed_attention(*inputs, *segments, backend="sdpa")  # needs their lengths only


def test_a_pass_in_inference_mode_leaves_later_training_alone():
    lengths = (3, 5, 2)
    rows = Segments.of(lengths)
    query, key, value = (torch.randn(sum(lengths), 2, 7, requires_grad=True) for _ in range(3))
    with torch.inference_mode():
        packed_attention(query, key, value, rows)
    packed_attention(query, key, value, rows).sum().backward()
    assert query.grad is not None


def test_segments_may_be_made_anew_of_their_fields():
    """As torch's FSDP does with the dataclasses that a module is given, where it casts their tensors."""
    segments = Segments.of([2, 3, 5])
    fields = {field.name: getattr(segments, field.name) for field in dataclasses.fields(segments)}
    again = dataclasses.replace(segments, **fields)
    assert (again.total, again.longest, again.longest_block) == (10, 5, 128)
    assert torch.equal(again.row_numbers(), segments.row_numbers())
