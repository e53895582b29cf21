from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.nn import CrossAttention, TransformerLayer, fuse
from mmattn.ops.cache import ContextKV
from mmattn.ops.observe import AttentionCall, observing
from mmattn.ops.segments import Segments

BATCH, REPEATS, LENGTH, CONTEXT_LENGTH = 3, 5, 7, 11
EMBED_DIM, CONTEXT_DIM, NUM_HEADS, NUM_KV_HEADS = 24, 17, 6, 2
ROWS = BATCH * REPEATS


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(ROWS, LENGTH, EMBED_DIM, dtype=torch.float64)


@pytest.fixture
def context() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(BATCH, CONTEXT_LENGTH, CONTEXT_DIM, dtype=torch.float64)


@pytest.fixture
def key_mask() -> Tensor:
    mask = torch.ones(BATCH, CONTEXT_LENGTH, dtype=torch.bool)
    mask[0, 4:] = False
    mask[2, ::3] = False
    return mask


def make(**options) -> CrossAttention:
    torch.manual_seed(5)
    options = {"context_dim": CONTEXT_DIM, "num_kv_heads": NUM_KV_HEADS, **options}
    return CrossAttention(EMBED_DIM, NUM_HEADS, **options).double().eval()


def attn_masks() -> dict[str, Tensor]:
    torch.manual_seed(6)
    shapes = {
        "none": (),
        "rank 2": (LENGTH, CONTEXT_LENGTH),
        "rank 2, any query": (1, CONTEXT_LENGTH),
        "rank 3": (ROWS, LENGTH, CONTEXT_LENGTH),
        "rank 3, any row": (1, LENGTH, CONTEXT_LENGTH),
        "rank 3, any query": (ROWS, 1, CONTEXT_LENGTH),
        "rank 4": (ROWS, NUM_HEADS, LENGTH, CONTEXT_LENGTH),
        "rank 4, any head": (ROWS, 1, LENGTH, CONTEXT_LENGTH),
        "rank 4, any row and query": (1, NUM_HEADS, 1, CONTEXT_LENGTH),
    }
    return {name: torch.rand(shape) < 0.6 for name, shape in shapes.items()}


