"""Our processors for added keys and values, joint attention and IP-Adapters, against stock's on single layers."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from torch import nn

import mmattn
from mmattn.errors import UsageError
from mmattn.ops.tolerance import deviation

from .diffusers_pieces import draw
from .zoo_base import liven, seeded

B, CONTEXT, LK, HEADS, SIZE = 2, 10, 5, 3, 4
WIDTH = HEADS * SIZE  # stock's processors of added keys want them equal
SIDE = (3, 5)


def module(processor, **settings) -> Attention:
    values = {"query_dim": WIDTH, "heads": HEADS, "dim_head": SIZE, "processor": processor}
    return seeded(lambda: liven(Attention(**values | settings)))()


def check_like_stock(attn, run):
    """Ours within the rule of stock in float64, stock being what is there today."""
    expected, exact = run(attn), run(copy.deepcopy(attn).double())
    with mmattn.swap_attention(attn) as swapped:
        ours = run(attn)
        assert swapped.verify().is_ok
    after = run(attn)
    assert len(listed(ours)) == len(listed(expected))
    for got, low, high, again in zip(*map(listed, (ours, expected, exact, after)), strict=True):
        assert deviation(got, low, high).is_within
        assert torch.equal(again, low)


def listed(output):
    return output if isinstance(output, tuple) else (output,)


def typed(attn, value):
    return value.to(attn.to_q.weight.dtype) if value.is_floating_point() else value


ADDED = {
    "with the picture's own keys": {},
    "the text alone": {"only_cross_attention": True},
    "normed text": {
        "cross_attention_norm": "layer_norm",
        "cross_attention_dim": CONTEXT,
        "only_cross_attention": True,
    },
    "group-normed text": {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 5},
    "upcast": {"upcast_softmax": True, "upcast_attention": True},
    "bias": {"bias": True},
}


@pytest.mark.parametrize("name", ADDED)
@pytest.mark.parametrize(
    "cls", [stock.AttnAddedKVProcessor, stock.AttnAddedKVProcessor2_0, stock.SlicedAttnAddedKVProcessor]
)
def test_added_keys(cls, name):
    processor = cls(2) if "Sliced" in cls.__name__ else cls()
    attn = module(processor, added_kv_proj_dim=CONTEXT, norm_num_groups=4, **ADDED[name])

    @torch.no_grad()
    def run(attn):
        return attn(typed(attn, draw(B, WIDTH, *SIDE)), encoder_hidden_states=typed(attn, draw(B, LK, CONTEXT, seed=1)))

    check_like_stock(attn, run)


@pytest.mark.parametrize("cls", [stock.AttnAddedKVProcessor, stock.AttnAddedKVProcessor2_0])
def test_added_keys_with_a_mask_of_the_text(cls):
    attn = module(cls(), added_kv_proj_dim=CONTEXT, norm_num_groups=4)
    bias = torch.zeros(B, 1, LK)
    bias[0, :, 3:] = -10000

    @torch.no_grad()
    def run(attn):
        states, text = typed(attn, draw(B, WIDTH, *SIDE)), typed(attn, draw(B, LK, CONTEXT, seed=1))
        return attn(states, encoder_hidden_states=text, attention_mask=typed(attn, bias))

    check_like_stock(attn, run)


def test_added_keys_of_the_picture_itself():
    attn = module(stock.AttnAddedKVProcessor2_0(), added_kv_proj_dim=WIDTH, norm_num_groups=4)

    @torch.no_grad()
    def run(attn):
        return attn(typed(attn, draw(B, WIDTH, *SIDE)))

    check_like_stock(attn, run)


def test_a_mask_as_long_as_the_picture_is_still_the_texts():
    """Stock takes it for a mask of everything and fails."""
    length = SIDE[0] * SIDE[1]
    attn = module(stock.AttnAddedKVProcessor2_0(), added_kv_proj_dim=CONTEXT, norm_num_groups=4)
    states, text, bias = draw(B, WIDTH, *SIDE), draw(B, length, CONTEXT, seed=1), torch.zeros(B, 1, length)
    bias[:, :, LK:] = -10000
    with torch.no_grad(), pytest.raises(RuntimeError, match="must match the size"):
        attn(states, encoder_hidden_states=text, attention_mask=bias)
    with torch.no_grad(), mmattn.swap_attention(attn):
        masked = attn(states, encoder_hidden_states=text, attention_mask=bias)
        assert (masked - attn(states, encoder_hidden_states=text[:, :LK])).abs().max() < 1e-5


JOINT = {
    "both": {"context_pre_only": False},
    "the last block": {"context_pre_only": True},
    "normed": {"context_pre_only": False, "qk_norm": "rms_norm"},
    "layer-normed": {"context_pre_only": False, "qk_norm": "layer_norm"},
    "float32 norm": {"context_pre_only": False, "qk_norm": "fp32_layer_norm"},
}


@pytest.mark.parametrize("name", JOINT)
def test_joint_attention(name):
    attn = module(stock.JointAttnProcessor2_0(), added_kv_proj_dim=WIDTH, **JOINT[name])

    @torch.no_grad()
    def run(attn):
        return attn(typed(attn, draw(B, 15, WIDTH)), encoder_hidden_states=typed(attn, draw(B, LK, WIDTH, seed=1)))

    check_like_stock(attn, run)


def test_joint_attention_without_a_text():
    attn = module(stock.JointAttnProcessor2_0(), qk_norm="rms_norm")

    @torch.no_grad()
    def run(attn):
        return attn(typed(attn, draw(B, 15, WIDTH)))

    check_like_stock(attn, run)


def ip_adapter(*, scales=(0.7, 0.4), cls=stock.IPAdapterAttnProcessor2_0, tokens=(4, 2), **settings):
    def build():
        processor = cls(HEADS * SIZE, CONTEXT, num_tokens=list(tokens), scale=list(scales))
        for layer in (*processor.to_k_ip, *processor.to_v_ip):
            nn.init.normal_(layer.weight, std=CONTEXT**-0.5)
        return liven(Attention(WIDTH, CONTEXT, heads=HEADS, dim_head=SIZE, processor=processor, **settings))

    return seeded(build)()


def pictures(*counts, tokens=(4, 2)):
    return [draw(B, count, size, CONTEXT, seed=9 + count) for count, size in zip(counts, tokens, strict=True)]


@torch.no_grad()
def run_ip(attn, images=None, length=15, **named):
    text = typed(attn, draw(B, LK, CONTEXT, seed=1))
    images = pictures(1, 1) if images is None else images
    states = (text, [typed(attn, image) for image in images]) if isinstance(images, list) else typed(attn, images)
    return attn(typed(attn, draw(B, length, WIDTH)), encoder_hidden_states=states, **named)


@pytest.mark.parametrize("cls", [stock.IPAdapterAttnProcessor, stock.IPAdapterAttnProcessor2_0])
@pytest.mark.parametrize("scales", [(0.7, 0.4), (0.0, 0.4), (0.0, 0.0), (-1.0, 1.0)])
def test_ip_adapters(cls, scales):
    attn = ip_adapter(cls=cls, scales=scales)
    check_like_stock(attn, run_ip)
    check_like_stock(attn, lambda attn: run_ip(attn, pictures(3, 2)))


def test_ip_adapters_with_a_mask_of_the_text():
    bias = torch.zeros(B, 1, LK)
    bias[0, :, 3:] = -10000
    check_like_stock(ip_adapter(), lambda attn: run_ip(attn, attention_mask=typed(attn, bias)))


def test_ip_adapters_and_all_that_a_layer_may_have():
    attn = ip_adapter(residual_connection=True, rescale_output_factor=1.7, cross_attention_norm="layer_norm")
    check_like_stock(attn, run_ip)


def masks(*counts):
    windows = [torch.zeros(1, count, 48, 80) for count in counts]
    for adapter in windows:
        for number in range(adapter.shape[1]):
            adapter[:, number, :, 20 * number : 20 * number + 40] = 1
    return windows


@pytest.mark.parametrize("cls", [stock.IPAdapterAttnProcessor, stock.IPAdapterAttnProcessor2_0])
@pytest.mark.parametrize("scales", [([0.7, 0.5], [0.4]), ([0.0, 0.5], [0.0]), (0.7, 0.4)])
def test_ip_adapters_within_masks(cls, scales):
    attn = ip_adapter(cls=cls, scales=scales)

    def run(attn):
        windows = [typed(attn, window) for window in masks(2, 1)]
        if not isinstance(scales[0], list):  # stock wants a scale for each picture where there are masks
            return run_ip(attn, pictures(1, 1), ip_adapter_masks=[windows[0][:, :1], windows[1]])
        return run_ip(attn, pictures(2, 1), ip_adapter_masks=windows)

    check_like_stock(attn, run)


def test_a_mask_for_one_adapter_alone():
    attn = ip_adapter(scales=([0.7, 0.5], 0.4))
    check_like_stock(attn, lambda attn: run_ip(attn, pictures(2, 1), ip_adapter_masks=[typed(attn, masks(2)[0]), None]))


def test_the_old_forms_of_pictures_and_masks():
    attn = ip_adapter(scales=(0.7,), tokens=(4,))
    joined = torch.cat([draw(B, LK, CONTEXT, seed=1), draw(B, 4, CONTEXT, seed=2)], dim=1)
    check_like_stock(attn, lambda attn: run_ip(attn, joined))
    one = masks(1)[0]
    images = pictures(1, tokens=(4,))
    check_like_stock(attn, lambda attn: run_ip(attn, images, ip_adapter_masks=typed(attn, one)))


BAD = {
    "a mask too few": (pictures(1, 1), masks(1), r"1 masks for 2 IP-Adapters"),
    "masks of another form": (pictures(1, 1), [torch.zeros(3, 5), None], r"masks\[0\] must be a tensor \[1, pictures"),
    "more masks than pictures": (pictures(1, 1), masks(2, 1), r"masks\[0\]: 2 masks for 1 pictures"),
    "more masks than scales": (pictures(3, 1), masks(3, 1), r"masks\[0\]: 3 masks for 2 scales"),
    "no masks for scales": (pictures(2, 1), None, r"a scale for each picture needs ip_adapter_masks"),
    "a picture too few": (pictures(2, tokens=(4,)), None, r"2 IP-Adapters, 1 picture embeddings"),
}


@pytest.mark.parametrize("name", BAD)
def test_ip_adapter_inputs_that_cannot_be(name):
    images, windows, message = BAD[name]
    attn = ip_adapter(scales=([0.7, 0.5], 0.4))
    with mmattn.swap_attention(attn), pytest.raises(UsageError, match=message):
        run_ip(attn, images, ip_adapter_masks=windows)


def test_weights_and_scales_are_the_same_objects():
    attn = ip_adapter()
    old, names = attn.processor, list(attn.state_dict())
    with mmattn.swap_attention(attn):
        assert isinstance(attn.processor, stock.IPAdapterAttnProcessor2_0)
        assert attn.processor.to_k_ip is old.to_k_ip
        assert attn.processor.scale is old.scale
        attn.processor.scale = [0.1, 0.2]
        assert old.scale == [0.1, 0.2]
        assert list(attn.state_dict()) == names
        attn.to(torch.bfloat16).to(torch.float32)
    assert attn.processor is old
    assert type(attn.processor).__call__ is stock.IPAdapterAttnProcessor2_0.__call__
