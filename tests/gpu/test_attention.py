"""Every backend of a card against the float64 specification, forward and backward, under the tolerance rule."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmattn.errors import BackendError
from mmattn.ops.attention import attention
from tests.gpu.card import BACKENDS, DEVICE, DTYPES, HALF_TYPES, MARKS, USABLE, make_call
from tests.ops.cases import Shape, allowed_everywhere, generator_for, make_attn_mask, mask_cases, used_by_anyone
from tests.tolerance import check_attention

pytestmark = MARKS

HEAD_DIMS = (40, 64, 72, 80, 96, 128, 160)
SHAPES = [
    *(Shape(2, 4, 2, 67, 131, head_dim) for head_dim in HEAD_DIMS),
    Shape(3, 6, 1, 33, 77, 64),
    Shape(2, 8, 8, 129, 77, 40),
    Shape(5, 6, 2, 1, 19, 64),
    Shape(2, 3, 3, 77, 31, 88),
    Shape(3, 5, 5, 13, 7, 19),
]
PLAIN = SHAPES[1]
FLEX = [
    (Shape(2, 4, 2, 67, 131, 64), "none", "none", True),
    (Shape(2, 4, 2, 67, 131, 64), "none", "nothing", False),
    (Shape(2, 3, 3, 77, 31, 40), "empty-rows", "gaps", True),
    (Shape(2, 6, 1, 33, 77, 72), "bias-heads", "right", False),
    (Shape(2, 8, 8, 129, 77, 40), "none", "none", False),
    (Shape(2, 4, 2, 67, 131, 160), "boolean-heads", "gaps", False),
]


def attend(backend):
    return functools.partial(attention, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend, shape, dtype):
    number = SHAPES.index(shape)
    for attn_kind, key_kind, is_causal in mask_cases(number, every=7):
        call = make_call(shape, dtype, attn_kind, key_kind, generator_for(number, 3))
        what = f"{backend} {dtype} {shape} attn {attn_kind} key {key_kind} causal {is_causal}"
        check_attention(attend(backend), call.query, call.key, call.value, **call.masks, is_causal=is_causal, what=what)


@pytest.mark.skipif("flex" not in USABLE or DEVICE == "cpu", reason="flex cannot be used here")
@pytest.mark.parametrize(
    ("shape", "attn_kind", "key_kind", "is_causal", "dtype"),
    [*((*call, torch.bfloat16) for call in FLEX), *((*call, torch.float32) for call in FLEX[:2])],
    ids=str,
)
def test_flex(shape, attn_kind, key_kind, is_causal, dtype):
    call = make_call(shape, dtype, attn_kind, key_kind, generator_for(83))
    what = f"flex {dtype} {shape} attn {attn_kind} key {key_kind} causal {is_causal}"
    check_attention(attend("flex"), call.query, call.key, call.value, **call.masks, is_causal=is_causal, what=what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_give_exactly_nothing(backend, dtype):
    for attn_kind, key_kind, is_causal in mask_cases(1, every=5):
        generator = generator_for(7)
        call = make_call(PLAIN, dtype, attn_kind, key_kind, generator)
        masks = {name: None if mask is None else mask.cpu() for name, mask in call.masks.items()}
        allowed = allowed_everywhere(PLAIN, masks["attn_mask"], masks["key_mask"], is_causal)
        empty, unused = ~allowed.any(-1).to(DEVICE), ~used_by_anyone(PLAIN, allowed).to(DEVICE)
        where = f"attn {attn_kind} key {key_kind} causal {is_causal}"
        # NaN where nobody may look; results may not depend on it.
        poisoned = (tensor.masked_fill(unused[..., None], float("nan")) for tensor in (call.key, call.value))
        query, key, value = (tensor.requires_grad_() for tensor in (call.query, *poisoned))
        output = attention(query, key, value, **call.masks, is_causal=is_causal, backend=backend)
        output.float().square().sum().backward()
        assert not output[empty].any(), where
        assert not query.grad[empty].any(), where
        for tensor in (output, query.grad, key.grad, value.grad):
            assert tensor.isfinite().all(), where
        for grad in (key.grad, value.grad):
            assert not grad[unused].any(), where


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("kernel", [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def test_rows_without_keys_on_each_kernel(kernel, has_grad, dtype):
    """Whatever a kernel does with a row whose scores are all masked, it is never asked."""
    if DEVICE == "cpu":
        pytest.skip("a CPU has no such choice")
    if kernel is SDPBackend.CUDNN_ATTENTION and (has_grad or dtype is torch.float32):
        pytest.skip("cuDNN serves half types, and no masked backward")
    for shape in (SHAPES[1], SHAPES[9]):
        call = make_call(shape, dtype, "none", "nothing", generator_for(89))
        query, key, value = call.query, call.key, call.value
        is_key = call.key_mask[:, None, :, None]
        key, value = (tensor.masked_fill(~is_key, float("nan")) for tensor in (key, value))
        tensors = [tensor.requires_grad_(has_grad) for tensor in (query, key, value)]
        with sdpa_kernel(kernel):
            output = attention(*tensors, key_mask=call.key_mask, backend="sdpa")
        found = [output, *(torch.autograd.grad(output.float().square().sum(), tensors) if has_grad else ())]
        empty = ~call.key_mask.any(-1)
        assert empty.any()
        assert not empty.all()
        for tensor in found:
            assert tensor.isfinite().all()
            assert not tensor[empty].any()
            assert tensor[~empty].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_float_bias(backend, dtype):
    for number, shape in enumerate((SHAPES[0], SHAPES[4], SHAPES[7])):
        call = make_call(shape, dtype, "bias-heads", "right", generator_for(number, 41))
        check_attention(
            attend(backend),
            call.query,
            call.key,
            call.value,
            **call.masks,
            bias_gradient=True,
            what=f"{backend} {dtype} {shape}",
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1e-3, 30.0, 300.0])
def test_small_and_huge_scores(backend, dtype, factor):
    for number, shape in enumerate((SHAPES[1], SHAPES[3], SHAPES[8])):
        call = make_call(shape, dtype, "none", "none", generator_for(number, 43))
        for is_causal in (False, True):
            check_attention(
                attend(backend),
                call.query * factor,
                call.key,
                call.value,
                is_causal=is_causal,
                has_rounded_products=backend != "eager" and dtype in HALF_TYPES,
                what=f"{backend} {dtype} {shape} scores x {factor} causal {is_causal}",
            )


# Every log-sum-exp below -88.7 and Lq % 128 == 64, or a single query over 128 keys: where cuDNN's backward makes NaN.
# (It serves half types only.)
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [Shape(2, 2, 2, 704, 704, 64), Shape(2, 8, 8, 1, 128, 64)], ids=str)
def test_where_cudnn_makes_nan(backend, dtype, shape):
    generator = generator_for(47)
    call = make_call(shape, dtype, "boolean", "none", generator)
    check_attention(
        attend(backend),
        call.query.abs() + 4,
        -(call.key.abs() + 4),
        call.value,
        **call.masks,
        has_rounded_products=backend != "eager",
        what=f"{backend} {dtype} {shape}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend, dtype):
    """[B, L, H, D] storage, sliced caches, a head size inside a larger one, an expanded head: strides of every kind."""

    def on_views(query, key, value, **arguments):
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
        nan = torch.full_like(key, float("nan"))
        key = torch.cat([key, nan], dim=2)[:, :, : key.shape[2]]
        value = torch.cat([value, nan], dim=3)[..., : value.shape[3]]
        return attention(query, key, value, **arguments, backend=backend)

    def on_one_head(query, key, value, **arguments):
        return attention(query, key[:, :1].expand_as(key), value, **arguments, backend=backend)

    for number, shape in enumerate(SHAPES):
        call = make_call(shape, dtype, "none", "gaps" if number % 2 else "none", generator_for(number, 53))
        arguments = {"key_mask": call.key_mask, "is_causal": number % 3 == 0}
        check_attention(on_views, call.query, call.key, call.value, **arguments, what=f"{backend} {dtype} {shape}")
        one = call.key[:, :1].repeat(1, shape.kv_heads, 1, 1)
        check_attention(on_one_head, call.query, one, call.value, backward=False, **arguments, what=f"{shape}, a head")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 7, 11), (2, 0, 11), (2, 7, 0)], ids=["no batch", "no queries", "no keys"])
def test_nothing_to_do(backend, sizes):
    batch, queries, keys = sizes
    query = torch.randn(batch, 6, queries, 40, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(batch, 3, keys, 40, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    for key_mask in (None, torch.ones(batch, keys, dtype=torch.bool, device=DEVICE)):
        output = attention(query, key, key, key_mask=key_mask, backend=backend)
        assert torch.equal(output, torch.zeros_like(query))
        output.sum().backward()
    assert query.grad is None or not query.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_the_mean_and_drops_the_share(backend):
    query = torch.zeros(1, 8, 512, 64, device=DEVICE, dtype=torch.bfloat16)
    key = torch.zeros(1, 8, 64, 64, device=DEVICE, dtype=torch.bfloat16)
    value = torch.eye(64, device=DEVICE, dtype=torch.bfloat16).expand(1, 8, 64, 64) * 64
    output = attention(query, key, value, dropout_p=0.25, backend=backend)
    assert abs((output == 0).float().mean().item() - 0.25) < 0.01
    assert abs(output.float().mean().item() - 1.0) < 0.02


def test_autocast_casts_the_inputs():
    call = make_call(PLAIN, torch.float32, "none", "right", generator_for(59))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = attention(call.query, call.key.bfloat16(), call.value, key_mask=call.key_mask)
    assert output.dtype is torch.bfloat16


def test_no_call_waits_for_the_card():
    """Masked or not, forward or backward: nothing is read back to decide what to launch."""
    if DEVICE == "cpu":
        pytest.skip("a CPU has nothing to wait for")
    call = make_call(PLAIN, torch.bfloat16, "boolean", "nothing", generator_for(61))
    attention(call.query, call.key, call.value, **call.masks)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for masks in ({}, {"key_mask": call.key_mask}, call.masks):
            for is_causal in (False, True):
                query = call.query.detach().requires_grad_()
                attention(query, call.key, call.value, **masks, is_causal=is_causal).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
def test_a_kernel_pinned_by_the_caller_is_kept(kernel):
    """`torch.nn.attention.sdpa_kernel` around a call of ours rules, also where cuDNN is left out."""
    if DEVICE == "cpu":
        pytest.skip("a CPU has no such choice")
    mask = None if kernel is SDPBackend.FLASH_ATTENTION else make_attn_mask("boolean", PLAIN, generator_for(67))
    call = make_call(PLAIN, torch.bfloat16, "none", "none", generator_for(67))
    seen = []

    def spy(query, key, value, mask, dropout_p, is_causal, **options):
        seen.append(torch._fused_sdp_choice(query, key, value, mask, dropout_p, is_causal, **options))
        return query

    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(kernel):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        query = call.query.requires_grad_()
        attention(query, call.key, call.value, attn_mask=None if mask is None else mask.to(DEVICE), backend="sdpa")
    assert [SDPBackend(choice) for choice in seen] == [kernel]


def test_only_cudnn_where_it_is_wrong_is_refused():
    if DEVICE == "cpu":
        pytest.skip("a CPU has no such choice")
    call = make_call(PLAIN, torch.bfloat16, "boolean", "none", generator_for(71))
    with (
        sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        pytest.raises(BackendError, match=r"'sdpa': only cuDNN is enabled .* known to be wrong for this call"),
    ):
        attention(call.query.requires_grad_(), call.key, call.value, **call.masks)