@pytest.mark.parametrize("mask_name", attn_masks())
@pytest.mark.parametrize("length", [1, LENGTH])
@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms"}])
@torch.no_grad()
def test_folded_rows_equal_a_repeated_context(
    x: Tensor, context: Tensor, key_mask: Tensor, mask_name: str, length: int, options: dict
) -> None:
    module = make(**options)
    x, attn_mask = x[:, :length], None if mask_name == "none" else attn_masks()[mask_name]
    if attn_mask is not None and attn_mask.shape[-2] != 1:
        attn_mask = attn_mask[..., :length, :]
    repeated, repeated_mask = (tensor.repeat_interleave(REPEATS, dim=0) for tensor in (context, key_mask))
    expected = module(x, repeated, key_mask=repeated_mask, attn_mask=attn_mask)
    torch.testing.assert_close(
        module(x, context, key_mask=key_mask, attn_mask=attn_mask), expected, rtol=1e-11, atol=1e-11
    )
    projected = module.project_context(context, key_mask)
    torch.testing.assert_close(module(x, projected, attn_mask=attn_mask), expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_equals_the_definition(x: Tensor, context: Tensor) -> None:
    module = make()
    row, picture = 8, 8 // REPEATS
    query = module.q_proj(x[row]).view(LENGTH, NUM_HEADS, 4).transpose(0, 1)
    key, value = (
        projection(context[picture]).view(CONTEXT_LENGTH, NUM_KV_HEADS, 4).transpose(0, 1).repeat_interleave(3, dim=0)
        for projection in (module.k_proj, module.v_proj)
    )
    weights = (query @ key.transpose(1, 2) / math.sqrt(4)).softmax(-1)
    expected = module.out_proj((weights @ value).transpose(0, 1).flatten(1))
    torch.testing.assert_close(module(x, context)[row], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("is_fused", [False, True])
@torch.no_grad()
def test_keys_and_values_are_projected_once_and_never_copied(
    x: Tensor, context: Tensor, monkeypatch: pytest.MonkeyPatch, is_fused: bool
) -> None:
    module = fuse(make()) if is_fused else make()
    rows_projected = 0
    linear = F.linear

    def counting(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal rows_projected
        if weight.shape[1] == CONTEXT_DIM:
            rows_projected += inputs.shape[0] * inputs.shape[1] * weight.shape[0]
        return linear(inputs, weight, bias)

    calls: list[AttentionCall] = []
    monkeypatch.setattr(F, "linear", counting)
    projected = module.project_context(context)
    with observing(calls.append):
        for position in range(LENGTH):
            module(x[:, position : position + 1], projected)
    assert projected.key.is_contiguous()
    assert projected.value.is_contiguous()
    assert rows_projected == BATCH * CONTEXT_LENGTH * 2 * NUM_KV_HEADS * 4
    for call in calls:
        assert call.query.shape == (BATCH, NUM_HEADS, REPEATS, 4)
        assert call.key.data_ptr() == projected.key.data_ptr()
        assert call.key.shape == projected.key.shape
        assert call.role == "cross"
        assert call.caller is module


@torch.no_grad()
def test_key_masks_combine(x: Tensor, context: Tensor, key_mask: Tensor) -> None:
    module = make()
    other = torch.ones_like(key_mask)
    other[:, 2] = False
    both = module(x, context, key_mask=key_mask & other)
    for own, given in ((key_mask, other), (None, key_mask & other), (key_mask & other, None)):
        out = module(x, module.project_context(context, own), key_mask=given)
        torch.testing.assert_close(out, both, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_rows_without_any_key_give_the_projection_of_zeros(x: Tensor, context: Tensor) -> None:
    module = make()
    key_mask = torch.ones(BATCH, CONTEXT_LENGTH, dtype=torch.bool)
    key_mask[1] = False
    out = module(x, context, key_mask=key_mask)
    assert torch.equal(out[REPEATS : 2 * REPEATS], module.out_proj.bias.expand(REPEATS, LENGTH, EMBED_DIM))


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("sizes", [(0, 7, 0, 11), (0, 7, 3, 11), (6, 0, 3, 11), (6, 7, 3, 0)])
def test_nothing_to_attend_from_or_to(sizes: tuple[int, ...], is_fused: bool) -> None:
    rows, length, batch, context_length = sizes
    module = make()
    x = torch.randn(rows, length, EMBED_DIM).double()
    context = torch.randn(batch, context_length, CONTEXT_DIM).double()
    if is_fused:
        module.requires_grad_(False).fuse()
    out = module(x, context, key_mask=torch.ones(batch, context_length, dtype=torch.bool))
    assert torch.equal(out, module.out_proj.bias.expand(rows, length, EMBED_DIM))
    if not is_fused:
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("context_length", [1, 3])
def test_gradients_reach_the_shared_context(x: Tensor, context: Tensor, context_length: int) -> None:
    module = make(qk_norm="layer")
    inputs = x[:4, :2].clone().requires_grad_()
    shared = context[:2, :context_length].clone().requires_grad_()
    assert torch.autograd.gradcheck(module, (inputs, shared))
    module(inputs, shared).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@torch.no_grad()
def test_no_rows_of_a_shared_context(x: Tensor, context: Tensor) -> None:
    mask = torch.ones(0, x.shape[1], context.shape[1], dtype=torch.bool)
    assert make()(x[:0], context, attn_mask=mask).shape == x[:0].shape


@torch.no_grad()
def test_layer_shares_one_context_among_rows(x: Tensor, context: Tensor, key_mask: Tensor) -> None:
    torch.manual_seed(7)
    layer = TransformerLayer(
        EMBED_DIM, NUM_HEADS, 13, has_cross_attention=True, context_dim=CONTEXT_DIM, is_causal=True, norm="rms"
    )
    layer.double().eval()
    expected = layer(
        x, context=context.repeat_interleave(REPEATS, dim=0), context_mask=key_mask.repeat_interleave(REPEATS, dim=0)
    )
    shared = layer(x, context=context, context_mask=key_mask)
    projected = layer(x, context=layer.project_context(context, key_mask))
    torch.testing.assert_close(shared, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(projected, expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_wrong_arguments_are_named(x: Tensor, context: Tensor) -> None:
    module = make()
    with pytest.raises(UsageError, match="x has 15 rows and the context 0"):
        module(x, context[:0])
    cu_seqlens = torch.tensor([0, 4, 11])
    with pytest.raises(UsageError, match=r"not by a Tensor: Segments\.of\(lengths\), or Segments\.of\(cu_seqlens\."):
        module(x[0], context[0], segments=Segments.of([3, 4]), context_segments=cu_seqlens)  # type: ignore[arg-type]
    assert Segments.of(cu_seqlens.diff()).lengths == (4, 7)
    with pytest.raises(UsageError, match="x has 14 rows and the context 3: x needs a multiple"):
        module(x[1:], context)
    with pytest.raises(UsageError, match=r"context has shape \[3, 11, 16\], expected \[batch, length, 17\]"):
        module(x, context[..., 1:])
    with pytest.raises(UsageError, match=r"x has shape \[15, 24\], expected \[batch, length, 24\]"):
        module(x[:, 0], context)
    for shape in [(3, 7, 11), (6, 11), (7, 13), (15, 3, 7, 11), (15, 7, 13), (11,)]:
        expected = rf"attn_mask has shape {list(shape)}, expected [7, 11], [15, 7, 11], [15, 6, 7, 11], or 1"
        with pytest.raises(UsageError, match=re.escape(expected)):
            module(x, context, attn_mask=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(UsageError, match="attn_mask is a list"):
        module(x, context, attn_mask=[[True] * 11] * 7)  # type: ignore[arg-type]
    own = module.project_context(context, torch.ones(3, CONTEXT_LENGTH, dtype=torch.bool))
    for mask in (torch.ones(ROWS, CONTEXT_LENGTH), torch.ones(3, 13), torch.ones(1, CONTEXT_LENGTH)):
        for given in (context, own):
            with pytest.raises(UsageError, match=r"key_mask is torch.bool .* must be boolean \[B, Lk\] = \[3, 11\]"):
                module(x, given, key_mask=mask.bool())
    with pytest.raises(UsageError, match="key_mask is torch.float32"):
        module(x, own, key_mask=torch.ones(3, CONTEXT_LENGTH))
    with pytest.raises(UsageError, match="context is a NoneType, not a tensor"):
        module(x, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="CrossAttention: scale is inf, it must be a finite number"):
        make(scale=float("inf"))
    with pytest.raises(UsageError, match="does not fit key"):
        module(x, ContextKV(torch.zeros(3, 4, 2, 4).double(), torch.zeros(3, 4, 2, 4).double()))


@torch.no_grad()
def test_layer_names_arguments_without_a_use(x: Tensor, context: Tensor) -> None:
    plain = TransformerLayer(EMBED_DIM, NUM_HEADS, 13).double()
    with pytest.raises(UsageError, match="a context was given, but it has no cross-attention"):
        plain(x, context=context)
    with pytest.raises(UsageError, match="the layer has no cross-attention"):
        plain.project_context(context)
    with pytest.raises(UsageError, match="context_mask, context_attn_mask and context_segments need a cross-attention"):
        plain(x, context_mask=torch.ones(ROWS, CONTEXT_LENGTH, dtype=torch.bool))
    cross = TransformerLayer(
        EMBED_DIM, NUM_HEADS, 13, has_self_attention=False, has_cross_attention=True, context_dim=CONTEXT_DIM
    ).double()
    assert cross(x, context=context).shape == x.shape
    with pytest.raises(UsageError, match="no context was given, but it has cross-attention"):
        cross(x)
    with pytest.raises(UsageError, match="need a self-attention"):
        cross(x, context=context, key_mask=torch.ones(ROWS, LENGTH, dtype=torch.bool))
    with pytest.raises(UsageError, match="context_dim is given without has_cross_attention"):
        TransformerLayer(EMBED_DIM, NUM_HEADS, 13, context_dim=CONTEXT_DIM)
    with pytest.raises(UsageError, match="need has_self_attention"):
        TransformerLayer(EMBED_DIM, NUM_HEADS, 13, has_self_attention=False, has_cross_attention=True, is_causal=True)
