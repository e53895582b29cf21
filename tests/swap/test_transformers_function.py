"""The attention function that transformers calls: masks, causality, keywords, weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.models.bart.modeling_bart import eager_attention_forward

from mmattn.errors import BackendError, UsageError
from mmattn.ops.observe import observing
from mmattn.swap.attend import computing_reference
from mmattn.swap.transformers.interface import mmattn_attention
from mmattn.swap.transformers.settings import Settings

B, H, G, LQ, LK, D = 3, 6, 2, 7, 11, 5


def caller(role="self", implementation="sdpa", backend="auto", unsupported=(), **attributes):
    module = nn.Module()
    module.config = SimpleNamespace(_attn_implementation_internal=implementation, output_attentions=False)
    module.num_key_value_groups = H // G
    for name, value in attributes.items():
        setattr(module, name, value)
    settings = Settings(role, backend, "model.layer (self-attention)", frozenset(unsupported))
    module._mmattn = settings
    return module.eval()


def tensors(num_queries=LQ, num_keys=LK, heads=H, groups=G, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, num_queries), (groups, num_keys), (groups, num_keys))
    return [torch.randn(B, each, length, D, generator=generator) for each, length in sizes]


def padding(num_queries=LQ, num_keys=LK):
    mask = torch.arange(num_keys) < torch.tensor([11, 5, 2])[:, None]
    return mask[:, None, None].repeat(1, 1, num_queries, 1)


def close(ours, stock):
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        padding(),
        padding(1),
        padding()[:1],
        padding(1).expand(B, 1, LQ, LK),
        torch.rand(B, 1, LQ, LK, generator=torch.Generator().manual_seed(1)) > 0.3,
        torch.rand(B, H, LQ, LK, generator=torch.Generator().manual_seed(2)) > 0.3,
        torch.rand(LQ, LK, generator=torch.Generator().manual_seed(3)) > 0.3,
        torch.where(padding(), 0.0, torch.finfo(torch.float32).min),
        torch.where(padding(1), 0.0, -torch.inf),
        torch.randn(1, H, LQ, LK, generator=torch.Generator().manual_seed(4)),
    ],
    ids=[
        "padding",
        "one_row",
        "one_batch",
        "expanded",
        "general",
        "by_head",
        "two_axes",
        "float",
        "one_row_float",
        "bias",
    ],
)
def test_masks_are_honoured(mask, has_bias):
    bias = torch.randn(1, H, LQ, LK, generator=torch.Generator().manual_seed(5)) if has_bias else None
    arguments = (*tensors(), mask)
    ours = mmattn_attention(caller(is_causal=False), *arguments, position_bias=bias, scaling=0.7)
    close(ours, sdpa_attention_forward(caller(is_causal=False), *arguments, position_bias=bias, scaling=0.7))
    assert ours[0].shape == (B, LQ, H, D)
    assert ours[0].is_contiguous()
    assert ours[1] is None


@pytest.mark.parametrize(
    ("mask", "is_padding"),
    [
        (padding(), True),
        (padding(1), True),
        (padding(1).expand(B, 1, LQ, LK), True),
        (padding(1)[:1], True),
        (sdpa_mask(B, LQ, LK, mask_function=causal_mask_function, allow_is_causal_skip=False), False),
        (padding().expand(B, H, LQ, LK), False),
        (torch.where(padding(), 0.0, -torch.inf), False),
    ],
)
def test_padding_goes_in_as_a_key_mask(mask, is_padding):
    calls = []
    with observing(calls.append):
        mmattn_attention(caller(), *tensors(), mask)
    (call,) = calls
    assert (call.key_mask is not None, call.attn_mask is None) == (is_padding, is_padding)
    if is_padding:
        assert torch.equal(call.key_mask, mask[:, 0, 0].expand(B, LK))


def test_a_mask_with_one_other_row_is_not_padding():
    mask = padding()
    mask[1, 0, 3, 4] = False
    calls = []
    with observing(calls.append):
        mmattn_attention(caller(), *tensors(), mask)
    assert calls[0].key_mask is None


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("keyword", [True, False, None])
@pytest.mark.parametrize("num_keys", [LQ, LK, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_self_attention_without_a_mask_is_causal_as_in_stock(flag, keyword, num_keys, has_bias):
    attributes = {} if flag is None else {"is_causal": flag}
    bias = torch.randn(1, H, LQ, num_keys) if has_bias else None
    arguments = (*tensors(num_keys=num_keys), None)
    ours = mmattn_attention(caller(**attributes), *arguments, is_causal=keyword, position_bias=bias)
    close(ours, sdpa_attention_forward(caller(**attributes), *arguments, is_causal=keyword, position_bias=bias))


def test_one_query_sees_every_key():
    arguments = (*tensors(num_queries=1), None)
    close(
        mmattn_attention(caller(is_causal=True), *arguments),
        sdpa_attention_forward(caller(is_causal=True), *arguments),
    )


@pytest.mark.parametrize(("role", "implementation"), [("cross", "sdpa"), ("cross", "eager"), ("self", "eager")])
@pytest.mark.parametrize("attributes", [{}, {"is_causal": True}])
def test_cross_attention_and_stocks_eager_are_never_causal_by_a_flag(role, implementation, attributes):
    arguments = (*tensors(heads=H, groups=H), None)
    ours = mmattn_attention(caller(role, implementation, **attributes), *arguments)
    close(ours, eager_attention_forward(caller(), *arguments))


def test_keys_of_one_row_serve_all_queries():
    query, key, value = tensors()
    close(
        mmattn_attention(caller("cross"), query, key[:1], value[:1], None),
        mmattn_attention(caller("cross"), query, key[:1].expand_as(key), value[:1].expand_as(value), None),
    )


def test_values_may_be_narrower_than_keys():
    """As those of Conditional DETR, whose positions stand beside what is attended to."""
    query, key, value = tensors(heads=H, groups=H)
    ours = mmattn_attention(caller("cross"), query, key, value[..., :2], padding())
    close(ours, sdpa_attention_forward(caller("cross", num_key_value_groups=1), query, key, value[..., :2], padding()))


def test_zero_positions_of_cross_attention_leave_padding_on_the_fast_path():
    calls, zeros = [], torch.zeros(1, H, LQ, LK)
    with observing(calls.append):
        mmattn_attention(caller("cross"), *tensors(), padding(), position_bias=zeros)
        mmattn_attention(caller("self"), *tensors(), padding(), position_bias=zeros)
        mmattn_attention(caller("cross"), *tensors(), padding(), position_bias=zeros.clone().requires_grad_())
    assert [call.attn_mask is None for call in calls] == [True, False, False]
    assert all(call.key_mask is not None for call in calls)


def test_a_row_that_may_see_nothing_is_zero():
    mask = padding()
    mask[1] = False
    output, _ = mmattn_attention(caller(), *tensors(), mask, position_bias=torch.randn(1, H, LQ, LK))
    assert not output[1].any()
    assert output[0].any()


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "indices", "head_mask"])
def test_keywords_that_change_the_result_are_refused(name):
    expected = (
        rf"^model\.layer \(self-attention\): {name}= changes the result, and mmattn's attention does not support it$"
    )
    with pytest.raises(UsageError, match=expected):
        mmattn_attention(caller(), *tensors(), None, **{name: torch.ones(1)})
    mmattn_attention(caller(), *tensors(), None, **{name: None})


def test_keywords_of_the_classs_own_function_are_refused():
    with pytest.raises(UsageError, match="tilt= changes the result"):
        mmattn_attention(caller(unsupported=["tilt"]), *tensors(), None, tilt=2)


def test_keywords_that_stock_ignores_are_ignored():
    arguments = (*tensors(), padding())
    plain = mmattn_attention(caller(), *arguments)
    other = mmattn_attention(
        caller(),
        *arguments,
        output_attentions=False,
        position_ids=torch.arange(LQ),
        cache_position=torch.arange(LQ),
        use_cache=True,
        sliding_window=3,
        cu_seq_lens_q=torch.tensor([0, 3, 7]),
    )
    assert torch.equal(plain[0], other[0])


@pytest.mark.parametrize(
    ("name", "given", "shown"),
    [("sliding_window", 8, "8"), ("cu_seq_lens_q", torch.tensor([0, 3, 7]), "[3]")],
)
def test_windows_and_packed_rows_need_the_mask_that_says_so(name, given, shown):
    message = f"model.layer (self-attention): {name}={shown} without an attention_mask that says the same"
    with pytest.raises(UsageError) as error:
        mmattn_attention(caller(), *tensors(), None, **{name: given})
    assert str(error.value) == message
    inside = {"sliding_window": LK, "cu_seq_lens_q": torch.tensor([0, 7])}
    mmattn_attention(caller(), *tensors(), None, **{name: inside[name]})


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_masks_of_other_implementations_are_refused(implementation):
    with pytest.raises(UsageError) as error:
        mmattn_attention(caller(implementation=implementation), *tensors(), None)
    assert str(error.value) == (
        f"model.layer (self-attention): {implementation} made a NoneType as its mask, which mmattn's attention cannot "
        'read; call model.set_attn_implementation("sdpa"), or restore() the swap'
    )


def test_a_block_mask_is_refused():
    mask = create_block_mask(lambda b, h, query, key: key <= query, B, None, LQ, LK, device="cpu")
    with pytest.raises(UsageError, match="sdpa made a BlockMask as its mask"):
        mmattn_attention(caller(), *tensors(), mask)


@pytest.mark.parametrize("how", ["keyword", "config"])
def test_weights_are_returned_where_they_are_asked_for(how):
    module, keywords = caller(implementation="eager"), {}
    if how == "keyword":
        keywords["output_attentions"] = True
    else:
        module.config.output_attentions = True
    query, key, value = tensors(heads=H, groups=H)
    mask = torch.where(padding(), 0.0, torch.finfo(torch.float32).min)
    output, weights = mmattn_attention(module, query, key, value, mask, **keywords)
    stock = eager_attention_forward(module, query, key, value, mask)
    close((output,), stock)
    torch.testing.assert_close(weights, stock[1])
    with computing_reference("float64"):
        assert mmattn_attention(module, query, key, value, mask, **keywords)[1] is None


def test_a_named_backend_that_has_no_weights_says_so():
    with pytest.raises(BackendError, match="'sdpa' cannot serve this call"):
        mmattn_attention(caller(backend="sdpa"), *tensors(), None, output_attentions=True)


def test_dropout_needs_training():
    module, arguments = caller("cross"), (*tensors(), padding())
    kept = mmattn_attention(module, *arguments, dropout=0.5)[0]
    assert torch.equal(kept, mmattn_attention(module, *arguments)[0])
    assert not torch.equal(kept, mmattn_attention(module.train(), *arguments, dropout=0.5)[0])


def test_references_are_computed_within_verify():
    module, arguments = caller("cross"), (*tensors(), padding())
    with computing_reference("float64"):
        reference = mmattn_attention(module, *arguments)[0]
    wanted = mmattn_attention(module, *(each.double() for each in tensors()), padding())[0]
    torch.testing.assert_close(reference, wanted.float(), rtol=0, atol=0)
