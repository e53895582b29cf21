"""Weights from queries, keys and the log-sum-exp beside the eager ones, by the tolerance rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmattn.maps.capture import SeenAttention, watching
from mmattn.maps.weights import RowCall, kept_weights
from mmattn.ops.attention import attention
from tests.tolerance import check_within

H, LQ, LK, D = 6, 37, 13, 5
MASKS = ["none", "padding", "boolean", "bias", "empty"]


def inputs(dtype: torch.dtype, groups: int = H, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, n, length, D, generator=draw) for n, length in ((H, LQ), (groups, LK)))
    return query.to(dtype), key.to(dtype)


def make_mask(kind: str):
    draw = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "padding":
        return (torch.arange(LK) < 7)[None, None, None]
    mask = torch.rand(1, H, LQ, LK, generator=draw) > 0.4
    if kind == "empty":
        mask[:, :, 3] = False
        return mask
    return mask if kind == "boolean" else torch.randn(1, 1, LQ, LK, generator=draw).masked_fill(~mask[:, :1], -1e4)


def specification(query, key, mask):
    mask = mask.to(query.dtype) if mask is not None and mask.is_floating_point() else mask
    return attention(query, key, key, attn_mask=mask, backend="eager", return_weights=True)[1]


def log_sum_exp(query, key, mask):
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.float().mT * D**-0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return scores.logsumexp(-1)


@pytest.mark.parametrize("has_lse", [False, True], ids=["softmax", "lse"])
@pytest.mark.parametrize("groups", [H, 2])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_keep_the_tolerance_rule(dtype, kind, groups, has_lse, monkeypatch):
    monkeypatch.setattr("mmattn.maps.weights._CHUNK_BYTES", 4 * H * LK * 7)  # seven queries at a time
    query, key = inputs(dtype, groups)
    mask = make_mask(kind)
    lse = log_sum_exp(query, key, mask)[0] if has_lse else None
    reference = specification(query.double(), key.double(), mask)[0]
    # Half types are computed in float32 on both sides, and stored in float32 here.
    eager = specification(query.float(), key.float(), mask)[0]
    largest = (query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max()).item() * D**-0.5
    slack = 2 * torch.finfo(torch.float32).eps * (1 + largest)
    call = RowCall(query[0], key[0], D**-0.5, None if mask is None else mask[0], lse)
    kept, heads = torch.tensor([11, 0, 5]), [4, 1]
    cases = {
        "all": (kept_weights(call), lambda w: w),
        "keys": (kept_weights(call, keys=kept), lambda w: w[:, :, kept]),
        "heads": (kept_weights(call, heads=heads), lambda w: w[heads]),
        "mean": (
            kept_weights(call, keys=kept, heads=heads, average=True),
            lambda w: w[heads][:, :, kept].mean(0)[None],
        ),
    }
    for what, (got, pick) in cases.items():
        assert got.dtype is torch.float32
        check_within(got, pick(eager), pick(reference), factor=2, what=what, unavoidable=slack)
    rows = kept_weights(call).sum(-1)
    filled = torch.ones(H, LQ, dtype=torch.bool)
    if kind == "empty":
        filled[:, 3] = False
        assert not kept_weights(call)[:, 3].any()
    assert torch.allclose(rows[filled], torch.ones(()), atol=1e-5)


class Stock(nn.Module):
    """Attention as other libraries write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads = how, H
        self.fails = False

    def forward(self, query, key, mask=None):
        if self.fails:
            raise RuntimeError("broken")
        if self.how == "fused":
            return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
        if self.how == "causal":
            return F.scaled_dot_product_attention(query, key, key, is_causal=True)
        scores = query @ key.mT * D**-0.5
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        if self.how == "softmax":
            return torch.softmax(scores, dim=-1) @ key
        if self.how == "slices":
            flat = scores.flatten(0, 1)
            return torch.cat([part.softmax(dim=-1) for part in flat.split(4)]).view(scores.shape) @ key
        return query + 1


