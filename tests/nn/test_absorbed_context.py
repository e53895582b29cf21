"""Cross-attention without keys and values, beside the ordinary way and float64; and where it is taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import mmattn
from mmattn.errors import UsageError
from mmattn.nn import CrossAttention, cross_attention
from mmattn.nn.absorbed_context import is_less_work
from mmattn.ops.observe import observing, steering
from mmattn.ops.segments import Segments
from tests.tolerance import check_within

LENGTHS, CONTEXT_LENGTH = (3, 1, 2, 2), 67
EMBED_DIM, CONTEXT_DIM, HEAD_DIM = 23, 79, 37
FORMS = {
    "plain": {"num_heads": 3},
    "grouped heads": {"num_heads": 6, "num_kv_heads": 2},
    "one key/value head": {"num_heads": 3, "num_kv_heads": 1},
    "no bias": {"num_heads": 3, "bias": False},
    "scale": {"num_heads": 3, "scale": 0.7},
    "output bias only": {"num_heads": 3, "bias": False, "out_bias": True},
}
SEGMENTS, CONTEXTS = Segments.of(LENGTHS), Segments.equal(len(LENGTHS), CONTEXT_LENGTH)


def make(form: str = "plain", **options) -> CrossAttention:
    torch.manual_seed(1)
    options = {"context_dim": CONTEXT_DIM, "head_dim": HEAD_DIM, **FORMS[form], **options}
    module = CrossAttention(EMBED_DIM, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def inputs(segments: Segments = SEGMENTS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(EMBED_DIM, segments.total, dtype=torch.float64).T  # not contiguous
    context = torch.randn(len(LENGTHS) * CONTEXT_LENGTH, CONTEXT_DIM, dtype=torch.float64)
    return x.requires_grad_(), context.requires_grad_()


@pytest.fixture
def absorbed(monkeypatch) -> list[int]:
    """Counts the calls without keys and values."""
    calls: list[int] = []
    original = cross_attention.attend_absorbed

    def counting(*arguments, **named):
        calls.append(1)
        return original(*arguments, **named)

    monkeypatch.setattr(cross_attention, "attend_absorbed", counting)
    return calls


def run(module: CrossAttention, x: Tensor, context: Tensor, segments: Segments = SEGMENTS, backend: str = "auto"):
    with mmattn.use_backend(backend, role="cross"):
        return module(x, context, segments=segments, context_segments=CONTEXTS)


def with_gradients(output: Tensor, module: CrossAttention, *tensors: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    cotangent = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
    leaves = {"x": tensors[0], "context": tensors[1], **dict(module.named_parameters())}
    gradients = torch.autograd.grad(output, [*leaves.values()], cotangent)
    return {"output": output, **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_ordinary_way_forward_and_backward(form: str, absorbed: list[int]) -> None:
    module = make(form)
    x, context = inputs()
    found = with_gradients(run(module, x, context), module, x, context)
    assert len(absorbed) == 1
    expected = with_gradients(run(module, x, context, backend="eager"), module, x, context)
    assert len(absorbed) == 1
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-11, msg=name)


def test_several_texts_of_a_picture(absorbed: list[int]) -> None:
    texts = Segments.of([1, 2, 1, 1, 3, 1, 2, 2])
    module = make()
    x, context = inputs(texts)
    found = with_gradients(run(module, x, context, texts), module, x, context)
    assert absorbed
    expected = with_gradients(run(module, x, context, texts, backend="eager"), module, x, context)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-11, msg=name)


def test_float32_keeps_to_the_rule(absorbed: list[int]) -> None:
    module, (x, context) = make(), inputs()
    expected = with_gradients(run(module, x, context, backend="eager"), module, x, context)
    single = copy.deepcopy(module).float()
    x, context = (tensor.detach().float().requires_grad_() for tensor in (x, context))
    found = with_gradients(run(single, x, context), single, x, context)
    assert absorbed
    eager = with_gradients(run(single, x, context, backend="eager"), single, x, context)
    for name, tensor in expected.items():
        if name == "k_proj.bias":  # zero but for rounding
            assert found[name].abs().max() < 1e-5 * expected["k_proj.weight"].abs().max()
            continue
        check_within(found[name], eager[name], tensor, factor=2.0 if name == "output" else 3.0, what=name)


def test_derivatives_of_both_orders(monkeypatch, absorbed: list[int]) -> None:
    monkeypatch.setattr(cross_attention, "is_less_work", lambda *_: True)
    module = CrossAttention(5, 2, context_dim=3, head_dim=11).double()
    segments, contexts = Segments.of([2, 1]), Segments.equal(2, 13)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    context = torch.randn(26, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, context: Tensor, *_: Tensor) -> Tensor:
        return module(x, context, segments=segments, context_segments=contexts)

    leaves = (x, context, module.k_proj.weight, module.v_proj.weight)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert absorbed


def test_a_context_that_is_not_finite_stays_with_its_own_queries(absorbed: list[int]) -> None:
    module, (x, context) = make(), inputs()
    spoilt = context.detach().clone()
    spoilt[CONTEXT_LENGTH + 7] = float("nan")
    output = run(module, x, spoilt)
    assert absorbed
    is_spoilt = SEGMENTS.row_numbers() == 1
    assert output[is_spoilt].isnan().all()
    assert torch.equal(output[~is_spoilt], run(module, x, context)[~is_spoilt])


def _hooked(module: CrossAttention, kind: str) -> CrossAttention:
    getattr(module.k_proj, f"register_{kind}_hook")(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("what", "change"),
    {
        "normed keys": lambda _: make(qk_norm="rms"),
        "dropout in training": lambda _: make(dropout_p=0.1).train(),
        "a named backend": lambda _: make(backend="sdpa"),
        "a hooked projection": lambda module: _hooked(module, "forward"),
        "a projection hooked in the backward pass": lambda module: _hooked(module, "full_backward"),
        "a projection of another class": lambda module: _replaced(module),
    }.items(),
)
def test_where_it_is_not_taken(what: str, change, absorbed: list[int]) -> None:
    module, (x, context) = make(), inputs()
    run(module, x, context)
    assert len(absorbed) == 1
    run(change(module), x, context)
    assert len(absorbed) == 1, what


def _replaced(module: CrossAttention) -> CrossAttention:
    class Adapted(torch.nn.Linear):
        pass

    own = Adapted(CONTEXT_DIM, module.num_kv_heads * HEAD_DIM).double()
    setattr(module, module.names.value, own)
    return module


def test_dropout_is_no_hindrance_out_of_training(absorbed: list[int]) -> None:
    module, (x, context) = make(dropout_p=0.1).eval(), inputs()
    run(module, x, context)
    assert absorbed


def test_it_is_not_taken_where_it_is_hardly_less_work_or_contexts_differ_in_length(absorbed: list[int]) -> None:
    module, (x, context) = make(), inputs()
    many = Segments.of([29, 31, 37, 23])
    x_many = torch.randn(many.total, EMBED_DIM, dtype=torch.float64)
    run(module, x_many, context, many)
    unequal = Segments.of([CONTEXT_LENGTH - 1, CONTEXT_LENGTH + 1, CONTEXT_LENGTH, CONTEXT_LENGTH])
    module(x, context, segments=SEGMENTS, context_segments=unequal)
    with torch.autocast("cpu", torch.bfloat16):
        run(module, x, context)
    run(module.bfloat16(), x.bfloat16(), context.bfloat16())
    assert not absorbed


def test_a_few_places_and_narrow_contexts_are_attended_to_in_the_ordinary_way() -> None:
    sizes = {"num_heads": 12, "num_kv_heads": 12, "head_dim": 64}
    queries = Segments.of([3, 2])
    assert is_less_work(queries, Segments.equal(2, 64), **sizes, width=128)
    assert not is_less_work(queries, Segments.equal(2, 63), **sizes, width=128)
    assert not is_less_work(queries, Segments.equal(2, 64), **sizes, width=127)


def test_captions_of_blip_up_to_29_tokens() -> None:
    sizes = {"num_heads": 12, "num_kv_heads": 12, "head_dim": 64, "width": 768}
    pictures = Segments.equal(4, 577)
    taken = [length for length in range(1, 60) if is_less_work(Segments.of([length] * 4), pictures, **sizes)]
    assert taken == list(range(1, 30))
    assert not is_less_work(Segments.of([49, 5, 5, 5]), pictures, **sizes)


@pytest.mark.parametrize(("rows", "context_rows"), [(0, -1), (0, CONTEXT_LENGTH * 4), (0, 4), (2, 0), (-2, 0)])
def test_rows_that_are_not_the_segments_are_refused(rows: int, context_rows: int) -> None:
    module = make()
    x = torch.randn(sum(LENGTHS) + rows, EMBED_DIM, dtype=torch.float64)
    context = torch.randn(len(LENGTHS) * CONTEXT_LENGTH + context_rows, CONTEXT_DIM, dtype=torch.float64)
    what = f"x has {len(x)} rows, its segments 8" if rows else f"context has {len(context)} rows, its segments 268"
    with pytest.raises(UsageError, match=f"CrossAttention: {what}: they must agree"):
        run(module, x, context)


def test_steered_attention_takes_the_ordinary_way(absorbed: list[int]) -> None:
    module, (x, context) = make(), inputs()
    calls = []

    def steer(request, attend):
        calls.append(request)
        return attend(request)

    with steering(steer):
        run(module, x, context)
    assert calls
    assert not absorbed


def test_packed_sequences_show_no_attention_either_way() -> None:
    module, (x, context) = make(), inputs()
    with observing(lambda _: None), pytest.raises(UsageError, match="cannot be read from packed sequences"):
        run(module, x, context)
