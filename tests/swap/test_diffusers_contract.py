"""Our plain processor against its contract: everything that an `Attention` module may have, written out in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from torch import Tensor

import mmattn
from mmattn.errors import UsageError
from mmattn.ops.tolerance import deviation
from mmattn.swap.diffusers.contracts import CONTRACTS, SETTINGS
from mmattn.swap.diffusers.processors import SwappedAttnProcessor

from .diffusers_pieces import draw
from .zoo_base import liven, seeded

B, L, LK, HEADS, SIZE = 2, 15, 11, 3, 7  # odd and prime; the picture is 3 x 5
WIDTH, CONTEXT, CODE = 20, 12, 6


def attention_module(*, context: int | None = None, **settings: Any) -> Attention:
    values = {"query_dim": WIDTH, "cross_attention_dim": context, "heads": HEADS, "dim_head": SIZE}
    return seeded(lambda: liven(Attention(**values | settings)))()


@torch.no_grad()
def by_hand(attn: Any, states: Tensor, text: Tensor | None = None, bias: Tensor | None = None, temb: Any = None):
    """Attention in steps that anybody can read; a bias is added to scores of [B, H, Lq, Lk]."""
    residual = states
    if attn.spatial_norm is not None:
        states = attn.spatial_norm(states, temb)
    is_picture = states.dim() == 4
    if is_picture:
        states = states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        states = attn.group_norm(states.transpose(1, 2)).transpose(1, 2)
    source = states if text is None else text
    if text is not None and isinstance(attn.norm_cross, torch.nn.LayerNorm):
        source = attn.norm_cross(source)
    if text is not None and isinstance(attn.norm_cross, torch.nn.GroupNorm):
        source = attn.norm_cross(source.transpose(1, 2)).transpose(1, 2)
    query, key, value = attn.to_q(states), attn.to_k(source), attn.to_v(source)
    heads = attn.heads
    size = query.shape[-1] // heads
    kv_heads = key.shape[-1] // size

    def normed(norm: Any, flat: Tensor, count: int) -> Tensor:
        widths = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
        if count > 1 and isinstance(widths, tuple) and widths[-1] == flat.shape[-1]:
            return norm(flat).view(B, -1, count, size).transpose(1, 2)
        split = flat.view(B, -1, count, size).transpose(1, 2)
        return norm(split) if norm else split

    query, key = normed(attn.norm_q, query, heads), normed(attn.norm_k, key, kv_heads)
    value = normed(None, value, kv_heads)
    key, value = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * attn.scale
    if attn.is_causal and text is None:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    output = (scores.softmax(-1) @ value).transpose(1, 2).reshape(B, -1, heads * size)
    output = attn.to_out[0](output)
    if is_picture:
        output = output.transpose(1, 2).reshape(residual.shape)
    if attn.residual_connection:
        output = output + residual
    return output / attn.rescale_output_factor


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(attn: Attention, states: Tensor, text: Any = None, mask: Any = None, bias: Any = None, temb: Any = None):
    """Ours within the rule of the same in float64; `mask` is what the layer is given, `bias` what it means."""
    attn.set_processor(SwappedAttnProcessor())
    with torch.no_grad():
        ours = attn(states, encoder_hidden_states=text, attention_mask=mask, temb=temb)
    low = by_hand(attn, states, text, bias, temb)
    exact = by_hand(copy.deepcopy(attn).double(), *map(double, (states, text, bias, temb)))
    assert ours.shape == states.shape
    found = deviation(ours, low, exact)
    assert found.is_within, found
    return ours


SELF = {
    "plain": {},
    "bias": {"bias": True},
    "no output bias": {"out_bias": False},
    "one head": {"heads": 1},
    "group norm": {"norm_num_groups": 4},
    "residual": {"residual_connection": True},
    "residual, rescaled": {"residual_connection": True, "rescale_output_factor": 2**0.5},
    "as in a VAE": {
        "norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.3, "bias": True,
        "upcast_softmax": True,
    },
    "layer norm of heads": {"qk_norm": "layer_norm"},
    "layer norm of heads in float32": {"qk_norm": "fp32_layer_norm"},
    "layer norm across heads": {"qk_norm": "layer_norm_across_heads", "kv_heads": HEADS},
    "rms norm of heads": {"qk_norm": "rms_norm"},
    "rms norm across heads": {"qk_norm": "rms_norm_across_heads", "kv_heads": HEADS},
    "l2 norm of heads": {"qk_norm": "l2"},
    "a scale of 1": {"scale_qk": False},
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
    "causal": {"is_causal": True},
    "grouped heads": {"heads": 6, "kv_heads": 2},
    "grouped heads with norms": {"heads": 6, "kv_heads": 2, "qk_norm": "rms_norm_across_heads"},
    "one key head": {"heads": 4, "kv_heads": 1, "qk_norm": "layer_norm"},
}  # fmt: skip


@pytest.mark.parametrize("name", SELF)
def test_self_attention(name):
    attn = attention_module(**SELF[name])
    check(attn, draw(B, L, WIDTH))
    check(attn, draw(B, WIDTH, 3, 5))


@pytest.mark.parametrize("name", [name for name in SELF if name != "causal"])
def test_cross_attention(name):
    check(attention_module(context=CONTEXT, **SELF[name]), draw(B, L, WIDTH), draw(B, LK, CONTEXT, seed=1))


@pytest.mark.parametrize("norm", ["layer_norm", "group_norm"])
def test_norm_of_the_context(norm):
    attn = attention_module(context=CONTEXT, cross_attention_norm=norm, cross_attention_norm_num_groups=4)
    check(attn, draw(B, L, WIDTH), draw(B, LK, CONTEXT, seed=1))


def test_causal_cross_attention_sees_the_whole_context():
    attn = attention_module(context=CONTEXT, is_causal=True)
    check(attn, draw(B, L, WIDTH), draw(B, LK, CONTEXT, seed=1))


def test_spatial_norm():
    attn = seeded(
        lambda: liven(
            Attention(64, heads=2, dim_head=32, spatial_norm_dim=CODE, residual_connection=True, norm_num_groups=32)
        )
    )()
    check(attn, draw(B, 64, 3, 5), temb=draw(B, CODE, 3, 5, seed=2))


def test_inputs_that_are_not_contiguous():
    attn = attention_module(context=CONTEXT)
    states, text = draw(B, WIDTH, L).transpose(1, 2), draw(B, 2 * LK, CONTEXT, seed=1)[:, ::2]
    assert not states.is_contiguous()
    assert not text.is_contiguous()
    check(attn, states, text)
    check(attention_module(norm_num_groups=4), draw(B, 3, 5, WIDTH).permute(0, 3, 1, 2))
    check(attention_module(), draw(1, 1, WIDTH).expand(B, L, WIDTH))


def bias_of(*shape: int) -> Tensor:
    """A mask as models make it: 0 or -10000; every row keeps something."""
    mask = torch.where(draw(*shape, seed=3) > 0.3, -10000.0, 0.0)
    mask[..., 0] = 0
    return mask


MASKS = {  # what a layer is given, and the same as a bias of [B, H, Lq, Lk]
    "[B, Lk]": ((B, LK), lambda mask: mask[:, None, None]),
    "[B, 1, Lk]": ((B, 1, LK), lambda mask: mask[:, None]),
    "[B, Lq, Lk]": ((B, L, LK), lambda mask: mask[:, None]),
    "[B H, 1, Lk]": ((B * HEADS, 1, LK), lambda mask: mask.unflatten(0, (B, HEADS))),
    "[B H, Lq, Lk]": ((B * HEADS, L, LK), lambda mask: mask.unflatten(0, (B, HEADS))),
    "[B, 1, 1, Lk]": ((B, 1, 1, LK), lambda mask: mask),
}


@pytest.mark.parametrize("drop_padding", [False, True])
@pytest.mark.parametrize("kind", ["additive", "smooth", "boolean"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, kind, drop_padding):
    shape, as_bias = MASKS[name]
    mask = draw(*shape, seed=4) if kind == "smooth" else bias_of(*shape)
    bias = as_bias(mask)
    if kind == "boolean":
        mask = mask == 0
    attn = attention_module(context=CONTEXT)
    states, text = draw(B, L, WIDTH), draw(B, LK, CONTEXT, seed=1)
    ours = SwappedAttnProcessor()
    ours.settings.drop_padding = drop_padding
    attn.set_processor(ours)
    with torch.no_grad():
        got = attn(states, encoder_hidden_states=text, attention_mask=mask)
        attn.set_processor(stock.AttnProcessor2_0())
        expected = attn(states, encoder_hidden_states=text, attention_mask=mask)
    low = by_hand(attn, states, text, bias)
    exact = by_hand(copy.deepcopy(attn).double(), *map(double, (states, text, bias)))
    found = deviation(got, low, exact)
    assert found.is_within, found
    assert (got - expected).abs().max() <= 2 * found.bound


@pytest.mark.parametrize("shape", [(B, L), (B, 1, L), (B, L, L), (B * HEADS, L, L)])
def test_masks_of_self_attention(shape):
    mask = bias_of(*shape)
    bias = mask.unflatten(0, (B, HEADS)) if shape[0] == B * HEADS else mask.view(B, 1, -1, L)
    check(attention_module(), draw(B, L, WIDTH), mask=mask, bias=bias)


@pytest.mark.parametrize("shape", [(B, LK + 1), (B, 1, LK - 2), (B + 1, LK), (B, L - 1, LK), (LK,), (B, 2, 1, LK)])
def test_a_mask_that_does_not_fit_is_named(shape):
    attn = attention_module(context=CONTEXT)
    attn.set_processor(SwappedAttnProcessor())
    with pytest.raises(UsageError, match=r"attention_mask|attn_mask"):
        attn(draw(B, L, WIDTH), encoder_hidden_states=draw(B, LK, CONTEXT), attention_mask=torch.zeros(shape))


# Settings, as they are given; each class is tried with those that its table says it ignores.
GIVEN = {
    "scale_qk": {"scale_qk": False},
    "is_causal": {"is_causal": True},
    "qk_norm": {"qk_norm": "rms_norm"},
    "spatial_norm": {"spatial_norm_dim": CODE, "query_dim": 64, "norm_num_groups": 32},
    "group_norm": {"norm_num_groups": 4},
    "residual_connection": {"residual_connection": True},
    "rescale_output_factor": {"rescale_output_factor": 2.0},
    "norm_cross": {"context": CONTEXT, "cross_attention_norm": "layer_norm"},
}
IGNORED = [
    (cls, setting)
    for cls, contract in CONTRACTS.items()
    for setting in contract.skipped
    if "XFormers" not in cls.__name__ and "IPAdapter" not in cls.__name__
]


def test_every_setting_is_tried():
    assert set(GIVEN) == set(SETTINGS)


@pytest.mark.parametrize(("cls", "setting"), IGNORED, ids=lambda value: getattr(value, "__name__", value))
def test_a_setting_that_stock_ignores_leaves_the_layer_alone(cls, setting):
    attn = attention_module(**GIVEN[setting])
    processor = cls(1) if "Sliced" in cls.__name__ else cls()
    attn.set_processor(processor)
    with pytest.raises(UsageError, match=f"{cls.__name__} ignores .*{setting}.* of this layer, ours would not"):
        mmattn.swap_attention(attn)
    assert attn.processor is processor


@pytest.mark.parametrize("cls", [stock.AttnProcessor, stock.AttnProcessor2_0, stock.SlicedAttnProcessor])
@pytest.mark.parametrize("setting", GIVEN)
def test_a_setting_that_stock_honours_is_kept(cls, setting):
    if setting in CONTRACTS[cls].skipped:
        return
    attn = attention_module(**GIVEN[setting])
    attn.set_processor(cls(1) if "Sliced" in cls.__name__ else cls())
    text = draw(B, LK, CONTEXT, seed=1) if setting == "norm_cross" else None
    states = draw(B, attn.query_dim, 3, 5)
    temb = draw(B, CODE, 3, 5, seed=2)
    with torch.no_grad():
        expected = attn(states, encoder_hidden_states=text, temb=temb)
    with mmattn.swap_attention(attn) as swapped:
        assert setting in swapped.layers[0].features
        assert swapped.verify().is_ok
        with torch.no_grad():
            ours = attn(states, encoder_hidden_states=text, temb=temb)
    low = by_hand(attn, states, text, temb=temb)
    exact = by_hand(copy.deepcopy(attn).double(), *map(double, (states, text)), temb=temb.double())
    found = deviation(ours, low, exact)
    assert found.is_within
    assert (ours - expected).abs().max() <= 2 * found.bound


def test_ignoring_matters():
    """What the tables are for: stock's output is not the one that its module asks for."""
    for setting, cls in (("scale_qk", stock.AttnProcessor2_0), ("qk_norm", stock.AttnProcessor)):
        attn = attention_module(**GIVEN[setting])
        attn.set_processor(cls())
        states = draw(B, L, WIDTH)
        with torch.no_grad():
            assert (attn(states) - by_hand(attn, states)).abs().max() > 0.05


def test_layers_without_projections_are_left_alone():
    for attn in (attention_module(pre_only=True), attention_module()):
        if attn.to_out is not None:
            attn.fuse_projections()
            attn.to_k = attn.to_v = None  # as the time-aware resampler of SD3's IP-Adapter does
        with pytest.raises(UsageError, match="its model computes attention by itself"):
            mmattn.swap_attention(attn)