def watch(module, *args, wants=lambda: True, **kwargs):
    seen: list[SeenAttention | None] = []
    with watching([module], wants, lambda module, each: seen.append(each)):
        output = module(*args, **kwargs)
    return output, seen


@pytest.mark.parametrize("how", ["fused", "softmax", "slices", "causal"])
@pytest.mark.parametrize("kind", ["none", "boolean"])
def test_what_stock_attention_does_is_seen_and_stays(how, kind):
    pairs = zip(inputs(torch.float32), inputs(torch.float32, seed=2), strict=True)
    query, key = (torch.cat(pair) for pair in pairs)
    mask = None if how == "causal" else make_mask(kind)
    module = Stock(how)
    plain = module(query, key, mask)
    hooks = (dict(module._forward_hooks), dict(module._forward_pre_hooks))
    output, (seen,) = watch(module, query, key, mask)
    assert torch.equal(plain, output)
    assert (dict(module._forward_hooks), dict(module._forward_pre_hooks)) == hooks
    assert seen is not None
    assert seen.sizes == (H, LQ, LK)
    causal = torch.ones(LQ, LK, dtype=torch.bool).tril() if how == "causal" else mask
    expected = specification(query, key, causal)
    for row in range(2):
        got = seen.kept(row, torch.tensor([2, 12]), None, average=True)
        assert torch.allclose(got, expected[row][:, :, [2, 12]].mean(0)[None], atol=1e-6)


def test_the_fused_kernels_log_sum_exp_is_used():
    query, key = inputs(torch.float32)
    _, (seen,) = watch(Stock("fused"), query, key)
    assert seen is not None
    assert seen.log_sum_exp is not None
    assert torch.allclose(seen.log_sum_exp, log_sum_exp(query, key, None), atol=1e-5)


def test_what_is_not_wanted_or_not_attention_or_fails():
    query, key = inputs(torch.float32)
    assert watch(Stock("fused"), query, key, wants=lambda: False)[1] == []
    assert watch(Stock("nothing"), query, key)[1] == [None]
    module = Stock("fused")
    module.fails = True
    seen: list[object] = []
    with watching([module], lambda: True, lambda module, each: seen.append(each)):
        with pytest.raises(RuntimeError, match="broken"):
            module(query, key)
        assert torch.overrides._len_torch_function_stack() == 0
        module.fails = False
        module(query, key)
    assert len(seen) == 1


def test_two_watchers_see_the_same():
    query, key = inputs(torch.float32)
    module, seen = Stock("fused"), []
    with watching([module], lambda: True, lambda m, each: seen.append(each)):
        with watching([module], lambda: True, lambda m, each: seen.append(each)):
            module(query, key)
        module(query, key)
    assert len(seen) == 3
    assert torch.equal(*(each.kept(0, None, None, average=True) for each in seen[:2]))
    assert torch.overrides._len_torch_function_stack() == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_in_the_backward_pass_is_not_seen_again(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    query, key = inputs(torch.float32)
    query.requires_grad_()
    module, seen = Stock("fused"), []
    with watching([module], lambda: True, lambda m, each: seen.append(each)):
        checkpoint(module, query, key, use_reentrant=use_reentrant).sum().backward()
    assert len(seen) == 1
    assert query.grad is not None


@pytest.mark.parametrize("how", ["fused", "softmax"])
def test_a_module_that_cuts_its_input_into_windows(how):
    """As picture encoders do: each window is a row of its own."""
    query, key = inputs(torch.float32)
    attend = Stock(how)

    class Windows(nn.Module):
        def forward(self, states):
            return attend(states.unflatten(2, (-1, 2)).transpose(1, 2).flatten(0, 1), windows)

    windows = torch.cat([key[:, :, :LK]] * (LQ // 2))
    states = query[:, :, : LQ // 2 * 2]
    _, (seen,) = watch(Windows(), states)
    assert seen is not None
    assert seen.rows == len(windows)
    for row in range(seen.rows):
        part = states[:, :, 2 * row : 2 * row + 2]
        assert torch.allclose(seen.kept(row, None, None, average=False), specification(part, key, None)[0], atol=1e-6)
